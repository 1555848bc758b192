"""Reading a label image of `kg-detectron predict` with the measurements that lie beside it."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kg_detectron.cells.class_colours import class_colours
from kg_detectron.export.kinds import EXPORTERS
from kg_detectron.io.images import decode_file

LayerData = tuple[Any, dict[str, Any], str]

_LABELS, _CSV, _CLASSES = (EXPORTERS[kind].ending for kind in ("labels", "csv", "classes"))


def get_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[LayerData]] | None:
    """The reader of napari for label images of ours, ``NAME_labels.tif``; None for other files."""
    paths = [path] if isinstance(path, str) else path
    return read_results if paths and all(str(p).endswith(_LABELS) for p in paths) else None


def read_results(path: str | Sequence[str]) -> list[LayerData]:
    """Read label images as layers, each with its measurements as features where ``NAME_cells.csv`` lies beside it, and
    in the colours of its classes where ``NAME_classes.csv`` does.

    The ids of a stack begin anew on every plane; here they count on, for a feature belongs to an id. The features
    ``id`` and ``page`` keep the numbers of the file.

    Raises:
        OSError, ValueError: as `kg_detectron.io.images.decode_file` does.
    """
    return [_read(Path(p)) for p in ([path] if isinstance(path, str) else path)]


def _read(path: Path) -> LayerData:
    stem = path.name.removesuffix(_LABELS)
    scene = decode_file(path).scenes[0]
    labels = np.ascontiguousarray(scene.pixels[..., 0], np.uint32)
    pages = labels.reshape(-1, *labels.shape[-2:])
    first = np.cumsum([0, *(int(page.max(initial=0)) for page in pages[:-1])])
    for page, offset in zip(pages, first, strict=True):
        page[page > 0] += np.uint32(offset)
    features = _features(path.parent, stem)
    if features:
        page_of = features.get("page", np.ones(len(features["id"]))).astype(int)
        features["index"] = features["id"].astype(int) + first[page_of - 1]
    options: dict[str, Any] = {"name": f"{stem} cells", "features": features}
    if classes := _rows(path.parent / (stem + _CLASSES)):
        from kg_detectron.napari.class_colours import class_colormap

        ids = np.array([int(row["id"]) + first[int(row.get("page", 1)) - 1] for row in classes])
        numbers = np.array([int(row["class_id"]) for row in classes])
        options["colormap"] = class_colormap(ids, numbers, class_colours(int(numbers.max())))
    if scene.pixel_size is not None:
        # Not as the layer's scale: the image itself may have been opened without one.
        options["metadata"] = {"pixel_size_um": scene.pixel_size}
    return labels, options, "labels"


def _features(folder: Path, stem: str) -> dict[str, np.ndarray]:
    """The columns of an image's table, or of the tables of its pages; {} without any."""
    paths = [folder / (stem + _CSV)]
    if not paths[0].exists():
        paths = sorted(path for path in folder.glob(f"*{_CSV}") if _is_page(path.name, stem))
    rows = [row for path in paths for row in _rows(path)]
    return {name: _column([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it is not there."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _is_page(name: str, stem: str) -> bool:
    number = name.removesuffix(_CSV).removeprefix(f"{stem}_page")
    return name.startswith(f"{stem}_page") and number.isdigit()


def _column(values: list[str]) -> np.ndarray:
    try:
        return np.array(values, float)
    except ValueError:
        return np.array(values, object)

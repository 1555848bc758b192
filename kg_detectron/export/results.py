"""All files of one result, with the same ids."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor

from kg_detectron.cells.masks import MaskCrops, label_dtype
from kg_detectron.export.drawing import draw_cells
from kg_detectron.export.geojson import write_geojson
from kg_detectron.export.imagej import write_rois
from kg_detectron.export.measurements import measure, write_table
from kg_detectron.export.outlines import outlines
from kg_detectron.io.atomic import replacing
from kg_detectron.io.coco import write_coco
from kg_detectron.io.images import write_png
from kg_detectron.io.labels import write_label_image

_ENDINGS = {
    "labels": "_labels.tif",
    "overlay": "_overlay.png",
    "coco": "_coco.json",
    "geojson": ".geojson",
    "roi": "_rois.zip",
    "csv": "_cells.csv",
}
KINDS = tuple(_ENDINGS)

_LARGE = 8192 * 8192  # pixels; the label image of a larger one is kept on disk while it is being written


def cell_files(folder: Path, stem: str, kinds: Sequence[str] = KINDS) -> dict[str, Path]:
    """The files that `save_cells` writes, by kind.

    Raises:
        ValueError: for a kind that is not in `KINDS`.
    """
    for kind in kinds:
        if kind not in _ENDINGS:
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kind!r}")
    return {kind: Path(folder) / (stem + _ENDINGS[kind]) for kind in kinds}


def save_cells(
    cells: dict[str, Tensor | MaskCrops],
    image: np.ndarray,
    folder: Path,
    stem: str,
    kinds: Sequence[str],
    *,
    pixel_size: float | None = None,
    source: str = "",
) -> dict[str, Path]:
    """Write the cells of one image in several formats. A cell has the same id in all, 1..N in the order given.

    Each file appears whole or not at all, replaces an older one, and has the same bytes for the same input.

    - ``labels``, ``<stem>_labels.tif``: label image, uint16 up to 65,535 cells and uint32 above; for an image larger
      than 4096 x 4096 pixels a tiled BigTIFF.
    - ``overlay``, ``<stem>_overlay.png``: the outlines over the image.
    - ``coco``, ``<stem>_coco.json``: a COCO dataset of one image; bbox is the network's box, segmentation the mask.
    - ``geojson``, ``<stem>.geojson``: polygons for QuPath.
    - ``roi``, ``<stem>_rois.zip``: regions for ImageJ's ROI Manager.
    - ``csv``, ``<stem>_cells.csv``: measurements (`measurements.measure`).

    Args:
        cells: as `separate_cells` returns them: no pixel in two cells, each cell one piece.
        image: (H,W), (H,W,3) BGR or (H,W,C), of the masks' size, at its own depth.
        folder: made where absent.
        stem: what the files' names begin with.
        kinds: some of `KINDS`.
        pixel_size: micrometres a pixel, for the measurements.
        source: the image's file name, for the COCO file; by default `stem`.
    Returns:
        The files by kind.
    Raises:
        ValueError: for an unknown kind, a pixel size that is not above 0, an image of another size, and cells that
            overlap or are in pieces.
    """
    paths = cell_files(folder, stem, kinds)
    masks, scores, boxes = cells["masks"], cells["scores"].tolist(), cells["boxes"].cpu().double().numpy()
    if image.shape[:2] != masks.size or image.ndim not in (2, 3):
        raise ValueError(f"image: expected (H,W) or (H,W,C) of {masks.size}, the size of the masks, got {image.shape}")
    if pixel_size is not None and not 0 < pixel_size < float("inf"):
        raise ValueError(f"pixel_size: expected micrometres above 0, got {pixel_size}")
    masks = masks.to("cpu")
    Path(folder).mkdir(parents=True, exist_ok=True)
    if "labels" in paths or "overlay" in paths:
        _write_pictures(paths, masks, image)
    if "coco" in paths:
        _write_coco(paths["coco"], cells, PurePath(source).name or stem)
    if "geojson" in paths or "roi" in paths:
        rings = outlines(masks)
        if "geojson" in paths:
            write_geojson(paths["geojson"], rings, scores)
        if "roi" in paths:
            write_rois(paths["roi"], rings)
    if "csv" in paths:
        write_table(paths["csv"], measure(masks, boxes, np.array(scores), image, pixel_size))
    return paths


def _write_pictures(paths: dict[str, Path], masks: MaskCrops, image: np.ndarray) -> None:
    """The label image and the overlay, those of them that are in `paths`."""
    folder = next(iter(paths.values())).parent
    with _room_for_labels(masks, folder) as room:
        labels = masks.label_image(out=room)
        if np.count_nonzero(labels) != sum(np.count_nonzero(crop) for crop, _ in masks.pixels()):
            raise ValueError("cells: some overlap; expected the result of separate_cells")
        if "labels" in paths:
            write_label_image(paths["labels"], labels)
        if "overlay" in paths:
            with replacing(paths["overlay"]) as unfinished:
                write_png(unfinished, draw_cells(image, labels))


@contextmanager
def _room_for_labels(masks: MaskCrops, folder: Path) -> Iterator[np.ndarray | None]:
    """For a large image a memory-mapped array in a nameless file of the folder; else None."""
    if masks.size[0] * masks.size[1] <= _LARGE:
        yield None
    else:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield np.memmap(file, label_dtype(len(masks)), shape=masks.size)


def _write_coco(path: Path, cells: dict[str, Tensor | MaskCrops], file_name: str) -> None:
    height, width = cells["masks"].size
    columns = cells["boxes"].tolist(), cells["scores"].tolist(), cells["labels"].tolist(), cells["masks"].rle()
    annotations = [
        {
            "id": id,
            "image_id": 1,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": rle,
            "area": int(coco_mask.area(rle)),
            "iscrowd": 0,
        }
        for id, ((x1, y1, x2, y2), score, label, rle) in enumerate(zip(*columns, strict=True), start=1)
    ]
    images = [{"id": 1, "file_name": file_name, "height": height, "width": width}]
    categories = [{"id": label, "name": f"cell {label}" if label > 1 else "cell"} for label in sorted({1, *columns[2]})]
    write_coco(path, images, annotations, categories, "cells found by kg_detectron")

"""Whole datasets as COCO JSON, read and written in this module alone. H, W: height and width in pixels."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from kg_detectron.cells.run_lengths import RLE, as_text, decode_runs, encode_mask, encode_runs, foreground, mask_areas
from kg_detectron.io import fault
from kg_detectron.io.atomic import replacing
from kg_detectron.io.fault import Fault, FaultError, Severity
from kg_detectron.io.grey import is_grey
from kg_detectron.io.images import check_size, write_png
from kg_detectron.io.relative_path import checked_relative_path

_BOX_TOLERANCE = 2.0  # pixels between an annotation's box and its mask's: rasterised polygons, inclusive last pixels
_MAX_NUMBER = 1e12  # of coordinates: a JSON file may hold integers that are beyond any float
_MAX_OUTLINE = 10_000_000  # pixels: a polygon takes memory in proportion to its length, not to its file
_MAX_SIDES = 4  # image sides that a polygon may reach beyond its image
_EDGE_TOLERANCE = 0.01  # pixels beyond the image: rounded decimals
_DERIVED = ("bbox", "area", "iscrowd")  # keys of an annotation that follow from the others

_REQUIRED = ("image_id", "segmentation")  # keys of an annotation that nothing can do without


@dataclass(frozen=True)
class CocoDataset:
    """A checked dataset.

    Attributes:
        records: one dict an image, Detectron2's "standard dataset dict": ``file_name``, ``image_id``, ``height``,
            ``width`` and ``annotations``, a list of dicts ``bbox`` ([x, y, width, height] in pixels, the tight box of
            the mask), ``segmentation`` (`RLE`), ``category_id`` (contiguous, from 0; None where it is not known),
            ``iscrowd``, and ``id`` where the file has one. (Detectron2 wants ``bbox_mode`` too, a type of its own;
            ``kg_detectron.d2`` adds it.)
        category_names: the name of every ``category_id``.
        category_ids: what the file calls every ``category_id``, rising.
    """

    records: list[dict[str, Any]]
    category_names: list[str]
    category_ids: list[int]


# Masks


def decode_mask(segmentation: dict | list, height: int, width: int) -> NDArray[np.bool_]:
    """Decode a COCO ``segmentation``.

    Args:
        segmentation: compressed RLE (``counts`` as str or bytes), uncompressed RLE (``counts`` as list), or
            polygons, each a list [x0, y0, x1, y1, ...] in continuous pixels, cut at the image.
        height, width: size of the image, pixels.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: missing, corrupt, of another size, or far outside the image.
    """
    _, runs = checked_rle(segmentation, height, width)
    mask = np.zeros(height * width, bool)
    mask[foreground(runs)] = True
    return np.ascontiguousarray(mask.reshape(width, height).T)


def checked_rle(segmentation: object, height: int, width: int) -> tuple[RLE, NDArray[np.int64]]:
    """Any COCO segmentation -> (compressed RLE, lengths of its runs), after checks that pycocotools does not make.

    The errors are those of `decode_mask`.
    """
    if isinstance(segmentation, list) and segmentation:
        segmentation = _rle_of_polygons(segmentation, height, width)
    elif not isinstance(segmentation, dict) or not segmentation.get("counts"):
        raise ValueError(f"it has no mask: segmentation is {str(segmentation)[:80]}")
    size = segmentation.get("size")
    if size != [height, width] and size != (height, width):
        raise FaultError(fault.SIZE, f"its mask has size {size}, expected that of its image, [{height}, {width}]")
    counts = segmentation["counts"]
    runs = np.asarray(counts) if isinstance(counts, list) else decode_runs(counts)
    # Runs that do not fill the image exactly make pycocotools write beyond its memory.
    pixels = height * width
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"its mask is corrupt: the runs do not fill the image of {height} x {width} pixels")
    rle = encode_runs(runs, (height, width)) if isinstance(counts, list) else as_text(segmentation)
    return rle, runs.astype(np.int64)


def _rle_of_polygons(polygons: list, height: int, width: int) -> RLE:
    for polygon in polygons:
        if not (
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_finite, polygon))
        ):
            raise ValueError(f"a polygon must be [x0, y0, x1, y1, x2, y2, ...], got {str(polygon)[:80]}")
        for values, side in ((polygon[0::2], width), (polygon[1::2], height)):
            if min(values) < -_MAX_SIDES * side or max(values) > (1 + _MAX_SIDES) * side:
                raise ValueError(
                    f"its polygon reaches {max(-min(values), max(values) - side):g} pixels outside its image of width "
                    f"{width} and height {height}"
                )
    length = sum(np.abs(np.diff(np.reshape([*p, *p[:2]], (-1, 2)), axis=0)).max(axis=1).sum() for p in polygons)
    if length > _MAX_OUTLINE:
        raise ValueError(f"its polygon is {length:.0f} pixels long, more than the limit of {_MAX_OUTLINE}")
    return as_text(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


# Writing


def coco_annotation(
    mask: NDArray[np.bool_], *, image_id: int, annotation_id: int, category_id: int = 1
) -> dict[str, Any]:
    """Describe a mask as a COCO annotation with its tight box.

    Args:
        mask: (H, W) bool, with at least one pixel.

    Returns:
        dict with ``id``, ``image_id``, ``category_id``, ``segmentation`` (`RLE`), ``bbox`` (x, y, width, height in
        pixels), ``area`` in pixels, and ``iscrowd`` 0.

    Raises:
        ValueError: the mask is empty or of another type.
    """
    return rle_annotation(encode_mask(mask), image_id=image_id, annotation_id=annotation_id, category_id=category_id)


def rle_annotation(
    rle: RLE,
    *,
    image_id: int,
    annotation_id: int,
    category_id: int | None = 1,
    box: Sequence[float] | None = None,
    score: float | None = None,
) -> dict[str, Any]:
    """`coco_annotation` of a mask that is encoded already.

    Args:
        category_id: None for a cell whose category is not known.
        box: (x1, y1, x2, y2) to write instead of the mask's tight box; an empty mask needs one.
        score: of a detection.
    """
    area = int(mask_areas([rle])[0])
    if area == 0 and box is None:
        raise ValueError(f"mask of annotation {annotation_id} is empty")
    bbox = coco_mask.toBbox(rle).tolist() if box is None else [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    annotation = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": as_text(rle),
        "bbox": bbox,
        "area": area,
        "iscrowd": 0,
    }
    return annotation if score is None else annotation | {"score": score}


def write_coco(
    path: str | Path, images: Sequence[dict], annotations: Sequence[dict], categories: Sequence[dict], description: str
) -> None:
    """Write a COCO JSON file: whole or not at all, and the same bytes for the same content.

    Args:
        path: the file; an existing one is replaced.
        images, annotations, categories: the lists of the format, as they stand.
        description: what the dataset is, its licence included.

    Raises:
        OSError: the file cannot be written.
        ValueError: NaN or infinity, which JSON has not.
    """
    content = {
        "info": {"description": description},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def rewrite(
    dataset: CocoDataset, path: str | Path, folder: str | Path, description: str, *, category: str | None = None
) -> tuple[int, int]:
    """Write a dataset that was read, sound: annotations numbered from 1 with tight boxes, categories that are used.

    Crowd annotations are left out, for training and evaluation have no use for them.

    Args:
        path: the file to write.
        folder: from which the file names in it start; all images are in it or below.
        category: the name of a single category that takes the place of all.

    Returns:
        The numbers of images and of annotations.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    file_id: dict[int | None, int | None] = {None: None, **dict(enumerate(dataset.category_ids))}
    for record in dataset.records:
        file_name = Path(os.path.abspath(record["file_name"])).relative_to(os.path.abspath(folder)).as_posix()
        images.append(
            {"id": record["image_id"], "file_name": file_name, "height": record["height"], "width": record["width"]}
        )
        annotations += [
            rle_annotation(
                cell["segmentation"],
                image_id=record["image_id"],
                annotation_id=number,
                category_id=1 if category else file_id[cell["category_id"]],
            )
            for number, cell in enumerate(
                (cell for cell in record["annotations"] if not cell["iscrowd"]), start=len(annotations) + 1
            )
        ]
    used = {annotation["category_id"] for annotation in annotations} - {None}
    categories = [
        {"id": id, "name": name}
        for id, name in zip(dataset.category_ids, dataset.category_names, strict=True)
        if id in used or not used
    ]
    write_coco(path, images, annotations, [{"id": 1, "name": category}] if category else categories, description)
    return len(images), len(annotations)


def write_split(
    dataset: str | Path,
    split: str,
    samples: Iterable[tuple[Any, ...]],
    *,
    category: str | Sequence[str],
    description: str,
) -> list[int]:
    """Write one split of a dataset as ``dataset/split/*.png`` and ``dataset/instances_<split>.json``.

    Images and annotations are numbered from 1 in the order given. The JSON file comes last, so that where it is, the
    images are too.

    Args:
        dataset: folder of the dataset; made where absent.
        split: ``train``, ``val`` or ``test``.
        samples: one after the other, a name without ending, the image (H, W, 3) BGR in 0..255 or, kept as it is,
            uint16, and the cells' masks (H, W) bool; of several categories, the index of each cell's as well.
        category: name of the only category, of id 1; or those of several, of ids 1, 2, ...
        description: what the dataset is, its licence included.

    Returns:
        the number of cells of every image.

    Raises:
        ValueError: a mask is empty.
        OSError: a file cannot be written.
    """
    folder = Path(dataset) / split
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    counts: list[int] = []
    names = [category] if isinstance(category, str) else list(category)
    for image_id, (name, image, masks, *rest) in enumerate(samples, start=1):
        if image.dtype == np.uint16:
            pixels = image[..., 0] if is_grey(image) else image
            (folder / f"{name}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        else:
            write_png(folder / f"{name}.png", image)
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": f"{name}.png", "height": height, "width": width})
        first = len(annotations)
        kinds = iter(rest[0] if rest else itertools.repeat(0))
        for mask in masks:
            number = len(annotations) + 1
            kind = 1 + next(kinds)
            annotations.append(coco_annotation(mask, image_id=image_id, annotation_id=number, category_id=kind))
        counts.append(len(annotations) - first)
    categories = [{"id": id, "name": name} for id, name in enumerate(names, start=1)]
    write_coco(Path(dataset) / f"instances_{split}.json", images, annotations, categories, description)
    return counts


# Reading


def load_coco(json_file: str | Path, image_root: str | Path) -> CocoDataset:
    """Load a COCO JSON file and check all of it. Images without annotations stay.

    Args:
        json_file: the annotations.
        image_root: the folder that the images' file names start from.

    Raises:
        ValueError: the file is not a sound dataset: corrupt JSON, a missing key, a duplicate or unknown id, an absolute
            file name or one that leaves the folder, an annotation without a mask or with an empty or corrupt
            one, a mask of another size than its image, a box outside the image, a box that is not its mask's. The
            message names the file and the image or annotation.
        FileNotFoundError: the JSON file or an image is missing.
    """
    dataset, faults = read_coco(json_file, image_root)
    missing = [one for one in faults if one.kind == fault.MISSING_IMAGE]
    for one in faults:
        if one.kind != fault.MISSING_IMAGE and one.severity > Severity.NOTE:
            raise ValueError(f"{json_file}: {one}")
    if missing:
        raise FileNotFoundError(
            f"{json_file}: {len(missing)} of {len(dataset.records)} images are missing: "
            + ", ".join(one.where for one in missing[:3])
            + (", ..." if len(missing) > 3 else "")
        )
    return dataset


def read_coco(
    json_file: str | Path, image_root: str | Path | None, *, for_evaluation: bool = False
) -> tuple[CocoDataset, list[Fault]]:
    """What `load_coco` loads, as far as it is sound, and all that is wrong with the rest.

    Args:
        json_file: the annotations, in UTF-8, UTF-16 or UTF-32, with or without a byte order mark. File names may have
            backslashes, as Windows writes them.
        image_root: the folder that the images' file names start from; None leaves the names as they are and asks
            for no file.
        for_evaluation: read the cells as an evaluation needs them: image ids may be text; annotations need neither ids
            nor categories, and ``category_id`` is as the file has it; their boxes stay as they are, under
            ``given_box`` (x1, y1, x2, y2), and need not be those of their masks; where there is none it is the mask's;
            ``score`` is there where the file has one.

    Raises:
        ValueError: corrupt JSON, or no JSON object.
        FileNotFoundError: the JSON file is missing.
    """
    data = read_json(json_file, dict)
    faults: list[Fault] = []
    id_types = (int, str) if for_evaluation else (int,)
    images = _by_id(data, "images", ("file_name", "height", "width"), id_types, faults)
    categories: dict[int, dict | None]
    if for_evaluation:  # no fault of theirs matters
        named = [one for one in entries_of(data, "categories", []) if isinstance(one, dict) and "name" in one]
        categories = {one["id"]: one for one in named if isinstance(one.get("id"), int)}
    else:
        categories = _by_id(data, "categories", ("name",), (int,), faults)
        faults += _double_names(categories)
    records: dict[int | str, dict | None] = {}  # None: known, and faulty
    for id, image in images.items():
        records[id] = None
        with _collected(faults, f"image {id}"):
            records[id] = image and _image_record(image, None if image_root is None else Path(image_root))
    category_ids = sorted(categories)
    contiguous = {id: index for index, id in enumerate(category_ids)}
    for where, annotation in _annotations(data, faults, needs_id=not for_evaluation):
        if not for_evaluation:
            absent = [key for key in (*_DERIVED, "category_id") if key not in annotation]
            if absent:
                text = f"missing key {', '.join(map(repr, absent))}"
                faults.append(Fault(fault.INCOMPLETE, where, text, "kg-detectron convert adds it"))
        with _collected(faults, where):
            record = _known(records, annotation["image_id"], "image_id")
            category_id = annotation.get("category_id")
            if category_id is not None and not for_evaluation:
                category_id = _known(contiguous, category_id, "category_id")
            if record is not None:
                cell = instance(annotation, record["height"], record["width"], for_evaluation=for_evaluation)
                record["annotations"].append(cell | {"category_id": category_id})
    sound = [record for record in records.values() if record is not None]
    if image_root is not None:
        faults += [_missing(record["file_name"]) for record in sound if not os.path.isfile(record["file_name"])]
    names = [str((categories[id] or {}).get("name")) for id in category_ids]
    return CocoDataset(sound, names, category_ids), faults


def instance(entry: dict, height: int, width: int, *, for_evaluation: bool = False) -> dict[str, Any]:
    """One annotation, or one of COCO's results, checked.

    Returns:
        What stands under ``annotations`` of `CocoDataset`, but for ``category_id``; with ``for_evaluation`` what
        `read_coco` says.

    Raises:
        ValueError: a box or mask that is none, or does not fit the image, or the other.
    """
    box = entry.get("bbox")
    if box is not None and not (
        isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0
    ):
        raise FaultError(fault.BOX_AREA, f"bbox must be [x, y, width, height], 4 finite numbers, got {box!r}")
    rle, runs = checked_rle(entry.get("segmentation"), height, width)
    if not for_evaluation and not runs[1::2].any():
        raise FaultError(fault.EMPTY_MASK, "its mask is empty, or lies outside its image")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise FaultError(fault.ENTRY, f"iscrowd must be 0 or 1, got {entry['iscrowd']!r}")
    tight = coco_mask.toBbox(rle).tolist()
    cell = {"segmentation": rle, "iscrowd": int(entry.get("iscrowd", 0)), "id": entry.get("id")}
    if for_evaluation:
        score = entry.get("score")
        if score is not None and not _is_finite(score):
            raise ValueError(f"score must be a finite number, got {score!r}")
        return cell | {"given_box": _xyxy(tight if box is None else box), "score": score}
    if box is not None:
        _check_box(box, tight, entry["segmentation"], height, width)
    return cell | {"bbox": tight}


def _check_box(box: list[float], tight: list[float], segmentation: dict | list, height: int, width: int) -> None:
    """Refuse a box [x, y, width, height] that is not that of its mask, nor that of polygons before they are cut."""
    if min(box[2:]) == 0:
        raise FaultError(fault.BOX_AREA, f"bbox must be [x, y, width, height] with positive sides, got {box!r}")
    expected = [_xyxy(tight)]
    if isinstance(segmentation, list):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        expected.append((*points.min(axis=0), *points.max(axis=0)))
    elif not _is_inside(_xyxy(box), height, width):
        raise FaultError(fault.BOX_OUTSIDE, f"bbox {box} is outside its image of width {width} and height {height}")
    if min(np.abs(np.subtract(_xyxy(box), one)).max() for one in expected) > _BOX_TOLERANCE:
        kind = fault.BOX_OFF_MASK if _is_inside(_xyxy(box), height, width) else fault.BOX_OUTSIDE
        raise FaultError(kind, f"bbox {box} is not the box of its mask, {tight}")


def read_json(json_file: str | Path, *kinds: type) -> Any:
    """The content of a JSON file whose outermost value is a dict or a list, as `kinds` say; else a ValueError."""
    try:
        data = json.loads(Path(json_file).read_bytes())  # bytes: json knows UTF-8, 16 and 32 and their marks
    except (ValueError, RecursionError) as error:  # of JSON and of the encoding
        raise ValueError(f"{json_file}: corrupt JSON: {error}") from None
    if not isinstance(data, kinds):
        expected = " or ".join("a JSON object" if kind is dict else "a list" for kind in kinds)
        raise ValueError(f"{json_file}: expected a COCO dataset, {expected}, got {type(data).__name__}")
    return data


@contextmanager
def _collected(faults: list[Fault], where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        faults.append(Fault(getattr(error, "kind", fault.MASK), where, str(error)))


def entries_of(data: dict, key: str, faults: list[Fault]) -> list:
    """One of the dataset's lists; where it is none, an empty one, and a fault is added."""
    entries = data.get(key)
    if isinstance(entries, list):
        return entries
    faults.append(Fault(fault.ENTRY, "", f"expected a list under {key!r}, got {type(entries).__name__}"))
    return []


def _by_id(
    data: dict, key: str, required: Iterable[str], id_types: tuple[type, ...], faults: list[Fault]
) -> dict[Any, dict | None]:
    """One of the dataset's lists as {id: entry}, every entry with its required keys, or None where it lacks one."""
    by_id: dict[Any, dict | None] = {}
    for index, entry in enumerate(entries_of(data, key, faults)):
        id = entry.get("id") if isinstance(entry, dict) else None
        where = f"{key}[{index}]"
        if not isinstance(id, id_types):
            text = f"expected an object with an integer 'id', got {str(entry)[:80]}"
            faults.append(Fault(fault.ENTRY, where, text))
        elif id in by_id:
            faults.append(Fault(fault.DUPLICATE_ID, where, f"duplicate id {id}", severity=Severity.FATAL))
        else:
            absent = [name for name in required if name not in entry]
            by_id[id] = None if absent else entry
            if absent:
                faults.append(Fault(fault.ENTRY, f"{where} of id {id}", f"missing key {', '.join(map(repr, absent))}"))
    return by_id


def _double_names(categories: dict[int, dict | None]) -> Iterator[Fault]:
    """Categories of one name, which nothing can tell apart."""
    known: dict[str, int] = {}
    for id in sorted(categories):
        name = str((categories[id] or {}).get("name")).strip()
        first = known.setdefault(name, id)
        if first != id:
            text = f"the categories {first} and {id} are both called {name!r}, expected different names"
            yield Fault(fault.CATEGORY_NAMES, "", text, "kg-detectron convert --merge-categories makes them one")


def _annotations(data: dict, faults: list[Fault], *, needs_id: bool) -> Iterator[tuple[str, dict]]:
    """The annotations that have all required keys, each with what messages call it."""
    seen: set[int] = set()
    for index, entry in enumerate(entries_of(data, "annotations", faults)):
        where = f"annotations[{index}]"
        if not isinstance(entry, dict):
            faults.append(Fault(fault.ENTRY, where, f"expected an object with an integer 'id', got {str(entry)[:80]}"))
            continue
        id = entry.get("id")
        if isinstance(id, int):
            if needs_id and id in seen:
                faults.append(Fault(fault.DUPLICATE_ID, where, f"duplicate id {id}", "kg-detectron convert renumbers"))
            else:
                where = f"annotation {id}"
            seen.add(id)
        elif needs_id:
            text = f"expected an object with an integer 'id', got {str(entry)[:80]}"
            faults.append(Fault(fault.INCOMPLETE, where, text, "kg-detectron convert numbers them"))
        absent = [name for name in _REQUIRED if name not in entry]
        if absent:
            faults.append(Fault(fault.ENTRY, where, f"missing key {', '.join(map(repr, absent))}"))
        else:
            yield where, entry


def _known(table: dict, id: object, name: str) -> Any:
    if not isinstance(id, (int, str)) or id not in table:
        raise FaultError(fault.UNKNOWN_ID, f"unknown {name} {id!r}")
    return table[id]


def _missing(file: str) -> Fault:
    path = Path(file)
    try:
        similar = [one.name for one in path.parent.iterdir() if one.name.casefold() == path.name.casefold()]
    except OSError:
        similar = []
    if similar:
        text = f"there is no such file, but {similar[0]}, whose name differs in upper and lower case only"
        return Fault(fault.MISSING_IMAGE, file, text, "rename one of them")
    return Fault(fault.MISSING_IMAGE, file, "there is no such file")


def _image_record(image: dict, image_root: Path | None) -> dict[str, Any]:
    if image_root is None:
        file_name = PureWindowsPath(str(image["file_name"])).as_posix()
    else:
        try:
            file_name = str(image_root / checked_relative_path(image["file_name"]))
        except ValueError as error:
            raise FaultError(fault.FILE_NAME, str(error)) from None
    height, width = image["height"], image["width"]
    for side, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1:
            text = f"{side} must be a positive integer, got {value!r} (of {width!r} x {height!r} pixels)"
            raise FaultError(fault.ENTRY, text)
    try:
        check_size(height, width)
    except ValueError as error:
        raise FaultError(fault.ENTRY, str(error)) from None
    return {"file_name": file_name, "image_id": image["id"], "height": height, "width": width, "annotations": []}


def _xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _is_inside(corners: Sequence[float], height: int, width: int) -> bool:
    x1, y1, x2, y2 = corners
    return min(x1, y1) >= -_EDGE_TOLERANCE and x2 <= width + _EDGE_TOLERANCE and y2 <= height + _EDGE_TOLERANCE


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= _MAX_NUMBER

"""Masks as COCO run-length encodings (RLE), and whole datasets as COCO JSON. H, W: height and width in pixels."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from pycocotools import mask as coco_mask

from kg_detectron.cells.run_lengths import decode_runs
from kg_detectron.io import fault
from kg_detectron.io.atomic import replacing
from kg_detectron.io.fault import Fault, FaultError
from kg_detectron.io.images import check_size, write_png

_BOX_TOLERANCE = 2.0  # pixels between an annotation's box and its mask's: rasterised polygons, inclusive last pixels
_MAX_NUMBER = 1e12  # of coordinates: a JSON file may hold integers that are beyond any float
_MAX_OUTLINE = 10_000_000  # pixels: a polygon takes memory in proportion to its length, not to its file
_EDGE_TOLERANCE = 0.01  # pixels beyond the image: rounded decimals


@dataclass(frozen=True)
class CocoDataset:
    """A checked dataset.

    Attributes:
        records: one dict an image, Detectron2's "standard dataset dict": ``file_name``, ``image_id``, ``height``,
            ``width`` and ``annotations``, a list of dicts ``bbox`` ([x, y, width, height] in pixels, the tight box of
            the mask), ``segmentation`` (compressed RLE), ``category_id`` (contiguous, from 0) and ``iscrowd``.
            (Detectron2 wants ``bbox_mode`` too, a type of its own; ``kg_detectron.d2`` adds it.)
        category_names: the name of every ``category_id``.
        category_ids: what the file calls every ``category_id``, rising.
    """

    records: list[dict]
    category_names: list[str]
    category_ids: list[int]


def encode_mask(mask: np.ndarray) -> dict:
    """Encode a mask as compressed RLE.

    Args:
        mask: (H, W) bool.

    Returns:
        ``{"size": [H, W], "counts": str}``, ready for JSON and for pycocotools.

    Raises:
        ValueError: another type or shape.
    """
    if mask.dtype != bool or mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask must be a bool array (H, W), got {mask.dtype} {mask.shape}")
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def decode_mask(segmentation: dict | list, height: int, width: int) -> np.ndarray:
    """Decode a COCO ``segmentation``.

    Args:
        segmentation: compressed RLE (``counts`` as str or bytes), uncompressed RLE (``counts`` as list), or
            polygons, each a list [x0, y0, x1, y1, ...] in continuous pixels.
        height, width: size of the image, pixels.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: missing, corrupt, of another size, or outside the image.
    """
    _, runs = checked_rle(segmentation, height, width)
    columns = np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height)
    return np.ascontiguousarray(columns.T)


def coco_annotation(mask: np.ndarray, *, image_id: int, annotation_id: int, category_id: int = 1) -> dict:
    """Describe a mask as a COCO annotation with its tight box.

    Args:
        mask: (H, W) bool, with at least one pixel.

    Returns:
        dict with ``id``, ``image_id``, ``category_id``, ``segmentation`` (compressed RLE), ``bbox`` (x, y, width,
        height in pixels), ``area`` in pixels, and ``iscrowd`` 0.

    Raises:
        ValueError: the mask is empty or of another type.
    """
    return rle_annotation(encode_mask(mask), image_id=image_id, annotation_id=annotation_id, category_id=category_id)


def rle_annotation(rle: dict, *, image_id: int, annotation_id: int, category_id: int = 1) -> dict:
    """:func:`coco_annotation` of a mask that is encoded already, as compressed RLE with ``counts`` str or bytes."""
    area = int(coco_mask.area(rle))
    if area == 0:
        raise ValueError(f"mask of annotation {annotation_id} is empty")
    counts = rle["counts"]
    rle = {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": area,
        "iscrowd": 0,
    }


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


def write_split(
    dataset: str | Path,
    split: str,
    samples: Iterable[tuple[str, np.ndarray, Iterable[np.ndarray]]],
    *,
    category: str,
    description: str,
) -> list[int]:
    """Write one split of a dataset as ``dataset/split/*.png`` and ``dataset/instances_<split>.json``.

    Images and annotations are numbered from 1 in the order given. The JSON file comes last, so that where it is, the
    images are too.

    Args:
        dataset: folder of the dataset; made where absent.
        split: ``train``, ``val`` or ``test``.
        samples: one after the other, a name without ending, the image (H, W, 3) BGR in 0..255, and the cells' masks
            (H, W) bool.
        category: name of the only category, of id 1.
        description: what the dataset is, its licence included.

    Returns:
        the number of cells of every image.

    Raises:
        ValueError: a mask is empty.
        OSError: a file cannot be written.
    """
    folder = Path(dataset) / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations, counts = [], [], []
    for image_id, (name, image, masks) in enumerate(samples, start=1):
        write_png(folder / f"{name}.png", image)
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": f"{name}.png", "height": height, "width": width})
        before = len(annotations)
        for mask in masks:
            annotations.append(coco_annotation(mask, image_id=image_id, annotation_id=len(annotations) + 1))
        counts.append(len(annotations) - before)
    categories = [{"id": 1, "name": category}]
    write_coco(Path(dataset) / f"instances_{split}.json", images, annotations, categories, description)
    return counts


def load_coco(json_file: str | Path, image_root: str | Path) -> CocoDataset:
    """Load a COCO JSON file and check all of it. Images without annotations stay.

    Args:
        json_file: the annotations.
        image_root: the folder that the images' file names start from.

    Raises:
        ValueError: the file is not a sound dataset: corrupt JSON, a missing key, a duplicate or unknown id, an absolute
            file name or one that leaves the folder, an annotation without a mask or with an empty or corrupt
            one, a mask of another size than its image, a box or polygon outside the image, a box that is not its
            mask's. The message names the file and the image or annotation.
        FileNotFoundError: the JSON file or an image is missing.
    """
    dataset, faults = read_coco(json_file, image_root)
    for found in faults:
        if found.kind != fault.MISSING_IMAGE:
            raise ValueError(f"{json_file}: {found}")
    if faults:
        raise FileNotFoundError(
            f"{json_file}: {len(faults)} of {len(dataset.records)} images are missing: "
            + ", ".join(found.where for found in faults[:3])
            + (", ..." if len(faults) > 3 else "")
        )
    return dataset


def read_coco(json_file: str | Path, image_root: str | Path) -> tuple[CocoDataset, list[Fault]]:
    """What :func:`load_coco` loads, as far as it is sound, and all that is wrong with the rest.

    Raises:
        ValueError: corrupt JSON, or no JSON object.
        FileNotFoundError: the JSON file is missing.
    """
    data = read_json(json_file, dict)
    faults: list[Fault] = []
    images = _by_id(data, "images", ("file_name", "height", "width"), faults)
    categories = _by_id(data, "categories", ("name",), faults)
    annotations = _by_id(
        data, "annotations", ("image_id", "category_id", "segmentation", "bbox", "area", "iscrowd"), faults
    )
    records: dict[int, dict | None] = {}  # None: known, and faulty
    for id, image in images.items():
        records[id] = None
        with _collected(faults, f"image {id}"):
            records[id] = image and _image_record(image, Path(image_root))
    category_ids = sorted(categories)
    contiguous = {id: index for index, id in enumerate(category_ids)}
    for id, annotation in annotations.items():
        with _collected(faults, f"annotation {id}"):
            if annotation is None:
                continue
            record = _known(records, annotation["image_id"], "image_id")
            category_id = _known(contiguous, annotation["category_id"], "category_id")
            if record is not None:
                record["annotations"].append(_instance_record(annotation, record, category_id))
    sound = [record for record in records.values() if record is not None]
    faults += [
        Fault(fault.MISSING_IMAGE, record["file_name"], "there is no such file")
        for record in sound
        if not os.path.isfile(record["file_name"])
    ]
    names = [str((categories[id] or {}).get("name")) for id in category_ids]
    return CocoDataset(sound, names, category_ids), faults


def checked_relative_path(name: str) -> PurePosixPath:
    """Refuse a file name that could lead out of the folder it belongs to, on any operating system.

    Args:
        name: a file name from a JSON file or an archive, with forward slashes.

    Raises:
        ValueError: not a name, absolute, or with a part "..".
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a file name, got {name!r}")
    windows = PureWindowsPath(name)  # splits at forward slashes too
    if windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"refused the file name {name!r}: it must be relative, without '..'")
    return PurePosixPath(name)


def read_json(json_file: str | Path, *kinds: type) -> dict | list:
    """The content of a JSON file whose outermost value is a dict or a list, as `kinds` say; else a ValueError."""
    try:
        data = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
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


def _by_id(data: dict, key: str, required: Iterable[str], faults: list[Fault]) -> dict[int, dict | None]:
    """One of the dataset's lists as {id: entry}, every entry with its required keys, or None where it lacks one."""
    entries = data.get(key)
    if not isinstance(entries, list):
        faults.append(Fault(fault.ENTRY, "", f"expected a list under {key!r}, got {type(entries).__name__}"))
        return {}
    by_id: dict[int, dict | None] = {}
    for index, entry in enumerate(entries):
        id = entry.get("id") if isinstance(entry, dict) else None
        where = f"{key}[{index}]"
        if not isinstance(id, int):
            text = f"expected an object with an integer 'id', got {str(entry)[:80]}"
            faults.append(Fault(fault.ENTRY, where, text))
        elif id in by_id:
            faults.append(Fault(fault.DUPLICATE_ID, where, f"duplicate id {id}"))
        else:
            absent = [name for name in required if name not in entry]
            by_id[id] = None if absent else entry
            if absent:
                faults.append(Fault(fault.ENTRY, f"{where} of id {id}", f"missing key {', '.join(map(repr, absent))}"))
    return by_id


def _known(table: dict, id: object, name: str):
    if not isinstance(id, int) or id not in table:
        raise FaultError(fault.UNKNOWN_ID, f"unknown {name} {id!r}")
    return table[id]


def _image_record(image: dict, image_root: Path) -> dict:
    try:
        file_name = image_root / checked_relative_path(image["file_name"])
    except ValueError as error:
        raise FaultError(fault.FILE_NAME, str(error)) from None
    for side in ("height", "width"):
        if not isinstance(image[side], int) or image[side] < 1:
            raise FaultError(fault.ENTRY, f"{side} must be a positive integer, got {image[side]!r}")
    try:
        check_size(image["height"], image["width"])
    except ValueError as error:
        raise FaultError(fault.ENTRY, str(error)) from None
    return {
        "file_name": str(file_name),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "annotations": [],
    }


def _instance_record(annotation: dict, record: dict, category_id: int) -> dict:
    height, width = record["height"], record["width"]
    rle, runs = checked_rle(annotation["segmentation"], height, width)
    if not runs[1::2].any():
        raise FaultError(fault.EMPTY_MASK, "its mask is empty")
    tight = coco_mask.toBbox(rle).tolist()
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) > 0):
        raise FaultError(fault.BOX_AREA, f"bbox must be [x, y, width, height] with positive sides, got {box!r}")
    x1, y1, x2, y2 = _xyxy(box)
    if min(x1, y1) < -_EDGE_TOLERANCE or x2 > width + _EDGE_TOLERANCE or y2 > height + _EDGE_TOLERANCE:
        raise FaultError(fault.BOX_OUTSIDE, f"bbox {box} is outside its image of width {width} and height {height}")
    if np.abs(np.subtract(_xyxy(box), _xyxy(tight))).max() > _BOX_TOLERANCE:
        raise FaultError(fault.BOX_OFF_MASK, f"bbox {box} is not the box of its mask, {tight}")
    if annotation["iscrowd"] not in (0, 1):
        raise FaultError(fault.ENTRY, f"iscrowd must be 0 or 1, got {annotation['iscrowd']!r}")
    return {"bbox": tight, "segmentation": rle, "category_id": category_id, "iscrowd": int(annotation["iscrowd"])}


def _xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= _MAX_NUMBER


def checked_rle(segmentation: dict | list, height: int, width: int) -> tuple[dict, np.ndarray]:
    """Any COCO segmentation -> (compressed RLE, lengths of its runs), after checks that pycocotools does not make.

    The errors are those of :func:`decode_mask`.
    """
    if isinstance(segmentation, list) and segmentation:
        rle = _rle_of_polygons(segmentation, height, width)
    elif isinstance(segmentation, dict) and segmentation.get("counts"):
        rle = segmentation
    else:
        raise ValueError(f"it has no mask: segmentation is {str(segmentation)[:80]}")
    size = rle.get("size")
    if size != [height, width] and size != (height, width):
        raise FaultError(fault.SIZE, f"its mask has size {size}, expected that of its image, [{height}, {width}]")
    counts = rle["counts"]
    runs = np.asarray(counts) if isinstance(counts, list) else decode_runs(counts)
    # Runs that do not fill the image exactly make pycocotools write beyond its memory.
    pixels = height * width
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"its mask is corrupt: the runs do not fill the image of {height} x {width} pixels")
    if isinstance(counts, list):
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"]}, runs


def _rle_of_polygons(polygons: list, height: int, width: int) -> dict:
    for polygon in polygons:
        if not (
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_finite, polygon))
        ):
            raise ValueError(f"a polygon must be [x0, y0, x1, y1, x2, y2, ...], got {str(polygon)[:80]}")
        for values, side in ((polygon[0::2], width), (polygon[1::2], height)):
            if min(values) < -_EDGE_TOLERANCE or max(values) > side + _EDGE_TOLERANCE:
                raise ValueError(f"its polygon is outside its image of width {width} and height {height}")
    length = sum(np.abs(np.diff(np.reshape([*p, *p[:2]], (-1, 2)), axis=0)).max(axis=1).sum() for p in polygons)
    if length > _MAX_OUTLINE:
        raise ValueError(f"its polygon is {length:.0f} pixels long, more than the limit of {_MAX_OUTLINE}")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))

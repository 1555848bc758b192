"""The cells of many images as the figures of evaluation need them: boxes as given, masks encoded, scores where known.

Ground truth comes from label images or a COCO dataset. Predictions come from either of them, from COCO results (a list
of detections), or from one COCO file an image. H, W: height and width in pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath

import numpy as np

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.io.coco import checked_rle, read_json
from kg_detectron.io.images import check_size
from kg_detectron.io.labels import read_label_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
LABEL_SUFFIXES = (".png", ".tif", ".tiff")  # JPEG does not keep numbers
LABELS_ENDING = "_labels"  # of the names of label images, before the suffix
COCO_ENDING = "_coco.json"  # of the names of COCO files of one image


@dataclass(frozen=True)
class ImageCells:
    """The cells of one image.

    Attributes:
        name: the image's file name with its folders, without its ending and without ``_labels``.
        image_id: what a COCO file calls the image; None for label images.
        size: (H,W).
        boxes: (R,4) xyxy, as the file gives them; of label images the pixels' extent, x2 the last pixel + 1.
        masks: R compressed run-length encodings.
        scores: (R,), or None where the file has none.
    """

    name: str
    image_id: int | None
    size: tuple[int, int]
    boxes: np.ndarray
    masks: list[dict]
    scores: np.ndarray | None


def read_cells(path: str | Path) -> list[ImageCells]:
    """Read the cells of many images.

    Args:
        path: a COCO dataset (JSON with images and annotations), or a folder. Of a folder, at any depth, the first of
            these counts that there is: files ``NAME_coco.json``, COCO datasets of the image NAME; label images
            ``NAME_labels.tif`` or ``.png``; all TIFF and PNG files, label images.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file that is corrupt or not what it should be, which the message names, and the annotation.
    """
    path = Path(path)
    if not path.is_dir():
        return _dataset_cells(path)
    files = [file for file in sorted(path.rglob("*")) if not file.name.startswith(".")]
    datasets = [file for file in files if file.name.endswith(COCO_ENDING)]
    if datasets:
        return [_only_image(file, str(file.relative_to(path)).removesuffix(COCO_ENDING)) for file in datasets]
    images = [file for file in files if file.suffix.lower() in LABEL_SUFFIXES]
    images = [file for file in images if file.stem.endswith(LABELS_ENDING)] or images
    if not images:
        raise FileNotFoundError(f"{path}: there is neither a label image (PNG, TIFF) nor a file *{COCO_ENDING} in it")
    return [_label_cells(file, image_name(file.relative_to(path))) for file in images]


def read_predictions(path: str | Path, ground_truth: Sequence[ImageCells]) -> list[ImageCells | None]:
    """Read what was predicted for every image of the ground truth; None where there is nothing of an image.

    Args:
        path: what `read_cells` reads, whose images are found by their names, without folders unless two images are
            called the same; or COCO results, a JSON list of dicts ``image_id``, ``bbox``, ``segmentation`` and
            ``score``, whose images are found by their ids.

    Raises:
        FileNotFoundError, ValueError: as in `read_cells`; an image that the ground truth does not have, two images of
            one name, an image of another size than its ground truth.
    """
    path = Path(path)
    data = None if path.is_dir() else read_json(path, dict, list)
    if isinstance(data, list):
        found = _result_cells(path, data, ground_truth)
        return [found.get(image.image_id) for image in ground_truth]
    predictions = read_cells(path)
    bare = all(_is_unique([PurePosixPath(image.name).name for image in one]) for one in (predictions, ground_truth))
    known = _by_name(ground_truth, "the ground truth", bare)
    by_name = _by_name(predictions, path, bare)
    unknown = sorted(by_name.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{path}: the ground truth has no image called {', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}"
        )
    for name, image in by_name.items():
        if image.size != known[name].size:
            raise ValueError(f"{path}: {name} has {image.size} pixels (height, width), its truth {known[name].size}")
    return [by_name.get(name) for name in known]


def image_name(file: str | PurePath) -> str:
    """What an image and its label image have in common: "dir/a" for dir/a.png and dir/a_labels.tif."""
    return PurePath(file).with_suffix("").as_posix().removesuffix(LABELS_ENDING)


def _label_cells(file: Path, name: str) -> ImageCells:
    crops = MaskCrops.from_label_image(read_label_image(file))
    boxes = crops.windows.numpy().astype(np.float64)
    return ImageCells(name, None, crops.size, boxes, crops.rle(), None)


def _only_image(file: Path, name: str) -> ImageCells:
    images = _dataset_cells(file)
    if len(images) != 1:
        raise ValueError(f"{file}: expected a COCO dataset of one image, got {len(images)}")
    return replace(images[0], name=PurePath(name).as_posix())


def _dataset_cells(file: Path) -> list[ImageCells]:
    data = read_json(file, dict)
    images = data.get("images")
    annotations = data.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(f"{file}: expected a COCO dataset with lists of images and annotations")
    own: dict[int, list[tuple[str, dict]]] = {}
    for index, image in enumerate(images):
        if not isinstance(image, dict) or not {"id", "file_name", "height", "width"} <= image.keys():
            raise ValueError(
                f"{file}: images[{index}]: expected id, file_name, height and width, got {str(image)[:80]}"
            )
        if not isinstance(image["id"], int | str):
            raise ValueError(f"{file}: images[{index}]: expected a number as id, got {str(image['id'])[:80]}")
        try:
            check_size(image["height"], image["width"])
            image_name(str(image["file_name"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: images[{index}]: {error}") from None
        if image["id"] in own:
            raise ValueError(f"{file}: images[{index}]: duplicate id {image['id']}")
        own[image["id"]] = []
    for where, annotation in _numbered("annotations", annotations, file):
        if not _has(own, annotation.get("image_id")):
            raise ValueError(f"{file}: {where}: unknown image_id {annotation.get('image_id')!r}")
        if annotation.get("iscrowd"):
            raise ValueError(f"{file}: {where} is a crowd; the figures need one annotation a cell")
        own[annotation["image_id"]].append((where, annotation))
    return [
        _image_cells(
            file, image_name(str(image["file_name"])), image["id"], (image["height"], image["width"]), own[image["id"]]
        )
        for image in images
    ]


def _result_cells(file: Path, results: list, ground_truth: Sequence[ImageCells]) -> dict[int, ImageCells]:
    """COCO results by image id."""
    images = {image.image_id: image for image in ground_truth if image.image_id is not None}
    if not images:
        raise ValueError(f"{file}: results name images by their ids in a COCO dataset, but the ground truth is none")
    own: dict[int, list[tuple[str, dict]]] = {}
    for where, result in _numbered("results", results, file):
        if not _has(images, result.get("image_id")):
            raise ValueError(f"{file}: {where}: the ground truth has no image of id {result.get('image_id')!r}")
        own.setdefault(result["image_id"], []).append((where, result))
    return {id: _image_cells(file, images[id].name, id, images[id].size, entries) for id, entries in own.items()}


def _numbered(key: str, entries: list, file: Path) -> Iterable[tuple[str, dict]]:
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: {key}[{index}]: expected an object, got {str(entry)[:80]}")
        yield f"{key}[{index}]", entry


def _image_cells(
    file: Path, name: str, image_id: int, size: tuple[int, int], entries: Sequence[tuple[str, dict]]
) -> ImageCells:
    """Of the annotations or results of one image, each with what messages call it."""
    boxes, masks, scores = np.zeros((len(entries), 4)), [], []
    for row, (where, entry) in enumerate(entries):
        try:
            x, y, width, height = _numbers(entry, "bbox", 4)
            if width < 0 or height < 0:
                raise ValueError(f"bbox must be [x, y, width, height], got {entry['bbox']}")
            boxes[row] = x, y, x + width, y + height
            masks.append(checked_rle(entry.get("segmentation"), *size)[0])
            if entry.get("score") is not None:
                scores += _numbers({"score": [entry["score"]]}, "score", 1)
        except ValueError as error:
            raise ValueError(f"{file}: {where}: {error}") from None
    if scores and len(scores) != len(entries):
        raise ValueError(f"{file}: {name}: {len(scores)} of {len(entries)} cells have a score, expected all or none")
    return ImageCells(name, image_id, size, boxes, masks, np.array(scores) if scores else None)


def _numbers(entry: dict, key: str, count: int) -> list[float]:
    try:
        values = [float(value) for value in entry[key]]
    except (KeyError, TypeError, ValueError, OverflowError):
        values = []
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{key} must be {count} finite numbers, got {entry.get(key)!r}")
    return values


def _has(images: dict, id: object) -> bool:
    return isinstance(id, int | str) and id in images


def _is_unique(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _by_name(images: Sequence[ImageCells], where: object, bare: bool) -> dict[str, ImageCells]:
    """In the same order, by their names, without folders where `bare`."""
    names = [PurePosixPath(image.name).name if bare else image.name for image in images]
    if not _is_unique(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: two images are called {double}, so that they cannot be told apart by name")
    return dict(zip(names, images, strict=True))

"""The cells of many images as the figures of evaluation need them: boxes as given, masks encoded, scores where known.

Ground truth comes from label images or a COCO dataset. Predictions come from either of them, from COCO results (a list
of detections), or from one COCO file an image. H, W: height and width in pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.cells.run_lengths import RLE
from kg_detectron.cells.separation import connected_pieces
from kg_detectron.io.class_tables import read_class_table
from kg_detectron.io.coco import instance, read_coco, read_json
from kg_detectron.io.labels import LABEL_SUFFIXES, read_label_image

LABELS_ENDING = "_labels"  # of the names of label images, before the suffix
COCO_ENDING = "_coco.json"  # of the names of COCO files of one image
CLASSES_ENDING = "_classes.csv"  # of the names of the tables with the classes of a label image
_NAMED = 5  # images that a message names
_PIECE = 0.05  # of the area of the largest piece, from which another counts as a cell of a foreground mask


@dataclass(frozen=True)
class ImageCells:
    """The cells of one image.

    Attributes:
        name: the image's file name with its folders, without its ending and without ``_labels``.
        image_id: what a COCO file calls the image; None for label images.
        size: (H, W).
        boxes: (R, 4) xyxy, as the file gives them; of label images the pixels' extent, x2 the last pixel + 1.
        masks: R compressed run-length encodings.
        scores: (R,), or None where the file has none.
        classes: the name of the class of each, "" where it is not known; None where the file has no classes.
        categories: the name of each ``category_id`` of a COCO file.
    """

    name: str
    image_id: int | str | None
    size: tuple[int, int]
    boxes: NDArray[np.float64]
    masks: list[RLE]
    scores: NDArray[np.float64] | None
    classes: tuple[str, ...] | None = None
    categories: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_labels(cls, labels: np.ndarray, name: str = "") -> "ImageCells":
        """The cells of a label image (H, W) of whole numbers, 0 background.

        Raises:
            ValueError: another shape or type, or a foreground mask: one number for all cells.

        Example:
            >>> len(ImageCells.from_labels(np.array([[0, 7, 7], [3, 0, 0]])).masks)
            2
        """
        crops = MaskCrops.from_label_image(labels)
        refuse_foreground_mask(labels, len(crops))
        return cls(name, None, crops.size, crops.windows.numpy().astype(np.float64), crops.rle(), None)


class Pairing(NamedTuple):
    """Images of the ground truth and what was predicted for each, or None; and the images that are in neither list.

    ``only_predicted`` and ``only_truth`` are names, which are left out where an evaluation is restricted to the images
    that both have.
    """

    truths: list[ImageCells]
    predictions: list[ImageCells | None]
    only_truth: list[str]
    only_predicted: list[str]


def read_cells(path: str | Path) -> list[ImageCells]:
    """Read the cells of many images.

    Args:
        path: a COCO dataset (JSON with images and annotations), or a folder. Of a folder, at any depth, the first of
            these counts that there is: files ``NAME_coco.json``, COCO datasets of the image NAME; label images
            ``NAME_labels.tif`` or ``.png``; all TIFF and PNG files, label images. Beside a label image the table
            ``NAME_classes.csv`` tells the class of each number, see `ClassTables`.

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
            called the same; or COCO results, a JSON list of dicts ``image_id``, ``segmentation``, ``score`` and, if it
            is not the mask's, ``bbox``, whose images are found by their ids.

    Raises:
        FileNotFoundError, ValueError: as in `read_cells`; an image that the ground truth does not have, two images of
            one name, an image of another size than its ground truth.
    """
    return pair_predictions(path, ground_truth).predictions


class UnknownImagesError(ValueError):
    """Predictions of images that the ground truth does not have."""


def pair_predictions(path: str | Path, ground_truth: Sequence[ImageCells], *, only_common: bool = False) -> Pairing:
    """`read_predictions` with its ground truth.

    Args:
        only_common: leave out images that are in the ground truth or in the predictions only, instead of counting the
            ones as without detections and refusing the others.

    Raises:
        UnknownImagesError: the others, refused.
    """
    path = Path(path)
    data = None if path.is_dir() else read_json(path, dict, list)
    if isinstance(data, list):
        by_id, unknown = _result_cells(path, data, ground_truth)
        predictions = [by_id.get(image.image_id) for image in ground_truth]
        kind = "id"
    else:
        images = read_cells(path)
        bare = all(_is_unique([PurePosixPath(image.name).name for image in one]) for one in (images, ground_truth))
        known = _by_name(ground_truth, "the ground truth", bare)
        by_name = _by_name(images, path, bare)
        unknown = sorted(by_name.keys() - known.keys())
        predictions = [by_name.get(name) for name in known]
        kind = "name"
    if unknown and not only_common:
        names = ", ".join(unknown[:_NAMED]) + (", ..." if unknown[_NAMED:] else "")
        raise UnknownImagesError(f"{path}: the ground truth lacks {len(unknown)} of its images, by {kind}: {names}")
    for truth, image in zip(ground_truth, predictions, strict=True):
        if image is not None and image.size != truth.size:
            raise ValueError(f"{path}: {truth.name} has {image.size} pixels (height, width), its truth {truth.size}")
    missing = [truth.name for truth, image in zip(ground_truth, predictions, strict=True) if image is None]
    if not only_common:
        return Pairing(list(ground_truth), predictions, missing, unknown)
    pairs = [pair for pair in zip(ground_truth, predictions, strict=True) if pair[1] is not None]
    if not pairs:
        raise ValueError(f"{path}: none of its images is in the ground truth, by {kind}")
    return Pairing([truth for truth, _ in pairs], [image for _, image in pairs], missing, unknown)


def image_name(file: str | PurePath) -> str:
    """What an image and its label image have in common: "dir/a" for dir/a.png and dir/a_labels.tif."""
    return PurePath(file).with_suffix("").as_posix().removesuffix(LABELS_ENDING)


def refuse_foreground_mask(labels: np.ndarray, count: int) -> None:
    """Refuse, by a ValueError, a label image (H, W) of `count` numbers whose only number stands for several cells.

    A cell may come with specks: a piece counts as a cell from 5 % of the area of the largest one.
    """
    if count != 1:
        return
    _, _, areas = connected_pieces(labels > 0)
    pieces = int((areas >= _PIECE * areas.max()).sum())
    if pieces > 1:
        raise ForegroundMaskError(int(labels.max()), pieces)


class ForegroundMaskError(ValueError):
    """A foreground mask where a label image was expected."""

    def __init__(self, number: int, pieces: int) -> None:
        super().__init__(
            f"its only label, {number}, has {pieces} pieces: a foreground mask; every cell needs a number of its own"
        )


def _label_cells(file: Path, name: str) -> ImageCells:
    labels = read_label_image(file)
    try:
        cells = ImageCells.from_labels(labels, name)
    except ForegroundMaskError as error:
        raise ValueError(f"{file}: {error}") from None
    table = file.with_name(file.stem.removesuffix(LABELS_ENDING) + CLASSES_ENDING)
    if not table.is_file():
        return cells
    classes = read_class_table(table)
    return replace(cells, classes=tuple(classes.get(int(number), "") for number in np.unique(labels[labels > 0])))


def _only_image(file: Path, name: str) -> ImageCells:
    images = _dataset_cells(file)
    if len(images) != 1:
        raise ValueError(f"{file}: expected a COCO dataset of one image, got {len(images)}")
    return replace(images[0], name=PurePath(name).as_posix())


def _dataset_cells(file: Path) -> list[ImageCells]:
    dataset, faults = read_coco(file, None, for_evaluation=True)
    if faults:
        raise ValueError(f"{file}: {faults[0]}")
    for record in dataset.records:
        crowd = next((cell for cell in record["annotations"] if cell["iscrowd"]), None)
        if crowd is not None:
            raise ValueError(
                f"{file}: annotation {crowd['id']} is a crowd; the figures need one annotation a cell "
                "(kg-detectron convert --crowds cells takes every crowd as one cell)"
            )
    categories = dict(zip(dataset.category_ids, dataset.category_names, strict=True))
    return [
        _image_cells(
            file,
            image_name(PureWindowsPath(record["file_name"]).as_posix()),
            record["image_id"],
            (record["height"], record["width"]),
            record["annotations"],
            categories,
        )
        for record in dataset.records
    ]


def _result_cells(
    file: Path, results: list, ground_truth: Sequence[ImageCells]
) -> tuple[dict[int | str | None, ImageCells], list[str]]:
    """COCO results by image id, and the ids that the ground truth does not have."""
    images = {image.image_id: image for image in ground_truth if image.image_id is not None}
    if not images:
        raise ValueError(f"{file}: results name images by their ids in a COCO dataset, but the ground truth is none")
    cells: dict[int | str, list[dict[str, Any]]] = {}
    unknown: dict[str, None] = {}
    for index, result in enumerate(results):
        where = f"{file}: results[{index}]"
        if not isinstance(result, dict):
            raise ValueError(f"{where}: expected an object, got {str(result)[:80]}")
        id = result.get("image_id")
        if not isinstance(id, (int, str)) or id not in images:
            unknown[str(id)] = None
            continue
        try:
            cell = instance(result, *images[id].size, for_evaluation=True)
            cells.setdefault(id, []).append(cell | {"category_id": result.get("category_id")})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    by_id: dict[int | str | None, ImageCells] = {}
    for id, entries in cells.items():
        by_id[id] = _image_cells(file, images[id].name, id, images[id].size, entries, images[id].categories)
    return by_id, list(unknown)


def _image_cells(
    file: Path,
    name: str,
    image_id: int | str | None,
    size: tuple[int, int],
    cells: Sequence[dict[str, Any]],
    categories: Mapping[int, str],
) -> ImageCells:
    """The checked cells of one image, as `instance` gives them for an evaluation."""
    scores = [cell["score"] for cell in cells if cell["score"] is not None]
    if scores and len(scores) != len(cells):
        raise ValueError(f"{file}: {name}: {len(scores)} of {len(cells)} cells have a score, expected all or none")
    boxes = np.array([cell["given_box"] for cell in cells], dtype=np.float64).reshape(-1, 4)
    masks = [cell["segmentation"] for cell in cells]
    ids = [cell["category_id"] for cell in cells]
    classes = tuple(categories.get(id, "") if isinstance(id, int) else "" for id in ids) if categories else None
    ranking = np.array(scores, np.float64) if scores else None
    return ImageCells(name, image_id, size, boxes, masks, ranking, classes, categories)


def _is_unique(names: Iterable[str]) -> bool:
    names = list(names)
    return len(set(names)) == len(names)


def _by_name(images: Sequence[ImageCells], where: object, bare: bool) -> dict[str, ImageCells]:
    """In the same order, by their names, without folders where `bare`."""
    names = [PurePosixPath(image.name).name if bare else image.name for image in images]
    if not _is_unique(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: two images are called {double}, so that they cannot be told apart by name")
    return dict(zip(names, images, strict=True))

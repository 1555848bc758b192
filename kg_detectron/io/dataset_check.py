"""Finding all that is wrong with a dataset, before it is trained on. H, W: height and width in pixels."""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from PIL import ExifTags, Image
from tqdm import tqdm

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.cells.separation import connected_pieces, pieces_of_labels
from kg_detectron.io import fault
from kg_detectron.io.cell_files import read_cell_mask
from kg_detectron.io.cell_sets import ForegroundMaskError, refuse_foreground_mask
from kg_detectron.io.checksum import array_sha256
from kg_detectron.io.coco import CocoDataset, read_coco
from kg_detectron.io.fault import Fault, Severity
from kg_detectron.io.finding import Pair
from kg_detectron.io.images import ImageChoiceError, no_limit_of_pillow, read_image, read_pages
from kg_detectron.io.labels import read_label_image
from kg_detectron.io.layouts import find_training_pairs
from kg_detectron.io.normalisation import Normalisation, has_finite_value

_CORNERS_JOIN = np.ones((3, 3), bool)
_NAMED = 5  # labels or files that a message names
_FEW_CELLS = 10  # annotations that a category should have
_PICTURE = 4  # pixels: the mean area of the pieces of a label image is larger, that of a picture's levels smaller


@dataclass(frozen=True)
class Choice:
    """What of an image file is the image, and what of a label image the background.

    Attributes:
        axes, channels, scene: as `read_pages` takes them, for files that hold more than one image.
        background: the number that stands for the background in label images, beside 0.
    """

    axes: str | None = None
    channels: Sequence[int] | None = None
    scene: int | None = None
    background: int = 0

    @property
    def planes(self) -> dict[str, Any]:
        """What `read_pages` is to be given."""
        given = {"axes": self.axes, "channels": self.channels, "scene": self.scene}
        return {name: value for name, value in given.items() if value is not None}

    def read_image(self, path: Path) -> np.ndarray:
        """The image (H, W, 3), with the errors of `read_pages`."""
        if not self.planes:
            return read_image(path)
        pages = read_pages(path, **self.planes)
        if len(pages) != 1:
            raise ValueError(f"{path}: it has {len(pages)} pages, expected one image")
        return np.ascontiguousarray(pages[0])

    def read_labels(self, path: Path) -> np.ndarray:
        """The label image (H, W), with the errors of `read_label_image`."""
        labels = read_label_image(path)
        return np.where(labels == self.background, 0, labels) if self.background else labels


@dataclass(frozen=True)
class PairContent:
    """What is in the files of a pair.

    Attributes:
        image: (H, W, 3), or None where it cannot be read.
        cells: the masks, in the order of their labels or files.
        faults: all that is wrong. Masks that cannot be read, are empty or of another size are not among the cells.
        is_swapped: the image looks like a label image, and the label image does not.
        numbers: of the cells in their label images, in the same order; none of files of one cell each.
    """

    image: np.ndarray | None
    cells: list[MaskCrops]
    faults: list[Fault]
    is_swapped: bool
    numbers: tuple[int, ...] = ()


def check_masks(
    images: str | Path,
    masks: str | Path | None,
    layout: str | None = None,
    *,
    choice: Choice | None = None,
    normalisation: Normalisation | None = None,
) -> tuple[list[Fault], int]:
    """Find all that is wrong with images and their masks.

    That is: a file without partner, one that cannot be read, another size than the image's, nothing in it, a label or
    cell in several pieces, a foreground mask or a picture in place of a label image, a background that is not 0, files
    of cells that are inverted, soft-edged or pictures, images without a finite value, images whose levels the
    normalisation cannot take, images that are turned by their metadata, one image or one cell twice, images and masks
    swapped.

    Args:
        images, masks, layout: as `find_training_pairs` takes them.
        choice: what of the files to read; by default files hold one image, and 0 is the background.
        normalisation: of the training that is planned; by default "fixed", and what it cannot take is harmless.
    Returns:
        The faults, and the number of pairs that were looked at.
    Raises:
        FileNotFoundError, ValueError: as `find_pairs` does.
    """
    choice = choice or Choice()
    pairs, faults, layout = find_training_pairs(images, masks, layout)
    seen: dict[str, Path] = {}
    swapped = 0
    for pair in tqdm(pairs, desc="checking", unit="image", disable=None, leave=False):
        content = read_pair(pair, layout, choice)
        swapped += content.is_swapped
        faults += content.faults
        if content.image is not None:
            faults += image_faults(pair.image, content.image, seen, normalisation)
    return swapped_faults(images, images if masks is None else masks, len(pairs), swapped) + faults, len(pairs)


def check_coco(
    json_file: str | Path,
    image_root: str | Path | None = None,
    *,
    choice: Choice | None = None,
    normalisation: Normalisation | None = None,
) -> tuple[list[Fault], int]:
    """Find all that is wrong with a COCO dataset.

    That is: what `load_coco` refuses, crowd annotations, several categories or unused ones, annotation id 0, and an
    image that cannot be read, has another size than the file says, has no cell or comes twice, has no finite value,
    has levels that the normalisation cannot take or is turned by its metadata, a cell in several pieces, or twice.

    Args:
        json_file: the annotations.
        image_root: the folder that the images' file names start from; by default that of the JSON file.
        choice, normalisation: as for `check_masks`.
    Returns:
        The faults, and the number of images that were looked at.
    Raises:
        FileNotFoundError: the JSON file is missing.
        ValueError: corrupt JSON, or no JSON object.
    """
    dataset, faults = read_coco(json_file, Path(json_file).parent if image_root is None else image_root)
    faults = faults + dataset_faults(dataset, json_file)
    missing = {one.where for one in faults if one.kind == fault.MISSING_IMAGE}
    seen: dict[str, Path] = {}
    for record in tqdm(dataset.records, desc="checking", unit="image", disable=None, leave=False):
        if record["file_name"] not in missing:
            image, more = read_recorded_image(record, choice or Choice())
            faults += more
            if image is not None:
                faults += image_faults(Path(record["file_name"]), image, seen, normalisation)
        faults += cell_faults(record)
    return faults, len(dataset.records)


# Images and masks


def read_pair(pair: Pair, layout: str, choice: Choice) -> PairContent:
    """Read an image and its masks, with all that is wrong with the two of them; `layout` as `find_pairs` returns it."""
    faults: list[Fault] = []
    image = None
    try:
        image = choice.read_image(pair.image)
    except (ValueError, OSError) as error:
        faults.append(_unreadable(pair.image, error))
    cells: list[MaskCrops] = []
    is_swapped = False
    numbers: list[int] = []
    if layout == "labels":
        for file in pair.masks:
            more = _label_image_cells(file, image, choice, cells, numbers)
            faults += more
            is_swapped = any(one.kind in (fault.NO_LABELS, fault.UNREADABLE) for one in more) and _may_be_labels(image)
    else:
        encoded: dict[str, Path] = {}
        for file in pair.masks:
            faults += _cell_file_cells(file, image, cells, encoded)
    return PairContent(image, cells, faults, is_swapped, tuple(numbers))


def swapped_faults(images: str | Path, masks: str | Path, pairs: int, swapped: int) -> list[Fault]:
    """The fault of two folders given in the wrong order, where most pairs look so, or none is found but the other way.

    Args:
        pairs: images with masks.
        swapped: of them, those that look swapped.
    """
    if not pairs and Path(images).resolve() != Path(masks).resolve():
        try:
            swapped = len(find_training_pairs(masks, images)[0])
        except (OSError, ValueError):
            return []
    if 2 * swapped <= pairs:
        return []
    text = f"the files of {images} look like masks, those of {masks} like images: they seem to be swapped"
    return [Fault(fault.SWAPPED, "", text, "name the folder of the images first")]


def image_faults(
    file: Path, image: np.ndarray, seen: dict[str, Path], normalisation: Normalisation | None
) -> Iterator[Fault]:
    """What is wrong with an image (H, W, 3) by itself; `seen` are the files of the images so far, by their digests."""
    if not has_finite_value(image):
        yield Fault(fault.NO_VALUE, str(file), "it has no finite value")
        return
    other = seen.setdefault(array_sha256(image), file)
    if other != file:
        yield Fault(fault.DUPLICATE_IMAGE, str(file), f"it is the same image as {other}")
    orientation = _orientation(file)
    if orientation != 1:
        text = f"its metadata (EXIF, TIFF) say orientation {orientation}; it is read turned upright, as viewers show it"
        yield Fault(fault.ORIENTATION, str(file), text, "masks must be drawn on the upright image")
    try:
        (normalisation or Normalisation("fixed")).levels(image)
    except ValueError as error:
        reason = str(error).split(": a model of")[0].split(", expected 0..1")[0]
        text = f"{reason}; INPUT.NORMALISATION fixed cannot take it"
        severity = Severity.HARMLESS if normalisation is None else Severity.FATAL
        yield Fault(fault.LEVELS, str(file), text, "train with INPUT.NORMALISATION percentile", severity)


def _label_image_cells(
    file: Path, image: np.ndarray | None, choice: Choice, cells: list[MaskCrops], numbers_of_cells: list[int]
) -> list[Fault]:
    """The cells of a label image are added to `cells`, and their numbers; the result is what is wrong with it."""
    try:
        labels = choice.read_labels(file)
    except (ValueError, OSError) as error:
        return [_unreadable(file, error)]
    if image is not None and labels.shape != image.shape[:2]:
        return [_size_fault(file, labels.shape, image.shape[:2])]
    numbers, pieces = pieces_of_labels(labels)
    if not len(numbers):
        return [Fault(fault.NO_CELL, str(file), "there is no cell in it")]
    if _is_picture(labels, numbers, pieces):
        text = f"expected a number for every cell, got {len(numbers)} numbers in {pieces.sum()} pieces: a picture"
        return [Fault(fault.NO_LABELS, str(file), text)]
    background = _background_fault(file, labels, numbers)
    faults = [background] if background else []
    if background is not None and background.severity == Severity.FATAL:
        return faults
    if background is not None and background.kind == fault.BACKGROUND:
        labels = np.where(labels == _largest_label(labels), 0, labels)
        numbers, pieces = pieces_of_labels(labels)
        if not len(numbers):
            return [*faults, Fault(fault.NO_CELL, str(file), "there is no cell in it")]
    crops = MaskCrops.from_label_image(labels)
    cells.append(crops)
    numbers_of_cells += numbers.tolist()
    try:
        refuse_foreground_mask(labels, len(numbers))
    except ForegroundMaskError as error:
        return [*faults, Fault(fault.BINARY, str(file), str(error), "Fiji's Analyze Particles numbers them")]
    for kind, text in ((fault.SPLIT, "labels in several pieces"), (fault.CORNERS, "labels that only corners join")):
        chosen = [
            i
            for i in np.flatnonzero(pieces > 1)
            if (scipy.ndimage.label(crops.crops[i].numpy(), _CORNERS_JOIN)[1] > 1) == (kind == fault.SPLIT)
        ]
        if chosen:
            named = ", ".join(f"{numbers[i]} ({pieces[i]} pieces)" for i in chosen[:_NAMED])
            more = f" and {len(chosen) - _NAMED} more" if len(chosen) > _NAMED else ""
            faults.append(Fault(kind, str(file), f"{text}: {named}{more}"))
    return faults


def _is_picture(labels: np.ndarray, numbers: np.ndarray, pieces: np.ndarray) -> bool:
    """Whether the levels of an image (H, W) are those of a picture: far more pieces than numbers, or tiny pieces."""
    inside = int(np.count_nonzero(labels))
    total = int(pieces.sum())
    many = total > 20 * len(numbers) and len(numbers) > 8
    tiny = total * _PICTURE > inside > 0.3 * labels.size and len(numbers) > 8
    return many or tiny


def _may_be_labels(image: np.ndarray | None) -> bool:
    """Whether an image (H, W, 3) could be a label image or a foreground mask."""
    if image is None or image.dtype.kind not in "iu" or (image != image[..., :1]).any():
        return False
    labels = image[..., 0]
    if labels.min() != 0 or labels.max() == 0:
        return False
    numbers, pieces = pieces_of_labels(labels)
    return not _is_picture(labels, numbers, pieces) and np.count_nonzero(labels) > 8 * pieces.sum()


def _background_fault(file: Path, labels: np.ndarray, numbers: np.ndarray) -> Fault | None:
    """A label image (H, W) whose background is not 0. Harmless where there is no doubt of it: `convert` mends it."""
    largest = _largest_label(labels)
    share = np.count_nonzero(labels == largest) / labels.size
    corners = int((labels[[0, 0, -1, -1], [0, -1, 0, -1]] == largest).sum())
    full = bool(labels.min() > 0)
    if largest and (share > 0.2 and corners >= 3 or share > 0.5 and full):
        start = "no pixel is 0; " if full else ""
        where = "all corners" if corners == 4 else f"{corners} corners"
        text = f"{start}label {largest} covers {share:.0%} of the image and {where}: the background must be 0"
        if full and corners == 4 and len(numbers) > 1:
            remedy = f"kg-detectron convert takes label {largest} as background"
            return Fault(fault.BACKGROUND, str(file), text, remedy, Severity.HARMLESS)
        remedy = f"kg-detectron convert --background {largest} takes it as background"
        return Fault(fault.BACKGROUND, str(file), text, remedy)
    if full:
        return Fault(fault.FULL, str(file), f"no pixel is 0: its {len(numbers)} labels leave no background")
    return None


def _largest_label(labels: np.ndarray) -> int:
    """The number of a label image (H, W) that has the most pixels, 0 included."""
    values, areas = np.unique(labels, return_counts=True)
    return int(values[areas.argmax()])


def _cell_file_cells(
    file: Path, image: np.ndarray | None, cells: list[MaskCrops], encoded: dict[str, Path]
) -> list[Fault]:
    """The cell of a file of one cell is added to `cells`; the result is what is wrong with it.

    ``encoded`` are the files of the cells before it, by their run lengths.
    """
    try:
        mask, wrong = read_cell_mask(file)
    except (ValueError, OSError) as error:
        return [_unreadable(file, error)]
    if image is not None and mask.shape != image.shape[:2]:
        return [_size_fault(file, mask.shape, image.shape[:2])]
    faults = []
    if wrong is not None:
        remedy = "invert its levels" if wrong[0] == fault.INVERTED else ""
        faults.append(Fault(wrong[0], str(file), wrong[1], remedy))
        if faults[0].severity == Severity.FATAL or wrong[0] == fault.NO_CELL:
            return faults
    crops = MaskCrops.from_label_image(mask.astype(np.uint8))
    pieces = _piece_fault(str(file), "the cell", crops.crops[0].numpy())
    if pieces is not None:
        faults.append(pieces)
    other = encoded.setdefault(crops.rle()[0]["counts"], file)
    if other is not file:
        faults.append(Fault(fault.DUPLICATE_CELL, str(file), f"{other.name} holds the same cell"))
    cells.append(crops)
    return faults


# COCO datasets


def dataset_faults(dataset: CocoDataset, json_file: str | Path) -> list[Fault]:
    """What is wrong with a dataset as a whole: crowds, categories, annotation id 0. ``json_file`` names it."""
    where, faults = str(json_file), []
    cells = [cell for record in dataset.records for cell in record["annotations"]]
    crowds = sum(cell["iscrowd"] for cell in cells)
    if crowds:
        text = f"{crowds} of {len(cells)} annotations are crowds, which training leaves out; CVAT writes brush masks so"
        remedy = "kg-detectron convert --crowds cells takes every one as a cell, --crowds leave-out none"
        faults.append(Fault(fault.CROWD, where, text, remedy))
    counts = Counter(cell["category_id"] for cell in cells)
    unstated = counts.pop(None, 0)
    if len(counts) > 1:
        named = ", ".join(f"{dataset.category_names[index]} ({counts[index]})" for index in sorted(counts))
        text = f"its annotations are of {len(counts)} categories, {named}, which a model learns to tell apart"
        rare = [dataset.category_names[index] for index in sorted(counts) if counts[index] < _FEW_CELLS]
        if rare:
            text += f"; of {', '.join(rare[:_NAMED])} there are too few to learn or to measure, below {_FEW_CELLS}"
        severity = Severity.HARMLESS if rare else Severity.NOTE
        remedy = "kg-detectron convert --merge-categories makes them one"
        faults.append(Fault(fault.CATEGORIES, where, text, remedy, severity))
    if unstated and len(dataset.category_ids) > 1:
        text = (
            f"{unstated} of {len(cells)} annotations have no category: a training learns to find them, not their class"
        )
        faults.append(Fault(fault.NO_CATEGORY, where, text))
    unused = [name for index, name in enumerate(dataset.category_names) if index not in counts]
    if counts and unused:
        text = f"no annotation is of the category {', '.join(unused[:_NAMED])}, which no training can learn"
        faults.append(Fault(fault.UNUSED_CATEGORY, where, text, "kg-detectron convert leaves it out"))
    if any(cell["id"] == 0 for cell in cells):
        text = "an annotation has the id 0, which COCO's evaluation takes for a missed cell"
        faults.append(Fault(fault.ID_ZERO, where, text, "kg-detectron convert numbers them from 1"))
    return faults


def read_recorded_image(record: dict, choice: Choice) -> tuple[np.ndarray | None, list[Fault]]:
    """The image (H, W, 3) of one of Detectron2's dataset dicts, or None, and what is wrong with the file."""
    file = Path(record["file_name"])
    try:
        image = choice.read_image(file)
    except (ValueError, OSError) as error:
        return None, [_unreadable(file, error)]
    size = record["height"], record["width"]
    if image.shape[:2] == size:
        return image, []
    text = f"it has {image.shape[:2]} pixels (height, width), the JSON file says {size}"
    return image, [Fault(fault.SIZE, str(file), text)]


def cell_faults(record: dict) -> Iterator[Fault]:
    """What is wrong with the cells of one of Detectron2's dataset dicts, which are sound one by one."""
    file, annotations = record["file_name"], record["annotations"]
    if not annotations:
        yield Fault(fault.NO_CELL, file, "there is no sound cell in it")
    masks = [annotation["segmentation"] for annotation in annotations]
    crops = MaskCrops.from_rle(masks, (record["height"], record["width"])).crops
    seen = set()
    for annotation, mask, crop in zip(annotations, masks, crops, strict=True):
        x, y, width, height = annotation["bbox"]
        name = f"the cell at bbox [{x:g}, {y:g}, {width:g}, {height:g}]"
        pieces = _piece_fault(file, name, crop.numpy())
        if pieces is not None:
            yield pieces
        if mask["counts"] in seen:
            yield Fault(fault.DUPLICATE_CELL, file, f"{name} comes twice")
        seen.add(mask["counts"])


def _piece_fault(where: str, name: str, mask: np.ndarray) -> Fault | None:
    """A cell (h, w) that is in several pieces."""
    count = connected_pieces(mask)[0]
    if count < 2:
        return None
    if scipy.ndimage.label(mask, _CORNERS_JOIN)[1] == 1:
        return Fault(fault.CORNERS, where, f"{name} is in {count} pieces that only corners join")
    return Fault(fault.SPLIT, where, f"{name} is in {count} pieces")


def _size_fault(file: Path, size: tuple[int, ...], expected: tuple[int, ...]) -> Fault:
    return Fault(fault.SIZE, str(file), f"it has {size} pixels (height, width), its image {expected}")


def _unreadable(file: Path, error: Exception) -> Fault:
    text = str(error).removeprefix(f"{file}: ")  # the name stands before the text already
    if isinstance(error, ImageChoiceError):
        return Fault(fault.CHANNELS, str(file), text, "kg-detectron convert with that option writes plain images")
    return Fault(fault.UNREADABLE, str(file), text)


def _orientation(file: Path) -> int:
    """The orientation that a file's metadata say, 1 (upright) where they say none."""
    try:
        with no_limit_of_pillow(), Image.open(file, formats=("PNG", "JPEG", "TIFF")) as picture:
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return 1
    return orientation if orientation in range(1, 9) else 1

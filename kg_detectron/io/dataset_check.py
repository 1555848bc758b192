"""Finding all that is wrong with a dataset, before it is trained on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.io import fault
from kg_detectron.io.coco import read_coco
from kg_detectron.io.fault import Fault
from kg_detectron.io.images import read_image
from kg_detectron.io.labels import read_label_image
from kg_detectron.io.pairs import Pair, find_pairs

_CORNERS_JOIN = np.ones((3, 3), bool)  # pixels that meet at a corner are one piece
_NAMED = 5  # labels that a message names


@dataclass(frozen=True)
class PairContent:
    """What is in the files of a pair.

    Attributes:
        size: (H,W) of the image, or None where it cannot be read.
        digest: of the image's pixels, equal for equal images whatever their files; None where it cannot be read.
        cells: the masks, in the order of their labels or files.
        faults: all that is wrong. Masks that cannot be read, are empty or of another size are not among the cells.
    """

    size: tuple[int, int] | None
    digest: str | None
    cells: list[MaskCrops]
    faults: list[Fault]


def check_masks(images: str | Path, masks: str | Path, layout: str | None = None) -> tuple[list[Fault], int]:
    """Find all that is wrong with images and their masks.

    That is: a file without partner, one that cannot be read, another size than the image's, nothing in it, a label or
    cell in several pieces, a binary mask in place of a label image, one image or one cell twice.

    Args:
        images, masks, layout: as `find_pairs` takes them.
    Returns:
        The faults, and the number of pairs that were looked at.
    Raises:
        FileNotFoundError, ValueError: as `find_pairs` does.
    """
    pairs, faults, layout = find_pairs(images, masks, layout)
    seen: dict[str, Path] = {}
    for pair in tqdm(pairs, desc="checking", unit="image", disable=None, leave=False):
        content = read_pair(pair, layout)
        faults += content.faults
        if content.digest is not None:
            faults += _seen_before(seen, content.digest, pair.image)
    return faults, len(pairs)


def check_coco(json_file: str | Path, image_root: str | Path | None = None) -> tuple[list[Fault], int]:
    """Find all that is wrong with a COCO dataset.

    That is: what `load_coco` refuses, and an image that cannot be read, has another size than the file says, has no
    cell or comes twice, a cell in several pieces, or twice.

    Args:
        json_file: the annotations.
        image_root: the folder that the images' file names start from; by default that of the JSON file.
    Returns:
        The faults, and the number of images that were looked at.
    Raises:
        FileNotFoundError: the JSON file is missing.
        ValueError: corrupt JSON, or no JSON object.
    """
    dataset, faults = read_coco(json_file, Path(json_file).parent if image_root is None else image_root)
    missing = {found.where for found in faults if found.kind == fault.MISSING_IMAGE}
    seen: dict[str, Path] = {}
    for record in tqdm(dataset.records, desc="checking", unit="image", disable=None, leave=False):
        if record["file_name"] not in missing:
            faults += _record_image_faults(record, seen)
        faults += _record_cell_faults(record)
    return faults, len(dataset.records)


def read_pair(pair: Pair, layout: str) -> PairContent:
    """Read an image and its masks, with all that is wrong with the two of them; `layout` as `find_pairs` returns it."""
    faults: list[Fault] = []
    image, cells = None, []
    try:
        image = read_image(pair.image)
    except (ValueError, OSError) as error:
        faults.append(_unreadable(pair.image, error))
    size = None if image is None else image.shape[:2]
    encoded: dict[bytes, Path] = {}
    for file in pair.masks:
        try:
            labels = read_label_image(file) if layout == "labels" else read_image(file).any(axis=2).astype(np.uint8)
        except (ValueError, OSError) as error:
            faults.append(_unreadable(file, error))
            continue
        if size is not None and labels.shape != size:
            faults.append(
                Fault(fault.SIZE, str(file), f"it has {labels.shape} pixels (height, width), its image {size}")
            )
            continue
        own = MaskCrops.from_label_image(labels)
        if not len(own):
            faults.append(Fault(fault.NO_CELL, str(file), "there is no cell in it"))
        elif layout == "labels":
            faults += _label_faults(file, labels, own)
            cells.append(own)
        else:
            if _pieces(own)[0] > 1:
                faults.append(Fault(fault.SPLIT, str(file), f"the cell is in {_pieces(own)[0]} pieces"))
            other = encoded.setdefault(own.rle()[0]["counts"], file)
            if other is not file:
                faults.append(Fault(fault.DUPLICATE_CELL, str(file), f"{other.name} holds the same cell"))
            cells.append(own)
    return PairContent(size, None if image is None else _digest(image), cells, faults)


def _label_faults(file: Path, labels: np.ndarray, cells: MaskCrops) -> Iterator[Fault]:
    pieces = _pieces(cells)
    split = [i for i, count in enumerate(pieces) if count > 1]
    if not split:
        return
    numbers = np.unique(labels[labels > 0])
    if len(numbers) == 1:
        text = f"its only label, {numbers[0]}, has {pieces[0]} pieces; every cell needs a number of its own"
        yield Fault(fault.BINARY, str(file), text)
        return
    named = ", ".join(f"{numbers[i]} ({pieces[i]} pieces)" for i in split[:_NAMED])
    more = f" and {len(split) - _NAMED} more" if len(split) > _NAMED else ""
    yield Fault(fault.SPLIT, str(file), f"labels in several pieces: {named}{more}")


def _record_image_faults(record: dict, seen: dict[str, Path]) -> Iterator[Fault]:
    file = Path(record["file_name"])
    try:
        image = read_image(file)
    except (ValueError, OSError) as error:
        yield _unreadable(file, error)
        return
    size = record["height"], record["width"]
    if image.shape[:2] != size:
        yield Fault(
            fault.SIZE, str(file), f"it has {image.shape[:2]} pixels (height, width), the JSON file says {size}"
        )
    yield from _seen_before(seen, _digest(image), file)


def _record_cell_faults(record: dict) -> Iterator[Fault]:
    file, annotations = record["file_name"], record["annotations"]
    if not annotations:
        yield Fault(fault.NO_CELL, file, "there is no sound cell in it")
    masks = [annotation["segmentation"] for annotation in annotations]
    size = record["height"], record["width"]
    for annotation, count in zip(annotations, _pieces(MaskCrops.from_rle(masks, size)), strict=True):
        if count > 1:
            yield Fault(fault.SPLIT, file, f"the cell at {_place(annotation)} is in {count} pieces")
    seen = set()
    for annotation, mask in zip(annotations, masks, strict=True):
        counts = mask["counts"] if isinstance(mask["counts"], bytes) else mask["counts"].encode()
        if counts in seen:
            yield Fault(fault.DUPLICATE_CELL, file, f"the cell at {_place(annotation)} comes twice")
        seen.add(counts)


def _place(annotation: dict) -> str:
    x, y, width, height = annotation["bbox"]
    return f"bbox [{x:g}, {y:g}, {width:g}, {height:g}]"


def _pieces(cells: MaskCrops) -> list[int]:
    """Connected pieces of every cell."""
    return [ndimage.label(crop.numpy(), _CORNERS_JOIN)[1] for crop in cells.crops]


def _unreadable(file: Path, error: Exception) -> Fault:
    # The name stands before the text already.
    return Fault(fault.UNREADABLE, str(file), str(error).removeprefix(f"{file}: "))


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(f"{image.dtype} {image.shape}".encode() + image.tobytes()).hexdigest()


def _seen_before(seen: dict[str, Path], digest: str, file: Path) -> Iterator[Fault]:
    other = seen.setdefault(digest, file)
    if other != file:
        yield Fault(fault.DUPLICATE_IMAGE, str(file), f"it is the same image as {other}")

"""Images and masks of common layouts, or a COCO JSON that needs mending -> COCO JSON, ready for training."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from tqdm import tqdm

from kg_detectron.io import fault
from kg_detectron.io.atomic import replacing
from kg_detectron.io.coco import CocoDataset, read_coco, rewrite
from kg_detectron.io.dataset_check import (
    Choice,
    cell_faults,
    dataset_faults,
    image_faults,
    read_pair,
    read_recorded_image,
    swapped_faults,
)
from kg_detectron.io.fault import Fault, fatal
from kg_detectron.io.images import read_image
from kg_detectron.io.layouts import find_training_pairs

CROWDS = ("refuse", "cells", "leave-out")
_NAMED = 3  # faults that the message names


class Conversion(NamedTuple):
    """The numbers of images and of cells that were written, and what is conspicuous (see `check_masks`)."""

    images: int
    cells: int
    faults: list[Fault]


def convert(
    images: str | Path,
    masks: str | Path | None,
    output: str | Path,
    *,
    layout: str | None = None,
    category: str = "cell",
    choice: Choice | None = None,
) -> Conversion:
    """Write images and masks as a COCO dataset with run-length encoded masks.

    The images stay where they are; the JSON file names them from its own folder, in which `images` must be, or a link
    to it. A training reads them as plain images: of files from which a plane, channels or a scene must be chosen, the
    choice is written as TIFF, of the same type and levels, into a folder beside the JSON file, ``NAME_images``.

    Args:
        images, masks, layout: as `find_training_pairs` takes them. An image whose label image is empty is kept, without
            cells.
        output: the JSON file; an existing one is replaced.
        category: name of the only category, of id 1.
        choice: what of the files to read.

    Raises:
        FileNotFoundError: as `find_pairs` does, or the folder of `output` is missing.
        ValueError: the same; `images` is not in the folder of `output`; any fatal fault, such as files without partner,
            unreadable, of another size than their image, foreground masks in place of label images, a background that
            is not 0, inverted cells. The message names the first of them.
    """
    choice = choice or Choice()
    output = Path(output)
    root = _checked_folder(output, images)
    pairs, faults, layout = find_training_pairs(images, masks, layout)
    records: list[dict] = []
    seen: dict[str, Path] = {}
    swapped = 0
    for image_id, pair in enumerate(tqdm(pairs, desc="converting", unit="image", disable=None, leave=False), start=1):
        content = read_pair(pair, layout, choice)
        swapped += content.is_swapped
        faults += content.faults
        if content.image is None:
            continue
        faults += image_faults(pair.image, content.image, seen, None)
        height, width = content.image.shape[:2]
        file_name = root / pair.image.relative_to(images)
        records.append(
            {
                "file_name": _plain_file(file_name, pair.name, content.image, choice, output, write=not fatal(faults)),
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": [
                    {"segmentation": rle, "category_id": 0, "iscrowd": 0}
                    for cells in content.cells
                    for rle in cells.rle()
                ],
            }
        )
    faults = swapped_faults(images, images if masks is None else masks, len(pairs), swapped) + faults
    _refuse(faults)
    dataset = CocoDataset(records, [category], [1])
    counts = rewrite(dataset, output, output.parent, f"converted from the layout {layout!r}", category=category)
    return Conversion(*counts, faults)


def convert_coco(
    json_file: str | Path,
    output: str | Path,
    *,
    image_root: str | Path | None = None,
    merge_categories: bool = False,
    category: str | None = None,
    crowds: str = "refuse",
    choice: Choice | None = None,
) -> Conversion:
    """Write a COCO dataset anew, with what can be mended without doubt mended.

    That is: annotations numbered from 1 (an id 0, ids that come twice or are missing), areas, boxes and ``iscrowd``
    that are missing, categories without annotations, polygons that reach outside, file names with backslashes; all
    masks become run-length encodings, all boxes those of the masks. Images are as in `convert`.

    Args:
        json_file: the dataset.
        output: the JSON file to write; an existing one is replaced.
        image_root: the folder that the images' file names start from; by default that of `json_file`.
        merge_categories: make one category of several.
        category: the name of the only category; by default its own, and "cell" for several.
        crowds: what to do with crowd annotations: "refuse", "cells" (each is one cell) or "leave-out".
        choice: what of the image files to read.

    Raises:
        FileNotFoundError: `json_file` or the folder of `output` is missing.
        ValueError: any fault that is fatal and not mended. The message names the first of them.
    """
    if crowds not in CROWDS:
        raise ValueError(f"crowds: expected {', '.join(CROWDS)}, got {crowds!r}")
    choice = choice or Choice()
    output, image_root = Path(output), Path(json_file).parent if image_root is None else Path(image_root)
    root = _checked_folder(output, image_root)
    dataset, faults = read_coco(json_file, root)
    for record in dataset.records:
        if crowds == "cells":
            record["annotations"] = [cell | {"iscrowd": 0} for cell in record["annotations"]]
        elif crowds == "leave-out":
            record["annotations"] = [cell for cell in record["annotations"] if not cell["iscrowd"]]
    faults = faults + [
        one for one in dataset_faults(dataset, json_file) if not (merge_categories and one.kind == fault.CATEGORIES)
    ]
    missing = {one.where for one in faults if one.kind == fault.MISSING_IMAGE}
    seen: dict[str, Path] = {}
    for record in tqdm(dataset.records, desc="converting", unit="image", disable=None, leave=False):
        faults += cell_faults(record)
        if record["file_name"] in missing:
            continue
        image, more = read_recorded_image(record, choice)
        faults += more
        if image is not None:
            faults += image_faults(Path(record["file_name"]), image, seen, None)
            file = Path(record["file_name"])
            name = file.relative_to(root).with_suffix("").as_posix()
            record["file_name"] = _plain_file(file, name, image, choice, output, write=not fatal(faults))
    _refuse(faults)
    used = {cell["category_id"] for record in dataset.records for cell in record["annotations"]}
    if merge_categories or len(used) < 2:
        names = [dataset.category_names[index] for index in used] if len(used) == 1 else ["cell"]
        category = category or names[0]
    counts = rewrite(dataset, output, output.parent, f"mended from {Path(json_file).name}", category=category)
    return Conversion(*counts, [one for one in faults if one.kind not in fault.MENDED_BY_REWRITING])


def _checked_folder(output: Path, images: str | Path) -> Path:
    """The folder of the images, absolute, which must be that of the JSON file or below."""
    folder, root = Path(os.path.abspath(output.parent)), Path(os.path.abspath(images))
    if not folder.is_dir():
        raise FileNotFoundError(f"{output}: there is no folder {output.parent}")
    if not root.is_relative_to(folder):
        raise ValueError(
            f"{output}: the images must lie in its folder or below, from where it names them, but they are in {images}"
        )
    return root


def _plain_file(file: Path, name: str, image: np.ndarray, choice: Choice, output: Path, *, write: bool) -> str:
    """The file that a training reads `image` (H, W, 3) from: its own, or one of what was chosen, written if asked."""
    if not choice.planes:
        return str(file)
    try:
        if np.array_equal(read_image(file), image):
            return str(file)
    except (OSError, ValueError):
        pass
    copy = Path(os.path.abspath(output.parent), f"{output.stem}_images", f"{name}.tif")
    if write:
        copy.parent.mkdir(parents=True, exist_ok=True)
        is_grey = bool((image == image[..., :1]).all())
        pixels = np.ascontiguousarray(image[..., 0] if is_grey else image[..., ::-1])
        photometric = "minisblack" if is_grey else "rgb"
        with replacing(copy) as unfinished:
            tifffile.imwrite(
                unfinished, pixels, photometric=photometric, compression="zlib", metadata=None, software=False
            )
    return str(copy)


def _refuse(faults: Sequence[Fault]) -> None:
    bad = fatal(faults)
    if bad:
        raise ValueError(
            f"{len(bad)} faults, which kg-detectron check-data lists; the first: " + "; ".join(map(str, bad[:_NAMED]))
        )

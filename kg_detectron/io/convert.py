"""Images and masks of common layouts, or a COCO JSON that needs mending -> COCO JSON, ready for training."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from tqdm import tqdm

from kg_detectron.cells.run_lengths import as_text, encode_mask
from kg_detectron.io import fault
from kg_detectron.io.atomic import replacing
from kg_detectron.io.class_tables import ClassTables
from kg_detectron.io.coco import CocoDataset, read_coco, rewrite
from kg_detectron.io.dataset_check import (
    Choice,
    PairContent,
    cell_faults,
    dataset_faults,
    image_faults,
    read_pair,
    read_recorded_image,
    swapped_faults,
)
from kg_detectron.io.fault import Fault, fatal
from kg_detectron.io.finding import Pair
from kg_detectron.io.grey import is_grey
from kg_detectron.io.images import IMAGE_SUFFIXES, read_image
from kg_detectron.io.layouts import find_training_pairs
from kg_detectron.io.qupath import GEOJSON, read_geojson

BY_FOLDER = "folders"
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
    classes: str | Path | None = None,
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
        classes: what tells the class of each cell, whose categories then have the ids 1, 2, ... by name: a table, see
            `ClassTables`, or "folders", where `masks` holds a folder of masks for each class, called as the class.
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
    tables = None if classes in (None, BY_FOLDER) else ClassTables(classes or "")
    if classes == BY_FOLDER:
        labelled, faults, layout = _pairs_of_classes(images, masks, layout)
    else:
        pairs, faults, layout = find_training_pairs(images, masks, layout)
        labelled = [[(None, pair)] for pair in pairs]
    if tables is not None and layout != "labels":
        raise ValueError(f"classes: {classes} numbers the cells of label images, but the layout is {layout!r}")
    records: list[dict] = []
    seen: dict[str, Path] = {}
    swapped = 0
    for image_id, parts in enumerate(tqdm(labelled, desc="converting", unit="image", disable=None, leave=False), 1):
        contents = [(name, read_pair(pair, layout, choice)) for name, pair in parts]
        pair, image = parts[0][1], contents[0][1].image
        swapped += any(content.is_swapped for _, content in contents)
        more = [one for _, content in contents for one in content.faults]
        if classes == BY_FOLDER:  # an image need not have cells of each class
            more = [one for one in more if one.kind != fault.NO_CELL]
        faults += list(dict.fromkeys(more))
        if image is None:
            continue
        faults += image_faults(pair.image, image, seen, None)
        height, width = image.shape[:2]
        cells = [
            (rle, name)
            for of_class, content in contents
            for rle, name in zip(
                (rle for crops in content.cells for rle in crops.rle()),
                _class_names(of_class, content, tables, pair.name),
                strict=True,
            )
        ]
        records.append(
            {
                "file_name": _plain_file(
                    root / pair.image.relative_to(images), pair.name, image, choice, output, write=not fatal(faults)
                ),
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": [{"segmentation": rle, "category": name, "iscrowd": 0} for rle, name in cells],
            }
        )
    faults = swapped_faults(images, images if masks is None else masks, len(labelled), swapped) + faults
    _refuse(faults)
    description = f"converted from the layout {layout!r}"
    counts = _write(records, output, description, None if classes else category)
    return Conversion(*counts, faults)


def _pairs_of_classes(
    images: str | Path, masks: str | Path | None, layout: str | None
) -> tuple[list[list[tuple[str | None, Pair]]], list[Fault], str]:
    """The pairs of each image, by the class whose folder they are in; images that no folder has are faults."""
    folders = sorted(folder for folder in Path(masks or "").iterdir() if folder.is_dir()) if masks else []
    if not folders:
        raise ValueError(f"{masks}: expected a folder with a folder of masks for each class, got none")
    by_image: dict[str, list[tuple[str | None, Pair]]] = {}
    faults: dict[Fault, int] = {}
    layouts = set()
    for folder in folders:
        pairs, more, found = find_training_pairs(images, folder, layout)
        layouts.add(found)
        for pair in pairs:
            by_image.setdefault(pair.name, []).append((folder.name, pair))
        for one in more:
            faults[one] = faults.get(one, 0) + 1
    if len(layouts) > 1:
        raise ValueError(f"{masks}: its folders are of different layouts, {', '.join(sorted(layouts))}")
    with_masks = {str(parts[0][1].image) for parts in by_image.values()}
    lacking = [one for one in faults if one.kind != fault.NO_PARTNER or one.where not in with_masks]
    return [by_image[name] for name in sorted(by_image)], lacking, layouts.pop()


def _class_names(of_class: str | None, content: PairContent, tables: ClassTables | None, name: str) -> list[str | None]:
    """The class of each cell of a pair, None where it is not known."""
    count = sum(map(len, content.cells))
    if tables is None:
        return [of_class] * count
    classes = tables.of_image(name)
    absent = sorted(classes.keys() - set(content.numbers))
    if absent:
        raise ValueError(f"{tables.path}: {name}: its label image has no cell {absent[0]}")
    return [classes.get(number) for number in content.numbers]


def _write(records: list[dict], output: Path, description: str, category: str | None) -> tuple[int, int]:
    """Write records whose cells name their ``category``; of the single category where one is given.

    Raises:
        ValueError: no cell has a class.
    """
    cells = [cell for record in records for cell in record["annotations"]]
    names = [category] if category else sorted({cell["category"] for cell in cells} - {None})
    if not names:
        raise ValueError(f"{output}: expected the class of at least one cell, got none")
    for cell in cells:
        name = cell.pop("category")
        cell["category_id"] = 0 if category else None if name is None else names.index(name)
    dataset = CocoDataset(records, names, list(range(1, len(names) + 1)))
    return rewrite(dataset, output, output.parent, description, category=category)


def convert_geojson(
    images: str | Path, outlines: str | Path, output: str | Path, *, choice: Choice | None = None
) -> Conversion:
    """Write images and the GeoJSON of their cells, as QuPath exports it, as a COCO dataset; see `convert`.

    Args:
        images: folder of the images.
        outlines: folder of files ``NAME.geojson``, each of the image NAME; see `read_geojson`. Where no cell has a
            classification, all are of the category "cell".
        output, choice: as for `convert`.

    Raises:
        FileNotFoundError, ValueError: as `convert` and `read_geojson` do; files without partner.
    """
    choice = choice or Choice()
    output = Path(output)
    root = _checked_folder(output, images)
    files = {
        file.relative_to(outlines).with_suffix("").as_posix(): file for file in Path(outlines).rglob("*" + GEOJSON)
    }
    pictures = {
        file.relative_to(images).with_suffix("").as_posix(): file
        for file in sorted(Path(images).rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    }
    faults = [
        Fault(fault.NO_PARTNER, str({**files, **pictures}[name]), f"there is no {what} of it in {folder}")
        for names, what, folder in (
            (files.keys() - pictures.keys(), "image", images),
            (pictures.keys() - files.keys(), f"file *{GEOJSON}", outlines),
        )
        for name in sorted(names)
    ]
    _refuse(faults)
    records: list[dict] = []
    seen: dict[str, Path] = {}
    for image_id, name in enumerate(sorted(files), start=1):
        image = choice.read_image(pictures[name])
        faults += image_faults(pictures[name], image, seen, None)
        _refuse(faults)
        size = (image.shape[0], image.shape[1])
        annotations = [
            {"segmentation": as_text(encode_mask(cell.mask)), "category": cell.category, "iscrowd": 0}
            for cell in read_geojson(files[name], size)
        ]
        file = root / pictures[name].relative_to(images)
        records.append(
            {
                "file_name": _plain_file(file, name, image, choice, output, write=True),
                "image_id": image_id,
                "height": size[0],
                "width": size[1],
                "annotations": annotations,
            }
        )
    classified = any(cell["category"] for record in records for cell in record["annotations"])
    counts = _write(records, output, "converted from GeoJSON", None if classified else "cell")
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
    if merge_categories:
        faults = [one for one in faults if one.kind != fault.CATEGORY_NAMES]
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
    used = {cell["category_id"] for record in dataset.records for cell in record["annotations"]} - {None}
    if category is not None and len(used) > 1 and not merge_categories:
        raise ValueError(f"category: {category!r} would name one of {len(used)}; expected merge_categories with it")
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
        grey = is_grey(image)
        pixels = np.ascontiguousarray(image[..., 0] if grey else image[..., ::-1])
        photometric = "minisblack" if grey else "rgb"
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

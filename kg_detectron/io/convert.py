"""Images and masks of common layouts -> COCO JSON, ready for training."""

import os
from pathlib import Path

from tqdm import tqdm

from kg_detectron.io import fault
from kg_detectron.io.coco import rle_annotation, write_coco
from kg_detectron.io.dataset_check import read_pair
from kg_detectron.io.fault import Fault
from kg_detectron.io.pairs import find_pairs

# Faults of data that cannot be trained on as it stands; the others are the user's to judge.
_FATAL = {fault.NO_PARTNER, fault.UNREADABLE, fault.SIZE, fault.BINARY}
_NAMED = 3  # faults that the message names


def convert(
    images: str | Path, masks: str | Path, output: str | Path, *, layout: str | None = None, category: str = "cell"
) -> tuple[int, int, list[Fault]]:
    """Write images and masks as a COCO dataset with run-length encoded masks.

    The images stay where they are; the JSON file names them from its own folder, in which `images` must be, or a link
    to it.

    Args:
        images, masks, layout: as `find_pairs` takes them. An image whose label image is empty is kept, without cells.
        output: the JSON file; an existing one is replaced.
        category: name of the only category, of id 1.
    Returns:
        The numbers of images and of cells, and what else is conspicuous (see `check_masks`): cells in several pieces,
        cells that come twice, files without a cell, which are left out.
    Raises:
        FileNotFoundError: as `find_pairs` does, or the folder of `output` is missing.
        ValueError: the same; `images` is not in the folder of `output`; files without partner, unreadable, of another
            size than their image, binary masks in place of label images. The message names the first of them.
    """
    output = Path(output)
    folder, root = Path(os.path.abspath(output.parent)), Path(os.path.abspath(images))
    if not folder.is_dir():
        raise FileNotFoundError(f"{output}: there is no folder {output.parent}")
    if not root.is_relative_to(folder):
        raise ValueError(
            f"{output}: the images must lie in its folder or below, from where it names them, but they are in {images}"
        )
    pairs, faults, layout = find_pairs(images, masks, layout)
    records, annotations = [], []
    for image_id, pair in enumerate(tqdm(pairs, desc="converting", unit="image", disable=None, leave=False), start=1):
        content = read_pair(pair, layout)
        faults += content.faults
        if content.size is None:
            continue
        height, width = content.size
        file_name = (root.relative_to(folder) / pair.image.relative_to(images)).as_posix()
        records.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        annotations += [
            rle_annotation(rle, image_id=image_id, annotation_id=len(annotations) + i)
            for i, rle in enumerate((rle for cells in content.cells for rle in cells.rle()), start=1)
        ]
    fatal = [found for found in faults if found.kind in _FATAL]
    if fatal:
        raise ValueError(
            f"{len(fatal)} faults, which kg-detectron check-data lists; the first: "
            + "; ".join(map(str, fatal[:_NAMED]))
        )
    write_coco(output, records, annotations, [{"id": 1, "name": category}], f"converted from the layout {layout!r}")
    return len(records), len(annotations), faults

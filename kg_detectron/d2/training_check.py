"""The check of datasets before a training: all that is wrong is found at once, not one error a day."""

import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from kg_detectron.d2.datasets import register_cells
from kg_detectron.io import fault
from kg_detectron.io.coco import read_coco, read_json, rle_annotation, write_coco
from kg_detectron.io.dataset_check import check_coco
from kg_detectron.io.fault import Fault

logger = logging.getLogger(__name__)

# Odd, but nothing that a training could not use: an image without cells teaches what is none.
_HARMLESS = {fault.NO_CELL, fault.SPLIT, fault.DUPLICATE_IMAGE, fault.DUPLICATE_CELL}
# Of an image as a whole, whose file the fault names.
_OF_IMAGES = {fault.UNREADABLE, fault.SIZE, fault.MISSING_IMAGE}


def check_datasets(names: Iterable[str], skip_bad: bool, folder: str | Path) -> None:
    """Check registered datasets of cells, every image and annotation; others are left alone.

    Every fault is logged. Images are decoded, in about ten seconds of one core for 500 like those of DSB2018.

    Args:
        names: in Detectron2's DatasetCatalog.
        skip_bad: go on without bad images (with all their cells) and bad annotations: a copy of the annotations without
            them is written to ``folder``, and the name is registered anew with that.
        folder: for the copies; made where needed.

    Raises:
        ValueError: without ``skip_bad``, the datasets have faults that a training would trip over; or a dataset has no
            sound image; or its JSON is corrupt.
        FileNotFoundError: a JSON file is missing.
    """
    cells = [name for name in dict.fromkeys(names) if MetadataCatalog.get(name).get("evaluator_type") == "cells"]
    copies: dict[str, str] = {}
    error = None
    if comm.is_main_process():
        try:
            copies = _check(cells, skip_bad, Path(folder))
        except (OSError, ValueError) as found:
            error = found
    # One process looks; all of them stop or go on together.
    copies, error = comm.all_gather((copies, error))[0]
    if error is not None:
        raise error
    for name, json_file in copies.items():
        image_root = MetadataCatalog.get(name).image_root
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_cells(name, json_file, image_root)


def _check(names: list[str], skip_bad: bool, folder: Path) -> dict[str, str]:
    """-> {name: JSON file to use instead}."""
    copies, summaries = {}, []
    for name in names:
        metadata = MetadataCatalog.get(name)
        found, images = check_coco(metadata.json_file, metadata.image_root)
        bad = [each for each in found if each.kind not in _HARMLESS]
        for each in found:
            logger.log(logging.ERROR if each in bad else logging.INFO, "%s: %s", name, each)
        if not bad:
            continue
        kinds = ", ".join(f"{kind} ({number})" for kind, number in Counter(each.kind for each in bad).most_common())
        summaries.append(f"{name}: {kinds}")
        if skip_bad:
            copy = folder / (re.sub(r"[^\w-]", "_", name.removesuffix(".json")) + ".json")  # names may be paths
            left_out = _write_sound_part(metadata.json_file, metadata.image_root, bad, copy)
            logger.warning("%s: going on without %s; what is left is %s", name, left_out, copy)
            copies[name] = str(copy)
    if summaries and not skip_bad:
        raise ValueError(f"{'; '.join(summaries)}. Each is named in the log above; --skip-bad goes on without them")
    return copies


def _write_sound_part(json_file: str, image_root: str, bad: list[Fault], copy: Path) -> str:
    """Write the dataset without what ``bad`` names; the result says how much was left out."""
    dataset, _ = read_coco(json_file, image_root)
    bad_files = {each.where for each in bad if each.kind in _OF_IMAGES}
    records = [record for record in dataset.records if record["file_name"] not in bad_files]
    if not records:
        raise ValueError(f"{json_file}: no image is sound")
    images, annotations = [], []
    for record in records:
        file_name = Path(record["file_name"]).relative_to(image_root).as_posix()
        images.append(
            {"id": record["image_id"], "file_name": file_name, "height": record["height"], "width": record["width"]}
        )
        for cell in record["annotations"]:
            category = dataset.category_ids[cell["category_id"]]
            numbers = {"image_id": record["image_id"], "annotation_id": len(annotations) + 1, "category_id": category}
            annotations.append({**rle_annotation(cell["segmentation"], **numbers), "iscrowd": cell["iscrowd"]})
    categories = [
        {"id": id, "name": name} for id, name in zip(dataset.category_ids, dataset.category_names, strict=True)
    ]
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_coco(copy, images, annotations, categories, f"the sound part of {Path(json_file).name}")
    content = read_json(json_file, dict)
    before = [len(entries) if isinstance(entries := content.get(key), list) else 0 for key in ("images", "annotations")]
    lost_images, lost_cells = before[0] - len(images), before[1] - len(annotations)
    return f"{lost_images} of {before[0]} images and {lost_cells} of {before[1]} cells"

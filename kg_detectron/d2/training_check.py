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
from kg_detectron.io.coco import CocoDataset, read_coco, read_json, rewrite
from kg_detectron.io.dataset_check import check_coco
from kg_detectron.io.fault import Fault, Severity, fatal
from kg_detectron.io.normalisation import Normalisation

logger = logging.getLogger(__name__)

# Of an image as a whole, whose file the fault names.
_OF_IMAGES = {fault.UNREADABLE, fault.CHANNELS, fault.SIZE, fault.MISSING_IMAGE, fault.LEVELS}
_LEVELS = {Severity.NOTE: logging.INFO, Severity.HARMLESS: logging.WARNING, Severity.FATAL: logging.ERROR}


def check_datasets(
    names: Iterable[str], skip_bad: bool, folder: str | Path, normalisation: Normalisation | None = None
) -> None:
    """Check registered datasets of cells, every image and annotation; others are left alone.

    Every fault is logged. Images are decoded, in about ten seconds of one core for 500 like those of DSB2018. What can
    be mended by writing the annotations anew (ids, missing areas, categories without annotations) is: a copy is written
    to ``folder``, and the name is registered anew with that, so that the evaluation reads it too.

    Args:
        names: in Detectron2's DatasetCatalog.
        skip_bad: go on without bad images (with all their cells), bad annotations and crowds, in a copy as above.
        folder: for the copies; made where needed.
        normalisation: of the config that is about to be trained; images that it cannot take are bad. By default they
            are named only.

    Raises:
        ValueError: without ``skip_bad``, the datasets have faults that a training would trip over; categories of one
            name; a dataset has no sound image; or its JSON is corrupt.
        FileNotFoundError: a JSON file is missing.
    """
    cells = [name for name in dict.fromkeys(names) if MetadataCatalog.get(name).get("evaluator_type") == "cells"]
    copies: dict[str, str] = {}
    error = None
    if comm.is_main_process():
        try:
            copies = _check(cells, skip_bad, Path(folder), normalisation)
        except (OSError, ValueError) as problem:
            error = problem
    # One process looks; all of them stop or go on together.
    copies, error = comm.all_gather((copies, error))[0]
    if error is not None:
        raise error
    for name, json_file in copies.items():
        metadata = MetadataCatalog.get(name)
        image_root, class_names = metadata.image_root, metadata.get("cell_classes")
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_cells(name, json_file, image_root, class_names)


def _check(names: list[str], skip_bad: bool, folder: Path, normalisation: Normalisation | None) -> dict[str, str]:
    """-> {name: JSON file to use instead}."""
    copies: dict[str, str] = {}
    summaries: list[str] = []
    skippable = True
    for name in names:
        metadata = MetadataCatalog.get(name)
        faults, _ = check_coco(metadata.json_file, metadata.image_root, normalisation=normalisation)
        for one in faults:
            logger.log(_LEVELS[one.severity], "%s: %s", name, one)
        bad = fatal(faults)
        if bad:
            kinds = ", ".join(f"{kind} ({number})" for kind, number in Counter(one.kind for one in bad).most_common())
            summaries.append(f"{name}: {kinds}")
            skippable &= all(one.kind != fault.CATEGORY_NAMES for one in bad)
        if bad and skip_bad or any(one.kind in fault.MENDED_BY_REWRITING for one in faults):
            copy = folder / (re.sub(r"[^\w-]", "_", name.removesuffix(".json")) + ".json")  # names may be paths
            if skip_bad or not bad:
                left_out = _write_sound_part(metadata.json_file, metadata.image_root, bad, copy)
                logger.warning("%s: going on without %s; what is left is %s", name, left_out, copy)
                copies[name] = str(copy)
    if summaries and not (skip_bad and skippable):
        advice = "Each is named in the log above"
        if skippable:
            advice += "; --skip-bad goes on without them"
        raise ValueError(f"{'; '.join(summaries)}. {advice}")
    return copies


def _write_sound_part(json_file: str, image_root: str, bad: list[Fault], copy: Path) -> str:
    """Write the dataset without what ``bad`` names; the result says how much was left out."""
    dataset, _ = read_coco(json_file, image_root)
    bad_files = {one.where for one in bad if one.kind in _OF_IMAGES}
    records = [record for record in dataset.records if record["file_name"] not in bad_files]
    if not records:
        raise ValueError(f"{json_file}: no image is sound")
    sound = CocoDataset(records, dataset.category_names, dataset.category_ids)
    counts = rewrite(sound, copy, image_root, f"the sound part of {Path(json_file).name}")
    content = read_json(json_file, dict)
    totals = [len(entries) if isinstance(entries := content.get(key), list) else 0 for key in ("images", "annotations")]
    return f"{totals[0] - counts[0]} of {totals[0]} images and {totals[1] - counts[1]} of {totals[1]} cells"

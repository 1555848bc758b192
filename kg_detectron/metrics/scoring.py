"""All figures of predictions against ground truth, from files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kg_detectron._version import __version__
from kg_detectron.io.atomic import replacing
from kg_detectron.io.cell_sets import ImageCells, read_cells, read_predictions
from kg_detectron.metrics import DSB_IOUS, AreaMetrics, CocoMetrics, MatchingMetrics, PaperMetrics

# Every figure, by its place in the result ("t" stands for a threshold), in the order in which they are shown.
DEFINITIONS = {
    "paper.t.box_ap": "the paper's AP of boxes at IoU t: area under the envelope of the precision-recall curve of"
    " all images' detections by falling score; one whose best overlap is with a cell that is taken is a false positive",
    "paper.t.mask_ap": "the same of masks",
    "paper.t.mean_mask_iou": "the paper's mean IoU at t: sum of IoU / number of mask_ap's true positives",
    "coco.box.ap": "COCO's AP of boxes: mean over IoU 0.50:0.05:0.95 of the precision at 101 recalls,"
    " at most coco.max_detections detections an image; ap50, ap75: at IoU 0.50, 0.75",
    "coco.mask.ap": "the same of masks",
    "matching.t.precision": "TP / (TP + FP); TP, FP, FN of the best one-to-one matching of masks with IoU >= t, summed"
    " over the images",
    "matching.t.recall": "TP / (TP + FN)",
    "matching.t.f1": "2 TP / (2 TP + FP + FN)",
    "matching.t.accuracy": "TP / (TP + FP + FN), which StarDist and Cellpose call AP or accuracy",
    "matching.t.sq": "segmentation quality: sum of the IoU of the pairs / TP",
    "matching.t.pq": "panoptic quality: sum of the IoU of the pairs / (TP + FP/2 + FN/2) = sq f1",
    "dsb.t": "TP / (TP + FP + FN) of each image, mean over the images with a cell or a detection",
    "dsb.score": "DSB score (Data Science Bowl 2018): mean of dsb.t over t = 0.50:0.05:0.95",
    "aji": "aggregated Jaccard index (Kumar et al. 2017, not AJI+), mean over the images: sum of |G and P| / (sum of"
    " |G or P| + pixels of the detections that no cell chose), P the detection of the greatest IoU with the cell G",
    "foreground_dice": "2 |G and P| / (|G| + |P|), G and P the pixels of any cell and any detection, of all images",
}


def evaluate(
    ground_truth: str | Path,
    predictions: str | Path,
    *,
    ious: Sequence[float] = (0.5, 0.7),
    min_score: float = 0.0,
    max_detections: int = 10000,
) -> dict:
    """Compare predictions with ground truth. Cells of all categories are taken as one.

    Args:
        ground_truth: what `kg_detectron.io.cell_sets.read_cells` reads: a folder of label images or a COCO JSON.
        predictions: the same, or COCO results; see `kg_detectron.io.cell_sets.read_predictions`.
        ious: thresholds of the figures at a threshold.
        min_score: predictions of a lower score do not count in the figures that use no ranking (``matching``, ``dsb``,
            ``aji``, ``foreground_dice``). The APs rank all of them.
        max_detections: of an image, that COCO's AP looks at.

    Returns:
        A dict ready for JSON: ``paper``, ``coco``, ``matching``, ``dsb``, ``aji``, ``foreground_dice`` as `DEFINITIONS`
        says, fractions of 0..1 and None where undefined; ``images``, ``cells``, ``detections`` (of any score),
        ``images_without_prediction`` (names), ``has_scores``, ``min_score``, ``definitions``, ``kg_detectron`` (its
        version).

        Without scores an AP has no ranking to go by, and its value would depend on the order of the files: the APs are
        None. ``mean_mask_iou`` needs a ranking only where two detections overlap one cell by t, and stays.

    Raises:
        FileNotFoundError, ValueError: as `read_predictions` does; ``ious`` or ``max_detections`` out of range; a
            ``min_score`` for predictions without scores.
    """
    truths = read_cells(ground_truth)
    found = read_predictions(predictions, truths)
    return evaluate_cells(
        truths, found, ious=ious, min_score=min_score, max_detections=max_detections, name=str(predictions)
    )


def evaluate_cells(
    truths: Sequence[ImageCells],
    found: Sequence[ImageCells | None],
    *,
    ious: Sequence[float] = (0.5, 0.7),
    min_score: float = 0.0,
    max_detections: int = 10000,
    name: str = "predictions",
) -> dict:
    """`evaluate` for cells that are read already: of every image its truth, and what was predicted or None.

    ``name`` is what errors call the predictions.
    """
    paper, matching, coco = PaperMetrics(ious), MatchingMetrics(ious), CocoMetrics(max_detections)
    dsb, area = MatchingMetrics(DSB_IOUS), AreaMetrics()
    scored = {image.scores is not None for image in found if image is not None and len(image.masks)}
    if len(scored) > 1:
        raise ValueError(f"{name}: some images have scores and others have none, expected all or none")
    has_scores = scored != {False}
    if min_score > 0 and not has_scores:
        raise ValueError(f"min_score: expected 0 for predictions without scores, got {min_score}")

    for truth, own in zip(truths, found, strict=True):
        if own is None:
            own = ImageCells(truth.name, truth.image_id, truth.size, np.zeros((0, 4)), [], None)
        scores = np.ones(len(own.masks)) if own.scores is None else own.scores
        image = truth.boxes, truth.masks, own.boxes, scores, own.masks
        paper.update(*image)
        if has_scores:
            coco.update(*image)
        kept = [mask for mask, score in zip(own.masks, scores, strict=True) if score >= min_score]
        for metrics in (matching, dsb, area):
            metrics.update(truth.masks, kept)

    paper_figures, matching_figures, dsb_figures = paper.compute(), matching.compute(), dsb.compute()
    if not has_scores:
        for at_threshold in paper_figures.values():
            at_threshold |= {"box_ap": math.nan, "mask_ap": math.nan}
    per_threshold = {iou: figures["dsb_score"] for iou, figures in dsb_figures.items()}
    undefined = dict.fromkeys(("ap", "ap50", "ap75"), math.nan)
    coco_figures = coco.compute() if has_scores else {"box": undefined, "mask": undefined}
    for at_threshold in matching_figures.values():
        del at_threshold["dsb_score"]  # stands under dsb
    return _without_nan(
        {
            "paper": paper_figures,
            "coco": {"max_detections": max_detections, **coco_figures},
            "matching": matching_figures,
            "dsb": {"score": float(np.mean(list(per_threshold.values()))), **per_threshold},
            **area.compute(),
            "images": len(truths),
            "cells": sum(len(truth.masks) for truth in truths),
            "detections": sum(len(own.masks) for own in found if own is not None),
            "images_without_prediction": [t.name for t, own in zip(truths, found, strict=True) if own is None],
            "has_scores": has_scores,
            "min_score": min_score,
            "definitions": DEFINITIONS,
            "kg_detectron": __version__,
        }
    )


def write_report(path: str | Path, figures: dict) -> None:
    """Write what `evaluate` returns as JSON: whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def report(figures: dict) -> str:
    """What `evaluate` returns as text: a line a figure, and below what each of them is."""
    lines = [f"{figures['images']} images, {figures['cells']} cells, {figures['detections']} detections"]
    missing = figures["images_without_prediction"]
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if missing[5:] else "")
        lines.append(f"no prediction for {len(missing)} images, which count as without detections: {names}")
    if not figures["has_scores"]:
        lines.append("the predictions have no scores: no ranking, hence no AP (n/a)")
    elif figures["min_score"] > 0:
        lines.append(f"detections of a score below {figures['min_score']:g} count in the APs only")
    lines.append("")
    shown = {name: value for name, value in _flat(figures) if name.split(".")[0] in _SHOWN}
    width = max(map(len, shown))
    lines += [f"{name:{width}}  {_number(value)}" for name, value in shown.items()]
    lines += ["", *(f"{name}: {text}" for name, text in DEFINITIONS.items())]
    return "\n".join(lines)


_SHOWN = {name.split(".")[0] for name in DEFINITIONS}


def _flat(figures: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Nested dicts as pairs of a dotted name and a value."""
    pairs = []
    for key, value in figures.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _number(value: float | int | None) -> str:
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _without_nan(value: object) -> object:
    """The same with None for nan, which JSON has not."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

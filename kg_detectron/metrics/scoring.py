"""All figures of predictions against ground truth, from files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kg_detectron._version import __version__
from kg_detectron.io.atomic import replacing
from kg_detectron.io.cell_sets import ImageCells, Pairing, pair_predictions, read_cells
from kg_detectron.metrics import DSB_IOUS, AreaMetrics, CocoMetrics, ImageResult, MatchingMetrics, PaperMetrics

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
    ground_truth: str | Path | np.ndarray | Sequence[np.ndarray],
    predictions: str | Path | np.ndarray | Sequence[np.ndarray],
    *,
    ious: Sequence[float] = (0.5, 0.7),
    min_score: float = 0.0,
    max_detections: int = 10000,
    only_common: bool = False,
) -> dict[str, Any]:
    """Compare predictions with ground truth. Cells of all categories are taken as one.

    Args:
        ground_truth: what `kg_detectron.io.cell_sets.read_cells` reads: a folder of label images or a COCO JSON; or a
            label image (H, W) of integers, 0 background, or a list of them.
        predictions: the same, or COCO results; see `kg_detectron.io.cell_sets.read_predictions`. Arrays go with arrays.
        ious: thresholds of the figures at a threshold.
        min_score: predictions of a lower score do not count in the figures that use no ranking (``matching``, ``dsb``,
            ``aji``, ``foreground_dice``). The APs rank all of them.
        max_detections: of an image, that COCO's AP looks at.
        only_common: evaluate the images that both have. By default an image without prediction counts as one without
            detections, and predictions of an image that the ground truth lacks are an error.

    Returns:
        A dict ready for JSON: ``paper``, ``coco``, ``matching``, ``dsb``, ``aji``, ``foreground_dice`` as `DEFINITIONS`
        says, fractions of 0..1 and None where undefined; ``images``, ``cells``, ``detections`` (of any score),
        ``images_without_prediction`` (names), ``images_left_out`` (names, by ``ground_truth`` and ``predictions``),
        ``has_scores``, ``min_score``, ``per_image`` (a list of dicts ``name``, ``has_prediction``, ``cells``,
        ``detections`` that count, ``matching``, ``aji``, ``foreground_dice``), ``definitions``, ``kg_detectron`` (its
        version).

        Without scores an AP has no ranking to go by, and its value would depend on the order of the files: the APs are
        None. ``mean_mask_iou`` needs a ranking only where two detections overlap one cell by t, and stays.

    Raises:
        FileNotFoundError, ValueError: as `read_predictions` does; ``ious`` or ``max_detections`` out of range; a
            ``min_score`` for predictions without scores; a foreground mask in place of a label image.

    Example:
        >>> truth = np.array([[1, 1, 0], [0, 0, 2]])
        >>> evaluate(truth, np.array([[5, 5, 0], [0, 0, 0]]))["matching"]["0.5"]["f1"]
        0.6666666666666666
    """
    if not isinstance(ground_truth, (str, Path)) or not isinstance(predictions, (str, Path)):
        pairing = _pair_arrays(ground_truth, predictions)
        name = "predictions"
    else:
        pairing = pair_predictions(predictions, read_cells(ground_truth), only_common=only_common)
        name = str(predictions)
    figures = evaluate_cells(
        pairing.truths,
        pairing.predictions,
        ious=ious,
        min_score=min_score,
        max_detections=max_detections,
        name=name,
    )
    figures["images_left_out"] = {
        "ground_truth": pairing.only_truth if only_common else [],
        "predictions": pairing.only_predicted,
    }
    return figures


def _pair_arrays(ground_truth: Any, predictions: Any) -> Pairing:
    """Label images that are in memory, in the order given."""
    sides: list[list[ImageCells]] = []
    for side, arrays in (("ground_truth", ground_truth), ("predictions", predictions)):
        if isinstance(arrays, (str, Path)):
            raise ValueError(
                f"{side}: expected a label image or a list of them, as the other is, got the path {arrays}"
            )
        listed = [arrays] if isinstance(arrays, np.ndarray) and arrays.ndim == 2 else list(arrays)
        try:
            sides.append([ImageCells.from_labels(np.asarray(one), str(i)) for i, one in enumerate(listed)])
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
    sizes = [[image.size for image in side] for side in sides]
    if sizes[0] != sizes[1]:
        raise ValueError(f"predictions: expected label images of the sizes {sizes[0]}, got {sizes[1]}")
    return Pairing(sides[0], [*sides[1]], [], [])


def evaluate_cells(
    truths: Sequence[ImageCells],
    predictions: Sequence[ImageCells | None],
    *,
    ious: Sequence[float] = (0.5, 0.7),
    min_score: float = 0.0,
    max_detections: int = 10000,
    name: str = "predictions",
) -> dict[str, Any]:
    """`evaluate` for cells that are read already: of every image its truth, and what was predicted or None.

    ``name`` is what errors call the predictions.
    """
    paper, matching, coco = PaperMetrics(ious), MatchingMetrics(ious), CocoMetrics(max_detections)
    dsb, area = MatchingMetrics(DSB_IOUS), AreaMetrics()
    scored = {image.scores is not None for image in predictions if image is not None and len(image.masks)}
    if len(scored) > 1:
        raise ValueError(f"{name}: some images have scores and others have none, expected all or none")
    has_scores = scored != {False}
    if min_score > 0 and not has_scores:
        raise ValueError(f"min_score: expected 0 for predictions without scores, got {min_score}")

    counts = []
    for truth, prediction in zip(truths, predictions, strict=True):
        if prediction is None:
            prediction = ImageCells(truth.name, truth.image_id, truth.size, np.zeros((0, 4)), [], None)
        scores = np.ones(len(prediction.masks)) if prediction.scores is None else prediction.scores
        result = ImageResult(truth.boxes, truth.masks, prediction.boxes, scores, prediction.masks)
        paper.update(*result)
        if has_scores:
            coco.update(*result)
        kept = [mask for mask, score in zip(prediction.masks, scores, strict=True) if score >= min_score]
        counts.append(len(kept))
        for metrics in (matching, dsb, area):
            metrics.update(truth.masks, kept)

    paper_figures = paper.compute()
    if not has_scores:
        for at_threshold in paper_figures.values():
            at_threshold |= {"box_ap": math.nan, "mask_ap": math.nan}
    undefined = dict.fromkeys(("ap", "ap50", "ap75"), math.nan)
    coco_figures = coco.compute() if has_scores else {"box": undefined, "mask": undefined}
    matching_figures = {
        iou: {key: value for key, value in figures.items() if key != "dsb_score"}  # stands under dsb
        for iou, figures in matching.compute().items()
    }
    per_threshold = {iou: figures["dsb_score"] for iou, figures in dsb.compute().items()}
    per_image = [
        {
            "name": truth.name,
            "has_prediction": prediction is not None,
            "cells": len(truth.masks),
            "detections": count,
            "matching": matched,
            **areas,
        }
        for truth, prediction, count, matched, areas in zip(
            truths, predictions, counts, matching.per_image(), area.per_image(), strict=True
        )
    ]
    return _without_nan(
        {
            "paper": paper_figures,
            "coco": {"max_detections": max_detections, **coco_figures},
            "matching": matching_figures,
            "dsb": {"score": float(np.mean(list(per_threshold.values()))), **per_threshold},
            **area.compute(),
            "images": len(truths),
            "cells": sum(len(truth.masks) for truth in truths),
            "detections": sum(len(image.masks) for image in predictions if image is not None),
            "images_without_prediction": [t.name for t, p in zip(truths, predictions, strict=True) if p is None],
            "images_left_out": {"ground_truth": [], "predictions": []},
            "has_scores": has_scores,
            "min_score": min_score,
            "per_image": per_image,
            "definitions": DEFINITIONS,
            "kg_detectron": __version__,
        }
    )


def write_report(path: str | Path, figures: dict[str, Any]) -> None:
    """Write what `evaluate` returns as JSON: whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def report(figures: dict[str, Any]) -> str:
    """What `evaluate` returns as text: a line a figure, and below what each of them is."""
    lines = [f"{figures['images']} images, {figures['cells']} cells, {figures['detections']} detections"]
    missing = figures["images_without_prediction"]
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if missing[5:] else "")
        lines.append(f"no prediction for {len(missing)} images, which count as without detections: {names}")
    for side, names in figures["images_left_out"].items():
        if names:
            shown = ", ".join(names[:5]) + (", ..." if names[5:] else "")
            lines.append(f"left out, {len(names)} images only in the {side.replace('_', ' ')}: {shown}")
    if not figures["has_scores"]:
        lines.append("the predictions have no scores: no ranking, hence no AP (n/a)")
    elif figures["min_score"] > 0:
        lines.append(f"detections of a score below {figures['min_score']:g} count in the APs only")
    lines.append("")
    values = {name: value for name, value in _flat(figures) if name.split(".")[0] in _SHOWN}
    width = max(map(len, values))
    lines += [f"{name:{width}}  {_number(value)}" for name, value in values.items()]
    lines += ["", *(f"{name}: {text}" for name, text in DEFINITIONS.items())]
    return "\n".join(lines)


_SHOWN = {name.split(".")[0] for name in DEFINITIONS}


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as pairs of a dotted name and a value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in figures.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _number(value: float | int | None) -> str:
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _without_nan(value: Any) -> Any:
    """The same with None for nan, which JSON has not."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value

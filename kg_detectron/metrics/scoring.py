"""All figures of predictions against ground truth, from files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kg_detectron._version import __version__
from kg_detectron.io.atomic import replacing
from kg_detectron.io.cell_sets import ImageCells, Pairing, UnknownImagesError, pair_predictions, read_cells
from kg_detectron.io.setting import SettingError, check_score
from kg_detectron.metrics import (
    DSB_IOUS,
    AreaMetrics,
    ClassMetrics,
    CocoMetrics,
    ImageResult,
    MatchingMetrics,
    PaperMetrics,
)

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


# Those of several classes, under ``classes``.
CLASS_DEFINITIONS = {
    "classes.per_class.c.mask_ap": "the paper's AP of masks of class c alone, at IoU 0.5; classes.mask_ap: mean over"
    " the classes with a cell",
    "classes.per_class.c.coco_mask_ap": "COCO's AP of masks of class c alone; classes.coco_mask_ap: mean over the"
    " classes with a cell",
    "classes.per_class.c.pq": "panoptic quality of class c from the sums over all images: sum of the IoU of the pairs /"
    " (TP + FP/2 + FN/2), pairs of masks of the class with IoU > 0.5; sq = sum of IoU / TP,"
    " rq = TP / (TP + FP/2 + FN/2)",
    "classes.mpq_plus": "multi-class PQ of CoNIC (mPQ+): mean of pq over the classes with a cell or a detection",
    "classes.per_class.c.pq_image": "PanNuke's PQ of class c: mean over the images with a cell of it of their own PQ",
    "classes.mpq": "PanNuke's mPQ: of each image the mean PQ of the classes that its ground truth has, then the mean"
    " over the images",
    "classes.bpq": "PanNuke's bPQ: of each image with a cell the PQ of all classes as one, then the mean",
    "classes.per_class.c.f1_type": "HoVer-Net's F1 of classification: 2 TP_c / (2 TP_c + 2 FP_c + 2 FN_c + FP_d +"
    " FN_d); pairs have centroids up to 12 pixels apart, with the least sum of distances; TP_c pairs of class c on both"
    " sides, FP_c, FN_c of class c in the prediction or the truth only; FP_d, FN_d cells of class c without a partner",
    "classes.f1_detection": "HoVer-Net's F1 of detection: 2 pairs / (2 pairs + detections and cells without a partner)",
    "classes.type_accuracy": "share of these pairs whose classes agree",
    "classes.accuracy": "share of the pairs of masks with IoU > 0.5, of any classes, whose classes agree",
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
    """Compare predictions with ground truth.

    Cells of all categories are taken as one, but in the figures under ``classes``, which are there where the ground
    truth has several categories and the predictions have some of them, by their names.

    Args:
        ground_truth: what `kg_detectron.io.cell_sets.read_cells` reads: a folder of label images or a COCO JSON; or a
            label image (H, W) of integers, 0 background, or a list of them.
        predictions: the same, or COCO results; see `kg_detectron.io.cell_sets.read_predictions`. Arrays go with arrays.
        ious: thresholds of the figures at a threshold.
        min_score: predictions of a lower score, 0..1, do not count in the figures that use no ranking (``matching``,
            ``dsb``, ``aji``, ``foreground_dice``). The APs rank all of them.
        max_detections: of an image, that COCO's AP looks at.
        only_common: evaluate the images that both have. By default an image without prediction counts as one without
            detections, and predictions of an image that the ground truth lacks are an error.

    Returns:
        A dict ready for JSON: ``paper``, ``coco``, ``matching``, ``dsb``, ``aji``, ``foreground_dice`` as `DEFINITIONS`
        says, fractions of 0..1 and None where undefined; ``images``, ``cells``, ``detections`` (of any score),
        ``images_without_prediction`` (names), ``images_left_out`` (names, by ``ground_truth`` and ``predictions``),
        ``has_scores``, ``min_score``, ``per_image`` (a list of dicts ``name``, ``has_prediction``, ``cells``,
        ``detections`` that count, ``matching``, ``aji``, ``foreground_dice``), ``definitions``, ``kg_detectron`` (its
        version). With several classes ``classes``, see `ClassMetrics.compute`.

        Without scores an AP has no ranking to go by, and its value would depend on the order of the files: the APs are
        None. ``mean_mask_iou`` needs a ranking only where two detections overlap one cell by t, and stays.

    Raises:
        FileNotFoundError, ValueError: as `read_predictions` does; ``ious``, ``min_score`` or ``max_detections`` out of
            range; a ``min_score`` for predictions without scores; a foreground mask in place of a label image.

    Example:
        >>> truth = np.array([[1, 1, 0], [0, 0, 2]])
        >>> evaluate(truth, np.array([[5, 5, 0], [0, 0, 0]]))["matching"]["0.5"]["f1"]
        0.6666666666666666
    """
    check_score("min_score", min_score)
    if not isinstance(ground_truth, (str, Path)) or not isinstance(predictions, (str, Path)):
        pairing = _pair_arrays(ground_truth, predictions)
        name = "predictions"
    else:
        try:
            pairing = pair_predictions(predictions, read_cells(ground_truth), only_common=only_common)
        except UnknownImagesError as error:
            raise ValueError(f"{error} (--only-common evaluates the images that both have)") from None
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
    names = _class_names(truths, predictions)
    by_class = ClassMetrics(names, max_detections=max_detections)
    paper, matching, coco = PaperMetrics(ious), MatchingMetrics(ious), CocoMetrics(max_detections)
    dsb, area = MatchingMetrics(DSB_IOUS), AreaMetrics()
    scored = {image.scores is not None for image in predictions if image is not None and len(image.masks)}
    if len(scored) > 1:
        raise ValueError(f"{name}: some images have scores and others have none, expected all or none")
    has_scores = scored != {False}
    if min_score > 0 and not has_scores:
        raise SettingError("min_score", f"expected 0 for predictions without scores, got {min_score}")

    counts = []
    for truth, prediction in zip(truths, predictions, strict=True):
        if prediction is None:
            prediction = ImageCells(truth.name, truth.image_id, truth.size, np.zeros((0, 4)), [], None)
        scores = np.ones(len(prediction.masks)) if prediction.scores is None else prediction.scores
        result = ImageResult(truth.boxes, truth.masks, prediction.boxes, scores, prediction.masks)
        paper.update(*result)
        if has_scores:
            coco.update(*result)
        if names:
            _update_classes(by_class, truth, prediction, scores, min_score)
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
    class_figures: dict[str, Any] = {}
    if names:
        class_figures["classes"] = by_class.compute()
        if not has_scores:
            for figures in (class_figures["classes"], *class_figures["classes"]["per_class"].values()):
                figures |= {key: math.nan for key in figures if key.endswith(("mask_ap", "mask_ap50"))}
    return _without_nan(
        {
            "paper": paper_figures,
            "coco": {"max_detections": max_detections, **coco_figures},
            "matching": matching_figures,
            "dsb": {"score": float(np.mean(list(per_threshold.values()))), **per_threshold},
            **area.compute(),
            **class_figures,
            "images": len(truths),
            "cells": sum(len(truth.masks) for truth in truths),
            "detections": sum(len(image.masks) for image in predictions if image is not None),
            "images_without_prediction": [t.name for t, p in zip(truths, predictions, strict=True) if p is None],
            "images_left_out": {"ground_truth": [], "predictions": []},
            "has_scores": has_scores,
            "min_score": min_score,
            "per_image": per_image,
            "definitions": DEFINITIONS | (CLASS_DEFINITIONS if names else {}),
            "kg_detectron": __version__,
        }
    )


def _class_names(truths: Sequence[ImageCells], predictions: Sequence[ImageCells | None]) -> list[str]:
    """The classes of the figures by class; none where a side has no classes, or the two have none in common."""
    known: list[dict[str, None]] = [{}, {}]
    for side, images in zip(known, (truths, predictions), strict=True):
        for image in images:
            used = set(image.classes or ()) if image is not None else set()
            in_order = [*image.categories.values(), *sorted(used)] if image is not None else []
            side.update(dict.fromkeys(name for name in in_order if name in used and name))
    truth, predicted = known
    return (
        [*truth, *(name for name in predicted if name not in truth)]
        if len(truth) > 1 and truth.keys() & predicted
        else []
    )


def _update_classes(
    metrics: ClassMetrics, truth: ImageCells, prediction: ImageCells, scores: np.ndarray, min_score: float
) -> None:
    number = {name: index for index, name in enumerate(metrics.names, start=1)}
    gt_classes = [number.get(name, 0) for name in truth.classes or ("",) * len(truth.masks)]
    classes = np.array([number.get(name, 0) for name in prediction.classes or ("",) * len(prediction.masks)], np.int64)
    kept = np.flatnonzero((scores >= min_score) & (classes > 0))
    masks = [prediction.masks[i] for i in kept]
    metrics.update(truth.boxes, truth.masks, prediction.boxes[kept], scores[kept], masks, gt_classes, classes[kept])


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
    values = {name: value for name, value in values.items() if not isinstance(value, list)}
    width = max(map(len, values))
    lines += [f"{name:{width}}  {_number(value)}" for name, value in values.items()]
    if "classes" in figures:
        lines += ["", *_confusion_lines(figures["classes"])]
    lines += ["", *(f"{name}: {text}" for name, text in figures["definitions"].items())]
    return "\n".join(lines)


_SHOWN = {name.split(".")[0] for name in (*DEFINITIONS, *CLASS_DEFINITIONS)}


def _confusion_lines(classes: dict[str, Any]) -> list[str]:
    """The confusion matrix as text: a row a true class, a column a predicted one."""
    rows = [["truth \\ predicted", *classes["names"], "missed"]]
    names = [*classes["names"], "no cell"]
    rows += [[name, *map(str, row)] for name, row in zip(names, classes["confusion"], strict=True)]
    rows[-1][-1] = ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


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

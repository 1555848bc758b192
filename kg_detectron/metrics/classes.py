"""Figures of instance segmentation with classes. Letters as in the package; K classes, numbers 1..K, 0 is not known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.metrics.coco import CocoMetrics
from kg_detectron.metrics.iou import RLE, checked_image, mask_iou
from kg_detectron.metrics.matching import match
from kg_detectron.metrics.paper import PaperMetrics

# PanNuke, CoNIC and Kirillov et al. pair masks of an IoU above 0.5, not of 0.5 itself.
ABOVE_HALF = float(np.nextafter(0.5, 1))
# Pixels between the centroids of a pair in HoVer-Net's F1, for images at 40x.
RADIUS = 12.0


class ClassMetrics:
    """Figures by class, and over classes.

    A ground truth whose class is not known counts nowhere but in ``bpq``; a detection that pairs with it, by the one
    matching of all masks (`match`, IoU > 0.5), counts nowhere else either.

    Args:
        names: of the K classes.
        radius: of HoVer-Net's pairs, pixels.
        max_detections: of an image, that COCO's AP looks at.

    Example:
        >>> mask = {"size": [2, 2], "counts": "02"}  # the left column
        >>> metrics = ClassMetrics(["round", "dark"])
        >>> metrics.update([[0, 0, 1, 2]], [mask], [[0, 0, 1, 2]], [0.9], [mask], [1], [1])
        >>> metrics.compute()["mpq"]
        1.0
    """

    def __init__(self, names: Sequence[str], *, radius: float = RADIUS, max_detections: int = 10000) -> None:
        self.names = list(names)
        self.radius = radius
        count = len(self.names)
        self._coco = [CocoMetrics(max_detections) for _ in names]
        self._paper = [PaperMetrics((0.5,)) for _ in names]
        self._counts: list[NDArray[np.float64]] = []  # per image (K, 4): TP, FP, FN, sum of the pairs' IoU
        self._binary: list[NDArray[np.float64]] = []  # per image (4,), of all classes as one
        self._typed = np.zeros((count, 5))  # HoVer-Net's TP_c, FP_c, FN_c, FP_d, FN_d of each class
        self._detected = np.zeros(5)  # pairs, detections alone, truths alone, pairs of one class and of two
        self._confusion = np.zeros((count + 1, count + 1), np.int64)

    def update(
        self,
        gt_boxes: ArrayLike,
        gt_masks: Sequence[RLE],
        boxes: ArrayLike,
        scores: ArrayLike,
        masks: Sequence[RLE],
        gt_classes: ArrayLike,
        classes: ArrayLike,
    ) -> None:
        """Add one image.

        Args:
            gt_boxes, gt_masks, boxes, scores, masks: the fields of an `ImageResult`.
            gt_classes: (M,) of 0..K.
            classes: (D,) of 1..K.

        Raises:
            ValueError: as `PaperMetrics.update` does, and for classes of another number or range.
        """
        gt_boxes, boxes, scores = checked_image(gt_boxes, gt_masks, boxes, scores, masks)
        truth, found = np.asarray(gt_classes, np.int64), np.asarray(classes, np.int64)
        for name, values, expected, low in (
            ("gt_classes", truth, len(gt_boxes), 0),
            ("classes", found, len(boxes), 1),
        ):
            count = len(self.names)
            if values.shape != (expected,) or values.size and not (low <= values.min() and values.max() <= count):
                raise ValueError(f"{name}: expected {expected} numbers of {low}..{count}, got {values.tolist()[:8]}")
        overlap = mask_iou(masks, gt_masks)
        detection, cell = match(overlap, ABOVE_HALF)
        self._binary.append(_counts(overlap))
        # What is not known is left out, with the detections that pair with it.
        unknown = truth[cell] == 0
        kept = np.setdiff1d(np.arange(len(found)), detection[unknown])
        known = np.flatnonzero(truth > 0)
        detection, cell = detection[~unknown], cell[~unknown]
        np.add.at(self._confusion, (truth[cell] - 1, found[detection] - 1), 1)
        np.add.at(self._confusion, (truth[np.setdiff1d(known, cell)] - 1, -1), 1)
        np.add.at(self._confusion, (-1, found[np.setdiff1d(kept, detection)] - 1), 1)
        of_image = []
        for index in range(len(self.names)):
            cells, ours = known[truth[known] == index + 1], kept[found[kept] == index + 1]
            of_image.append(_counts(overlap[np.ix_(ours, cells)]))
            result = (
                gt_boxes[cells],
                [gt_masks[i] for i in cells.tolist()],
                boxes[ours],
                scores[ours],
                [masks[i] for i in ours.tolist()],
            )
            self._coco[index].update(*result)
            self._paper[index].update(*result)
        self._counts.append(np.array(of_image))
        of_truth, of_found = [gt_masks[i] for i in known.tolist()], [masks[i] for i in kept.tolist()]
        self._pair_centroids(of_truth, truth[known], of_found, found[kept])

    def _pair_centroids(
        self, gt_masks: Sequence[RLE], truth: NDArray[np.int64], masks: Sequence[RLE], found: NDArray[np.int64]
    ) -> None:
        distance = scipy.spatial.distance.cdist(_centroids(gt_masks), _centroids(masks))
        rows, columns = scipy.optimize.linear_sum_assignment(distance)
        near = distance[rows, columns] <= self.radius
        rows, columns = rows[near], columns[near]
        one, other = truth[rows], found[columns]
        alone = np.delete(found, columns), np.delete(truth, rows)
        for c in range(1, len(self.names) + 1):
            pairs = (
                ((one == c) & (other == c)).sum(),
                ((one != c) & (other == c)).sum(),
                ((one == c) & (other != c)).sum(),
            )
            self._typed[c - 1] += (*pairs, (alone[0] == c).sum(), (alone[1] == c).sum())
        same = int((one == other).sum())
        self._detected += (len(one), len(alone[0]), len(alone[1]), same, len(one) - same)

    def compute(self) -> dict[str, Any]:
        """The figures of all images so far, fractions of 0..1, nan where undefined.

        Returns:
            ``per_class``, by name, a dict: ``cells`` and ``detections``; ``coco_mask_ap``, ``coco_mask_ap50`` (COCO)
            and ``mask_ap`` (the paper's, at IoU 0.5) of the class; ``pq``, ``sq`` and ``rq`` from the sums over all
            images (CoNIC), ``pq_image`` (PanNuke, the mean over the images that have the class) and ``f1_type``
            (HoVer-Net).
            Over the classes: ``mask_ap`` and ``coco_mask_ap``, means over the classes with a ground truth;
            ``mpq_plus`` (CoNIC's mPQ+), the mean of ``pq`` over the classes with a cell or a detection; ``mpq``
            (PanNuke's mPQ), the mean over images of the mean PQ of the classes that they have; ``bpq``, the mean over
            images with cells of the PQ of all classes as one; ``f1_detection`` and ``type_accuracy`` (HoVer-Net);
            ``accuracy``, of the pairs of masks those of one class. ``confusion``: (K + 1) lists of K + 1 numbers, rows
            the true class and last detections without a cell, columns the predicted class and last missed cells.
            ``names`` of the classes.
        """
        counts = np.array(self._counts).reshape(-1, len(self.names), 4)
        total = counts.sum(axis=0)
        per_image = np.array([[_pq(*c)[0] if c[0] + c[2] else np.nan for c in image] for image in counts])
        per_image = per_image.reshape(-1, len(self.names))
        binary = np.array([_pq(*c)[0] if c[0] + c[2] else np.nan for c in self._binary])
        per_class: dict[str, dict[str, float]] = {}
        for index, name in enumerate(self.names):
            tp, fp, fn, _ = total[index]
            pq, sq, rq = _pq(*total[index])
            coco = self._coco[index].compute()["mask"]
            true_type, false_type, other_type, false_cell, missed = self._typed[index]
            per_class[name] = {
                "cells": int(tp + fn),
                "detections": int(tp + fp),
                "coco_mask_ap": coco["ap"],
                "coco_mask_ap50": coco["ap50"],
                "mask_ap": self._paper[index].compute()["0.5"]["mask_ap"],
                "pq": pq,
                "sq": sq,
                "rq": rq,
                "pq_image": _mean(per_image[:, index]),
                "f1_type": _ratio(2 * true_type, 2 * true_type + 2 * false_type + 2 * other_type + false_cell + missed),
            }
        pairs, detections_alone, truths_alone, same, different = self._detected
        paired = self._confusion[:-1, :-1]
        return {
            "names": self.names,
            "per_class": per_class,
            "mask_ap": _mean(np.array([one["mask_ap"] for one in per_class.values()])),
            "coco_mask_ap": _mean(np.array([one["coco_mask_ap"] for one in per_class.values()])),
            "mpq_plus": _mean(np.array([one["pq"] for one in per_class.values()])),
            "mpq": _mean(np.array([_mean(image) for image in per_image])),
            "bpq": _mean(binary),
            "f1_detection": _ratio(2 * pairs, 2 * pairs + detections_alone + truths_alone),
            "type_accuracy": _ratio(same, same + different),
            "accuracy": _ratio(float(np.trace(paired)), float(paired.sum())),
            "confusion": self._confusion.tolist(),
        }


def _counts(overlap: NDArray[np.float64]) -> NDArray[np.float64]:
    """TP, FP, FN and the sum of the pairs' IoU of an overlap (D, M)."""
    rows, columns = match(overlap, ABOVE_HALF)
    return np.array([len(rows), len(overlap) - len(rows), overlap.shape[1] - len(rows), overlap[rows, columns].sum()])


def _pq(tp: float, fp: float, fn: float, overlap: float) -> tuple[float, float, float]:
    """Panoptic, segmentation and recognition quality."""
    return _ratio(overlap, tp + fp / 2 + fn / 2), _ratio(overlap, tp), _ratio(tp, tp + fp / 2 + fn / 2)


def _centroids(masks: Sequence[RLE]) -> NDArray[np.float64]:
    """(R, 2) x, y of the mean pixel of each mask; of an empty one far away."""
    centroids = np.full((len(masks), 2), np.inf)
    if masks:
        for i, (crop, (x1, y1, _, _)) in enumerate(MaskCrops.from_rle(masks).pixels()):
            y, x = np.nonzero(crop)
            if len(x):
                centroids[i] = x1 + x.mean(), y1 + y.mean()
    return np.where(np.isfinite(centroids), centroids, 1e9)


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of those that are defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")

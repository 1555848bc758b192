"""Average precision and mean IoU as the paper defines them (section 3). Letters as in the package."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kg_detectron.metrics.iou import RLE, box_intersection, box_iou, checked_image, checked_ious, mask_iou


def average_precision(scores: ArrayLike, hits: ArrayLike, positives: int) -> float:
    """Area under the envelope of the precision-recall curve, as in PASCAL VOC since 2010.

    With the detections by falling score, TP(n) hits and FP(n) misses among the first n, recall r(n) = TP(n) / positives
    and precision p(n) = TP(n) / n, this is ``sum over n of (r(n) - r(n-1)) * max over m >= n of p(m)``, with r(0) = 0.

    Args:
        scores: (D,) of all images together; equal ones keep the order in which they are given.
        hits: (D,) bool, whether a detection is a true positive.
        positives: ground truths of all images together.
    Returns:
        A fraction of 0..1, or nan without any ground truth.

    Example:
        >>> average_precision([0.9, 0.8, 0.7], [True, False, True], positives=2)
        0.8333333333333333
    """
    if positives == 0:
        return float("nan")
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    hits = np.asarray(hits, dtype=bool)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / positives)  # recall rises by 1 / positives at every hit, and nowhere else


def claim_best(overlap: NDArray[np.float64], ious: Sequence[float]) -> NDArray[np.int64]:
    """Which ground truth every detection takes, by the rule of `PaperMetrics`.

    Args:
        overlap: (D,M) IoU, detections by falling score.
        ious: T thresholds.
    Returns:
        (T,D) the ground truth of a true positive, -1 for a false positive.
    """
    taken = np.full((len(ious), len(overlap)), -1, dtype=np.int64)
    if overlap.size == 0:
        return taken
    best, best_overlap = overlap.argmax(axis=1), overlap.max(axis=1)
    for t, iou in enumerate(ious):
        candidates = np.flatnonzero(best_overlap >= iou)
        _, first = np.unique(best[candidates], return_index=True)  # the highest score that claims a ground truth
        taken[t, candidates[first]] = best[candidates[first]]
    return taken


class PaperMetrics:
    """Box AP, mask AP and mean mask IoU as the paper reports them (section 3, "Evaluation Metrics").

    At a threshold t, detections of an image come by falling score. Each looks for the ground truth that it overlaps
    best, among all of them, taken or not (of equals, the first given). If that IoU is at least t and no earlier
    detection took that ground truth, it is a true positive, otherwise a false positive: there is no second best. AP is
    `average_precision` over the detections of all images together. For masks, a ground truth competes only where its
    box meets the detection's with an area above 0; mean mask IoU is the mean over the mask true positives.

    Equal scores keep their order: of the images as they were added, and of the detections in an image.
    """

    def __init__(self, ious: Sequence[float] = (0.5, 0.7)) -> None:
        self.ious = checked_ious(ious)
        self._positives = 0
        self._scores: list[NDArray[np.float64]] = []  # per image (D,), falling
        self._mask_ious: list[NDArray[np.float64]] = []  # per image (D,), of the best ground truth
        self._box_hits: list[NDArray[np.bool_]] = []  # per image (T,D)
        self._mask_hits: list[NDArray[np.bool_]] = []  # per image (T,D)

    def update(
        self,
        gt_boxes: ArrayLike,
        gt_masks: Sequence[RLE],
        boxes: ArrayLike,
        scores: ArrayLike,
        masks: Sequence[RLE],
    ) -> None:
        """Add one image; call it for images without detections or without ground truth too.

        Args:
            gt_boxes, gt_masks: (M,4) and M masks of the ground truth.
            boxes, scores, masks: (D,4), (D,) and D masks of the detections, in any order; scores at least 0.
        Raises:
            ValueError: wrong shapes, different lengths, boxes that are not finite or end before they begin, scores that
                are negative or not finite, masks of different sizes. Nothing is added then.
        """
        gt_boxes, boxes, scores = checked_image(gt_boxes, gt_masks, boxes, scores, masks)
        order = np.argsort(-scores, kind="stable")
        boxes, scores, masks = boxes[order], scores[order], [masks[i] for i in order]
        mask_overlap = np.where(box_intersection(boxes, gt_boxes) > 0, mask_iou(masks, gt_masks), 0.0)

        self._positives += len(gt_boxes)
        self._scores.append(scores)
        self._mask_ious.append(mask_overlap.max(axis=1, initial=0.0))
        self._box_hits.append(self._hits(box_iou(boxes, gt_boxes)))
        self._mask_hits.append(self._hits(mask_overlap))

    def compute(self) -> dict[str, dict[str, float]]:
        """The figures of all images so far: ``{"0.5": {"box_ap": .., "mask_ap": .., "mean_mask_iou": ..}, ..}``.

        Fractions of 0..1. The APs are nan without any ground truth; mean_mask_iou is nan without a true positive.
        """
        scores = np.concatenate([np.zeros(0), *self._scores])
        mask_ious = np.concatenate([np.zeros(0), *self._mask_ious])
        none = np.zeros((len(self.ious), 0), dtype=bool)
        box_hits = np.concatenate([none, *self._box_hits], axis=1)
        mask_hits = np.concatenate([none, *self._mask_hits], axis=1)
        return {
            f"{iou:g}": {
                "box_ap": average_precision(scores, box_hits[t], self._positives),
                "mask_ap": average_precision(scores, mask_hits[t], self._positives),
                "mean_mask_iou": float(mask_ious[mask_hits[t]].mean()) if mask_hits[t].any() else float("nan"),
            }
            for t, iou in enumerate(self.ious)
        }

    def _hits(self, overlap: NDArray[np.float64]) -> NDArray[np.bool_]:
        return claim_best(overlap, self.ious) >= 0

"""Scores of instance segmentation, from boxes and run-length encoded masks. NumPy and pycocotools only.

Letters: M ground truths and D detections of one image, T thresholds. A box is four numbers (x1, y1, x2, y2) of area
(x2 - x1) * (y2 - y1), in any frame, as long as ground truths and detections share it; y before x does as well. A mask
is a compressed COCO run-length encoding: ``{"size": [height, width], "counts": str or bytes}``.

Here AP is the area under a precision-recall curve. Others give the name to TP / (TP + FP + FN), another figure.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco_mask

RLE = dict  # {"size": [height, width], "counts": str or bytes}


def box_iou(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every box with every other, (D,4) and (M,4) -> (D,M); 0 where both have no area."""
    boxes, others = _as_boxes("boxes", boxes), _as_boxes("others", others)
    intersection = _box_intersection(boxes, others)
    union = _box_area(boxes)[:, None] + _box_area(others)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def mask_iou(masks: Sequence[RLE], others: Sequence[RLE]) -> NDArray[np.float64]:
    """Intersection over union of every mask with every other, D and M masks -> (D,M); 0 where both are empty.

    Raises ValueError for a mask that is not a compressed encoding, and for masks of different sizes.
    """
    _check_masks("masks", masks)
    _check_masks("others", others)
    sizes = {tuple(mask["size"]) for mask in (*masks, *others)}
    if len(sizes) > 1:
        raise ValueError(f"masks of one image must have one size (height, width), got {sorted(sizes)}")
    if not masks or not others:  # pycocotools answers with a list here
        return np.zeros((len(masks), len(others)))
    return coco_mask.iou(list(masks), list(others), [0] * len(others))


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
    """
    if positives == 0:
        return float("nan")
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    hits = np.asarray(hits, dtype=bool)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / positives)  # recall rises by 1 / positives at every hit, and nowhere else


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
        if not len(ious) or len(set(ious)) < len(ious) or not all(0 < iou <= 1 for iou in ious):
            raise ValueError(f"ious must be distinct numbers above 0 and at most 1, at least one, got {ious!r}")
        self.ious = tuple(float(iou) for iou in ious)
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
        gt_boxes, boxes = _as_boxes("gt_boxes", gt_boxes), _as_boxes("boxes", boxes)
        scores = _as_scores(scores)
        for name, values, of, count in (
            ("gt_masks", gt_masks, "gt_boxes", len(gt_boxes)),
            ("scores", scores, "boxes", len(boxes)),
            ("masks", masks, "boxes", len(boxes)),
        ):
            if len(values) != count:
                raise ValueError(f"{name} and {of} must have one length, got {len(values)} and {count}")

        _check_masks("gt_masks", gt_masks)
        _check_masks("masks", masks)

        order = np.argsort(-scores, kind="stable")
        boxes, scores, masks = boxes[order], scores[order], [masks[i] for i in order]
        mask_overlap = np.where(_box_intersection(boxes, gt_boxes) > 0, mask_iou(masks, gt_masks), 0.0)

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
        """True positives (T,D) from the overlaps (D,M) of detections by falling score."""
        hits = np.zeros((len(self.ious), len(overlap)), dtype=bool)
        if overlap.size == 0:
            return hits
        best, best_overlap = overlap.argmax(axis=1), overlap.max(axis=1)
        for t, iou in enumerate(self.ious):
            candidates = np.flatnonzero(best_overlap >= iou)
            _, first = np.unique(best[candidates], return_index=True)  # the highest score that claims a ground truth
            hits[t, candidates[first]] = True
        return hits


def _as_boxes(name: str, boxes: ArrayLike) -> NDArray[np.float64]:
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must have the shape (number, 4), got {boxes.shape}")
    wrong = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"{name} must be finite, with x2 >= x1 and y2 >= y1; number {first} is {boxes[first].tolist()}"
        )
    return boxes


def _as_scores(scores: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"scores must have the shape (number,), got {scores.shape}")
    wrong = ~(np.isfinite(scores) & (scores >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"scores must be finite and at least 0; number {first} is {scores[first]}")
    return scores


def _check_masks(name: str, masks: Sequence[RLE]) -> None:
    for i, mask in enumerate(masks):
        encoded = isinstance(mask, dict) and isinstance(mask.get("counts"), str | bytes)
        if not encoded or len(mask.get("size", ())) != 2:
            raise ValueError(
                f"{name} must be compressed run-length encodings, dicts of size (height, width) and counts (str or"
                f" bytes); number {i} is {str(mask)[:80]}"
            )


def _box_area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _box_intersection(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area shared by every box with every other, (D,4) and (M,4) -> (D,M)."""
    upper = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    lower = np.maximum(boxes[:, None, :2], others[None, :, :2])
    return np.clip(upper - lower, 0, None).prod(axis=2)

"""How much boxes and masks overlap, and what boxes, scores and masks must be. Letters as in the package."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco_mask

from kg_detectron.cells.run_lengths import RLE


class ImageResult(NamedTuple):
    """The ground truth of an image and what was detected in it: what the metrics of ranked detections take.

    Attributes:
        gt_boxes: (M, 4) xyxy.
        gt_masks: M masks.
        boxes: (D, 4) xyxy, in any order.
        scores: (D,), at least 0.
        masks: D masks.

    Example:
        >>> from kg_detectron.metrics import PaperMetrics, ImageResult
        >>> mask = {"size": [2, 2], "counts": "02"}  # the left column
        >>> metrics = PaperMetrics()
        >>> metrics.update(*ImageResult([[0, 0, 1, 2]], [mask], [[0, 0, 1, 2]], [0.9], [mask]))
        >>> metrics.compute()["0.5"]["mask_ap"]
        1.0
    """

    gt_boxes: ArrayLike
    gt_masks: Sequence[RLE]
    boxes: ArrayLike
    scores: ArrayLike
    masks: Sequence[RLE]


def box_iou(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every box with every other, (D, 4) and (M, 4) -> (D, M); 0 where both have no area.

    Example:
        >>> box_iou([[0, 0, 2, 2]], [[0, 0, 2, 1], [5, 5, 6, 6]]).tolist()
        [[0.5, 0.0]]
    """
    boxes, others = _as_boxes("boxes", boxes), _as_boxes("others", others)
    intersection = box_intersection(boxes, others)
    union = _box_area(boxes)[:, None] + _box_area(others)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def box_intersection(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area shared by every box with every other, (D,4) and (M,4) -> (D,M)."""
    upper = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    lower = np.maximum(boxes[:, None, :2], others[None, :, :2])
    return np.clip(upper - lower, 0, None).prod(axis=2)


def mask_iou(masks: Sequence[RLE], others: Sequence[RLE]) -> NDArray[np.float64]:
    """Intersection over union of every mask with every other, D and M masks -> (D,M); 0 where both are empty.

    Raises ValueError for a mask that is not a compressed encoding, and for masks of different sizes.
    """
    _check_masks("masks", masks)
    _check_masks("others", others)
    _check_sizes([*masks, *others])
    if not masks or not others:  # pycocotools answers with a list here
        return np.zeros((len(masks), len(others)))
    return coco_mask.iou(list(masks), list(others), [0] * len(others))


def checked_ious(ious: Sequence[float]) -> tuple[float, ...]:
    """Thresholds of intersection over union; a ValueError where they are none, not distinct, or not in (0, 1]."""
    if not len(ious) or len(set(ious)) < len(ious) or not all(0 < iou <= 1 for iou in ious):
        raise ValueError(f"ious must be distinct numbers above 0 and at most 1, at least one, got {ious!r}")
    return tuple(float(iou) for iou in ious)


def checked_image(
    gt_boxes: ArrayLike, gt_masks: Sequence[RLE], boxes: ArrayLike, scores: ArrayLike, masks: Sequence[RLE]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Ground truths and detections of one image, checked: gt_boxes (M,4), boxes (D,4) and scores (D,) as arrays.

    Raises:
        ValueError: wrong shapes, different lengths, boxes that are not finite or end before they begin, scores that
            are negative or not finite, masks of different sizes or that are not compressed encodings.
    """
    gt_boxes, boxes = _as_boxes("gt_boxes", gt_boxes), _as_boxes("boxes", boxes)
    scores = _as_scores(scores)
    for name, values, partner, count in (
        ("gt_masks", gt_masks, "gt_boxes", len(gt_boxes)),
        ("scores", scores, "boxes", len(boxes)),
        ("masks", masks, "boxes", len(boxes)),
    ):
        if len(values) != count:
            raise ValueError(f"{name} and {partner} must have one length, got {len(values)} and {count}")
    _check_masks("gt_masks", gt_masks)
    _check_masks("masks", masks)
    _check_sizes([*gt_masks, *masks])
    return gt_boxes, boxes, scores


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


def _check_sizes(masks: Sequence[RLE]) -> None:
    sizes = {tuple(mask["size"]) for mask in masks}
    if len(sizes) > 1:
        raise ValueError(f"masks of one image must have one size (height, width), got {sorted(sizes)}")


def _box_area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

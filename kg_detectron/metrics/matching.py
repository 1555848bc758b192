"""Figures of a one-to-one matching at thresholds of IoU: F1, the DSB score, panoptic quality.

Letters as in the package. Masks may overlap; scores play no part.
"""

from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import NDArray

from kg_detectron.metrics.iou import RLE, checked_ious, mask_iou

# The thresholds over which the 2018 Data Science Bowl took its mean; COCO has the same.
DSB_IOUS = tuple(percent / 100 for percent in range(50, 100, 5))


def match(overlap: NDArray[np.float64], iou: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair detections with ground truths, each at most once, where they overlap by at least `iou`.

    Of all ways to do so it takes one with the most pairs, and of those one with the greatest sum of overlaps. From an
    IoU of 0.5 upwards there is only one way, and it is StarDist's, unless cells of one side overlap each other.

    Args:
        overlap: (D,M), intersections over union.
        iou: above 0.
    Returns:
        The K pairs: indices of the detections (K,), rising, and of their ground truths (K,).

    Example:
        >>> [side.tolist() for side in match(np.array([[0.6, 0.0], [0.3, 0.7]]), 0.5)]
        [[0, 1], [0, 1]]
    """
    rows, columns = np.nonzero(overlap >= iou)
    if len(set(rows)) == len(rows) and len(set(columns)) == len(columns):
        return rows, columns
    # Cells compete only within a group of overlapping ones, which is small however large the image.
    count = overlap.shape[0]
    edges = scipy.sparse.coo_array((np.ones(len(rows)), (rows, columns + count)), shape=(sum(overlap.shape),) * 2)
    group = scipy.sparse.csgraph.connected_components(edges, directed=False)[1][rows]
    pairs = []
    for pair in np.split(np.argsort(group, kind="stable"), np.flatnonzero(np.diff(np.sort(group))) + 1):
        group_rows, group_columns = np.unique(rows[pair]), np.unique(columns[pair])
        part = overlap[np.ix_(group_rows, group_columns)]
        # One more pair outweighs any sum of overlaps: that of all pairs comes to 1/2 at most.
        worth = np.where(part >= iou, 1 + part / (2 * min(part.shape)), 0)
        i, j = scipy.optimize.linear_sum_assignment(worth, maximize=True)
        hit = part[i, j] >= iou
        pairs.append(np.stack((group_rows[i[hit]], group_columns[j[hit]])))
    rows, columns = np.concatenate(pairs, axis=1)
    order = np.argsort(rows)
    return rows[order], columns[order]


class MatchingMetrics:
    """What a one-to-one matching of masks (`match`) at each threshold t finds.

    TP are the pairs of an image, FP its detections without a partner, FN its ground truths without one.

    Over all images together, from the sums of TP, FP and FN, as StarDist's ``matching_dataset`` does by default:

    - ``precision`` TP / (TP + FP), ``recall`` TP / (TP + FN), ``f1`` 2 TP / (2 TP + FP + FN);
    - ``accuracy`` TP / (TP + FP + FN);
    - ``sq``, segmentation quality: the mean IoU of the pairs;
    - ``pq``, panoptic quality: the sum of the pairs' IoU / (TP + FP/2 + FN/2) = sq * f1 (Kirillov et al. 2019, Eq. 1,
      at t = 0.5; f1 is called recognition quality, RQ, there, and an IoU of exactly 0.5 is no pair).

    As a mean over the images, as the 2018 Data Science Bowl (DSB) did:

    - ``dsb_score`` TP / (TP + FP + FN) of each image; one without cells and detections has none and does not count.

    Example:
        >>> left, right = {"size": [2, 2], "counts": "02"}, {"size": [2, 2], "counts": "22"}  # columns
        >>> metrics = MatchingMetrics([0.5])
        >>> metrics.update([left, right], [left])
        >>> metrics.compute()["0.5"]["f1"]
        0.6666666666666666
    """

    def __init__(self, ious: Sequence[float] = (0.5, 0.7)) -> None:
        self.ious = checked_ious(ious)
        self._counts: list[tuple[int, int]] = []  # per image M, D
        self._pairs: list[list[int]] = []  # per image (T,), TP
        self._overlaps: list[list[float]] = []  # per image (T,), sum of the pairs' IoU

    def update(self, gt_masks: Sequence[RLE], masks: Sequence[RLE]) -> None:
        """Add one image: M and D masks; raises ValueError for masks of different sizes."""
        overlap = mask_iou(masks, gt_masks)
        matches = [match(overlap, iou) for iou in self.ious]
        self._counts.append((len(gt_masks), len(masks)))
        self._pairs.append([len(rows) for rows, _ in matches])
        self._overlaps.append([float(overlap[rows, columns].sum()) for rows, columns in matches])

    def compute(self) -> dict[str, dict[str, float]]:
        """The figures of all images so far: ``{"0.5": {"tp": .., "fp": .., "fn": .., "precision": .., ..}, ..}``.

        Counts are int; a figure whose denominator is 0 is nan.
        """
        gt, detections = np.array(self._counts, dtype=int).reshape(-1, 2).T
        figures = {}
        for t, iou in enumerate(self.ious):
            pairs = np.array([image_pairs[t] for image_pairs in self._pairs], dtype=int)
            overlap = sum(image_overlaps[t] for image_overlaps in self._overlaps)
            union = gt + detections - pairs
            tp, fp, fn = int(pairs.sum()), int((detections - pairs).sum()), int((gt - pairs).sum())
            figures[f"{iou:g}"] = {
                "tp": tp,
                "fp": fp,
                "fn": fn,
                "precision": _ratio(tp, tp + fp),
                "recall": _ratio(tp, tp + fn),
                "f1": _ratio(2 * tp, 2 * tp + fp + fn),
                "accuracy": _ratio(tp, tp + fp + fn),
                "sq": _ratio(overlap, tp),
                "pq": _ratio(overlap, tp + fp / 2 + fn / 2),
                "dsb_score": _ratio((pairs[union > 0] / union[union > 0]).sum(), int(np.count_nonzero(union))),
            }
        return figures

    def per_image(self) -> list[dict[str, dict[str, float]]]:
        """For each image, in the order of `update`: ``{"0.5": {"tp": .., "fp": .., "fn": .., "f1": ..}, ..}``."""
        figures = []
        for (gt, detections), pairs in zip(self._counts, self._pairs, strict=True):
            figures.append(
                {
                    f"{iou:g}": {
                        "tp": tp,
                        "fp": detections - tp,
                        "fn": gt - tp,
                        "f1": _ratio(2 * tp, gt + detections),
                    }
                    for iou, tp in zip(self.ious, pairs, strict=True)
                }
            )
        return figures


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")

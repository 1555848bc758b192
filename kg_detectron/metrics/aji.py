"""Figures of areas in pixels: the aggregated Jaccard index and the foreground's Dice. Letters as in the package."""

import math
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from kg_detectron.cells.run_lengths import RLE, mask_areas
from kg_detectron.metrics.iou import mask_iou


class AreaMetrics:
    """The aggregated Jaccard index and the foreground's Dice coefficient.

    ``aji``, the mean over the images of the index of Kumar et al. 2017 (A Dataset and a Technique for Generalized
    Nuclear Segmentation for Computational Pathology, IEEE TMI 36(7), algorithm 1). In an image every ground truth G_i
    chooses the detection P_j(i) of the greatest IoU, which others may have chosen too (of equals, the first given):

        AJI = sum_i |G_i and P_j(i)| / (sum_i |G_i or P_j(i)| + sum of |P_k| over the detections that nobody chose)

    A ground truth that meets no detection adds its own area to the denominator. This is not AJI+ (Graham et al. 2019),
    where a detection serves one ground truth only. An image without cells and detections has none and does not count.

    ``foreground_dice``, over the pixels of all images together, cells not told apart: with G the union of the ground
    truths' masks and P that of the detections', 2 |G and P| / (|G| + |P|).

    Example:
        >>> mask = {"size": [2, 2], "counts": "02"}  # the left column
        >>> metrics = AreaMetrics()
        >>> metrics.update([mask], [mask])
        >>> metrics.compute()
        {'aji': 1.0, 'foreground_dice': 1.0}
    """

    def __init__(self) -> None:
        self._aji: list[float] = []  # per image, nan where it has none
        self._common: list[int] = []  # per image, pixels of |G and P|
        self._total: list[int] = []  # per image, pixels of |G| + |P|

    def update(self, gt_masks: Sequence[RLE], masks: Sequence[RLE]) -> None:
        """Add one image: M and D masks; raises ValueError for masks of different sizes."""
        overlap = mask_iou(masks, gt_masks)
        gt_areas, areas = mask_areas(gt_masks), mask_areas(masks)
        common, union = 0.0, float(gt_areas.sum())
        chosen = np.zeros(len(masks), dtype=bool)
        if overlap.size:
            best = overlap.argmax(axis=0)  # (M,)
            iou = overlap.max(axis=0)
            # iou = I / (A + B - I), and I is a whole number.
            intersection = np.rint(iou / (1 + iou) * (gt_areas + areas[best]))
            common = intersection.sum()
            union += (areas[best] - intersection)[iou > 0].sum()
            chosen[best[iou > 0]] = True
        union += areas[~chosen].sum()
        self._aji.append(float(common / union) if union else float("nan"))

        foreground = [coco_mask.merge(list(side)) for side in (gt_masks, masks) if side]
        self._total.append(int(mask_areas(foreground).sum()))
        both = len(foreground) == 2
        self._common.append(int(coco_mask.area(coco_mask.merge(foreground, intersect=True))) if both else 0)

    def compute(self) -> dict[str, float]:
        """``{"aji": .., "foreground_dice": ..}``; nan where no image has a cell or a detection."""
        aji = [value for value in self._aji if not math.isnan(value)]
        total = sum(self._total)
        return {
            "aji": float(np.mean(aji)) if aji else float("nan"),
            "foreground_dice": 2 * sum(self._common) / total if total else float("nan"),
        }

    def per_image(self) -> list[dict[str, float]]:
        """For each image, in the order of `update`, what `compute` gives for it alone."""
        return [
            {"aji": aji, "foreground_dice": 2 * common / total if total else float("nan")}
            for aji, common, total in zip(self._aji, self._common, self._total, strict=True)
        ]

"""Figures of areas in pixels: the aggregated Jaccard index and the foreground's Dice. Letters as in the package."""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from kg_detectron.metrics.iou import RLE, mask_iou


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
    """

    def __init__(self) -> None:
        self._aji: list[float] = []
        self._common = 0  # pixels of |G and P|, all images
        self._total = 0  # pixels of |G| + |P|, all images

    def update(self, gt_masks: Sequence[RLE], masks: Sequence[RLE]) -> None:
        """Add one image: M and D masks; raises ValueError for masks of different sizes."""
        overlap = mask_iou(masks, gt_masks)
        gt_areas, areas = _areas(gt_masks), _areas(masks)
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
        if union:
            self._aji.append(float(common / union))

        foreground = [coco_mask.merge(list(own)) for own in (gt_masks, masks) if own]
        self._total += int(_areas(foreground).sum())
        if len(foreground) == 2:
            self._common += int(coco_mask.area(coco_mask.merge(foreground, intersect=True)))

    def compute(self) -> dict[str, float]:
        """``{"aji": .., "foreground_dice": ..}``; nan where no image has a cell or a detection."""
        return {
            "aji": float(np.mean(self._aji)) if self._aji else float("nan"),
            "foreground_dice": 2 * self._common / self._total if self._total else float("nan"),
        }


def _areas(masks: Sequence[RLE]) -> np.ndarray:
    """Pixels of each mask (n,), float64, which has room for their sums."""
    # One by one: with NumPy 2, pycocotools fails on a list of more than 255.
    return np.array([coco_mask.area(mask) for mask in masks], dtype=np.float64)

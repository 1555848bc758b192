"""Scores of instance segmentation, from boxes and run-length encoded masks.

Letters: M ground truths and D detections of one image, T thresholds. A box is four numbers (x1, y1, x2, y2) of area
(x2 - x1) * (y2 - y1), in any frame, as long as ground truths and detections share it; y before x does as well. A mask
is a compressed COCO run-length encoding (`RLE`): ``{"size": [height, width], "counts": str}``.

Here AP is the area under a precision-recall curve. Others give the name to TP / (TP + FP + FN), which is ``accuracy``
here for all images together, and the DSB score as a mean over images.

Every class of metrics takes one image at a time by ``update`` and gives the figures of all of them by ``compute``:
fractions of 0..1, nan where a figure is not defined.
"""

from kg_detectron.metrics.aji import AreaMetrics
from kg_detectron.metrics.classes import ClassMetrics
from kg_detectron.metrics.coco import CocoMetrics
from kg_detectron.metrics.iou import RLE, ImageResult, box_iou, mask_iou
from kg_detectron.metrics.matching import DSB_IOUS, MatchingMetrics, match
from kg_detectron.metrics.paper import PaperMetrics, average_precision, claim_best

__all__ = [
    "DSB_IOUS",
    "RLE",
    "AreaMetrics",
    "ClassMetrics",
    "CocoMetrics",
    "ImageResult",
    "MatchingMetrics",
    "PaperMetrics",
    "average_precision",
    "box_iou",
    "claim_best",
    "mask_iou",
    "match",
]

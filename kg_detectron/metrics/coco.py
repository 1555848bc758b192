"""COCO's average precision, by pycocotools. Letters as in the package."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kg_detectron.metrics.iou import RLE, checked_image


class CocoMetrics:
    """COCO's AP of boxes and of masks, with a cap on the detections of an image that leaves crowded images whole.

    As `pycocotools.cocoeval.COCOeval` computes it for objects of all areas, all categories taken as one. At each of the
    ten thresholds 0.50, 0.55, .. 0.95 the detections of an image come by falling score, and each takes the ground truth
    of the greatest IoU that is still free; the precision-recall curve of all images together, made monotonous, is
    sampled at 101 recalls. ``ap`` is the mean over the ten thresholds, ``ap50`` that at 0.50, ``ap75`` that at 0.75.

    Args:
        max_detections: of an image, by score, that count. With COCO's own 100 a perfect detector has AP 0.505 on images
            of 200 cells.
    """

    def __init__(self, max_detections: int = 10000) -> None:
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        self.max_detections = max_detections
        self._images: list[dict] = []
        self._ground_truths: list[dict] = []
        self._detections: list[dict] = []

    def update(
        self,
        gt_boxes: ArrayLike,
        gt_masks: Sequence[RLE],
        boxes: ArrayLike,
        scores: ArrayLike,
        masks: Sequence[RLE],
    ) -> None:
        """Add one image: what `PaperMetrics.update` takes, with the same errors."""
        gt_boxes, boxes, scores = checked_image(gt_boxes, gt_masks, boxes, scores, masks)
        image_id = len(self._images) + 1
        height, width = next((mask["size"] for mask in (*gt_masks, *masks)), (0, 0))
        self._images.append({"id": image_id, "height": height, "width": width})
        _append(self._ground_truths, image_id, gt_boxes, gt_masks, np.ones(len(gt_boxes)))
        _append(self._detections, image_id, boxes, masks, scores)

    def compute(self) -> dict[str, dict[str, float]]:
        """``{"box": {"ap": .., "ap50": .., "ap75": ..}, "mask": {..}}``; nan without any ground truth."""
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            ground_truths, detections = self._index(self._ground_truths), self._index(self._detections)
            return {
                "box": self._average_precision(ground_truths, detections, "bbox"),
                "mask": self._average_precision(ground_truths, detections, "segm"),
            }

    def _index(self, annotations: list[dict]) -> COCO:
        index = COCO()
        # Copies: the evaluation writes into the annotations.
        index.dataset = {
            "images": self._images,
            "annotations": [dict(annotation) for annotation in annotations],
            "categories": [{"id": 1, "name": "cell"}],
        }
        index.createIndex()
        return index

    def _average_precision(self, ground_truths: COCO, detections: COCO, kind: str) -> dict[str, float]:
        evaluation = COCOeval(ground_truths, detections, kind)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [self.max_detections]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"].reshape(len(evaluation.params.iouThrs), -1)  # -1 without ground truth
        if (precision < 0).any():
            return dict.fromkeys(("ap", "ap50", "ap75"), float("nan"))
        return {"ap": float(precision.mean()), "ap50": float(precision[0].mean()), "ap75": float(precision[5].mean())}


def _append(
    annotations: list[dict], image_id: int, boxes: np.ndarray, masks: Sequence[RLE], scores: np.ndarray
) -> None:
    for (x1, y1, x2, y2), mask, score in zip(boxes.tolist(), masks, scores.tolist(), strict=True):
        width, height = x2 - x1, y2 - y1
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1,
                "bbox": [x1, y1, width, height],
                "area": width * height,
                "segmentation": mask,
                "score": score,
                "iscrowd": 0,
            }
        )

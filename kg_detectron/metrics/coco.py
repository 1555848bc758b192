"""COCO's average precision, by faster-coco-eval. Letters as in the package."""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import ArrayLike

from kg_detectron.io.coco import rle_annotation
from kg_detectron.io.setting import SettingError
from kg_detectron.metrics.iou import RLE, checked_image


class CocoMetrics:
    """COCO's AP of boxes and of masks, with a cap on the detections of an image that leaves crowded images whole.

    As `pycocotools.cocoeval.COCOeval` computes it for objects of all areas, all categories taken as one; the compiled
    evaluation of the package faster-coco-eval gives the same numbers in a small part of the time. At each of the
    ten thresholds 0.50, 0.55, .. 0.95 the detections of an image come by falling score, and each takes the ground truth
    of the greatest IoU that is still free; the precision-recall curve of all images together, made monotonous, is
    sampled at 101 recalls. ``ap`` is the mean over the ten thresholds, ``ap50`` that at 0.50, ``ap75`` that at 0.75.

    Args:
        max_detections: of an image, by score, that count. With COCO's own 100 a perfect detector has AP 0.505 on images
            of 200 cells.

    Example:
        >>> mask = {"size": [2, 2], "counts": "02"}  # the left column
        >>> metrics = CocoMetrics()
        >>> metrics.update([[0, 0, 1, 2]], [mask], [[0, 0, 1, 2]], [0.9], [mask])
        >>> metrics.compute()["mask"]["ap50"]
        1.0
    """

    def __init__(self, max_detections: int = 10000) -> None:
        if max_detections < 1:
            raise SettingError("max_detections", f"expected at least 1, got {max_detections}")
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
        """Add one image, by the fields of an `ImageResult`; the errors are those of `PaperMetrics.update`."""
        gt_boxes, boxes, scores = checked_image(gt_boxes, gt_masks, boxes, scores, masks)
        image_id = len(self._images) + 1
        height, width = next((mask["size"] for mask in (*gt_masks, *masks)), (0, 0))
        self._images.append({"id": image_id, "height": height, "width": width})
        _append(self._ground_truths, image_id, gt_boxes, gt_masks, np.ones(len(gt_boxes)))
        _append(self._detections, image_id, boxes, masks, scores)

    def compute(self) -> dict[str, dict[str, float]]:
        """``{"box": {"ap": .., "ap50": .., "ap75": ..}, "mask": {..}}``; nan without any ground truth."""
        if not self._ground_truths:
            return {kind: dict.fromkeys(("ap", "ap50", "ap75"), float("nan")) for kind in ("box", "mask")}
        if not self._detections:
            return {kind: dict.fromkeys(("ap", "ap50", "ap75"), 0.0) for kind in ("box", "mask")}
        return {"box": self._average_precision("bbox"), "mask": self._average_precision("segm")}

    def _average_precision(self, kind: str) -> dict[str, float]:
        evaluation = COCOeval_faster(
            self._index(self._ground_truths), self._index(self._detections), kind, print_function=_silent
        )
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [self.max_detections]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"].reshape(len(evaluation.params.iouThrs), -1)
        return {"ap": float(precision.mean()), "ap50": float(precision[0].mean()), "ap75": float(precision[5].mean())}

    def _index(self, annotations: list[dict]) -> COCO:
        index = COCO(print_function=_silent)
        # Copies: the evaluation writes into the annotations.
        index.dataset = {
            "images": self._images,
            "annotations": [dict(annotation) for annotation in annotations],
            "categories": [{"id": 1, "name": "cell"}],
        }
        index.createIndex()
        return index


def _append(
    annotations: list[dict], image_id: int, boxes: np.ndarray, masks: Sequence[RLE], scores: np.ndarray
) -> None:
    for box, mask, score in zip(boxes.tolist(), masks, scores.tolist(), strict=True):
        number = len(annotations) + 1
        annotations.append(rle_annotation(mask, image_id=image_id, annotation_id=number, box=box, score=score))


def _silent(*_: object) -> None:
    """Take what faster-coco-eval says of its progress."""

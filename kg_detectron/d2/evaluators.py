"""Evaluators: the paper's metrics, and Detectron2's COCO evaluator without its cap of 100 detections an image."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.cells.run_lengths import encode_mask
from kg_detectron.io.coco import checked_rle
from kg_detectron.metrics import RLE, PaperMetrics


class PaperEvaluator(DatasetEvaluator):
    """`PaperMetrics` of a registered dataset, in percent.

    Ground truth is the dataset's ``annotations`` (Detectron2's standard dicts) in the frame of the original image,
    boxes xyxy continuous (x2 = last pixel + 1), all categories taken as one. Predictions are ``output["instances"]``
    with ``pred_boxes`` in the same frame, ``scores`` and ``pred_masks`` (see `mask_rles`).

    Args:
        dataset_name: a name in Detectron2's DatasetCatalog.
        ious: thresholds of intersection over union.
        distributed: gather the predictions of all processes, and evaluate in the main one only.
    Raises:
        ValueError: an annotation without a mask, a crowd annotation (the paper's metrics have no such thing).
    """

    def __init__(self, dataset_name: str, ious: Sequence[float] = (0.5, 0.7), *, distributed: bool = True) -> None:
        self._dataset_name = dataset_name
        self._ious = tuple(ious)
        self._distributed = distributed
        self._ground_truth = {
            record["image_id"]: _ground_truth(record, dataset_name) for record in DatasetCatalog.get(dataset_name)
        }
        self.reset()

    def reset(self) -> None:
        self._predictions: dict[int, tuple[np.ndarray, np.ndarray, list[RLE]]] = {}  # by image_id

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep boxes, scores and encoded masks of the images in `inputs` (dicts with ``image_id``)."""
        for image, output in zip(inputs, outputs, strict=True):
            if image["image_id"] not in self._ground_truth:
                raise ValueError(f"image_id {image['image_id']!r} is not in the dataset {self._dataset_name!r}")
            instances = output["instances"]
            if not instances.has("pred_masks"):
                raise ValueError("the model's instances have no pred_masks, which the paper's metrics need")
            self._predictions[image["image_id"]] = (
                instances.pred_boxes.tensor.numpy(force=True),
                instances.scores.numpy(force=True),
                mask_rles(instances.pred_masks),
            )

    def evaluate(self, img_ids: Sequence[int] | None = None) -> OrderedDict:
        """The figures over the whole dataset, or over the images `img_ids`; an image never processed has no detections.

        Returns:
            ``{"paper": {"box_AP@0.5": .., "mask_AP@0.5": .., "IOU@0.5": .., ..}}`` in percent, nan where undefined;
            empty in all processes but the main one.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return OrderedDict()
            predictions = {image_id: prediction for part in gathered for image_id, prediction in part.items()}

        metrics = PaperMetrics(self._ious)
        nothing: tuple[np.ndarray, np.ndarray, list[RLE]] = (np.zeros((0, 4)), np.zeros(0), [])
        # In the order of the dataset, not of arrival: equal scores then rank alike on any number of processes.
        for image_id, (boxes, masks) in self._ground_truth.items():
            if img_ids is None or image_id in img_ids:
                metrics.update(boxes, masks, *predictions.get(image_id, nothing))

        figures = {}
        for iou, values in metrics.compute().items():
            figures[f"box_AP@{iou}"] = 100 * values["box_ap"]
            figures[f"mask_AP@{iou}"] = 100 * values["mask_ap"]
            figures[f"IOU@{iou}"] = 100 * values["mean_mask_iou"]
        return OrderedDict(paper=figures)


class CropCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, which encodes masks that come as crops without making them dense.

    Its own export does that one by one: 0.2 s for each cell of an image of 4096 x 4096 pixels. An annotation of id 0
    would count as missed and one of an id that comes twice would be lost: such files are numbered anew in memory.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset_name, *args, **kwargs)
        annotations = self._coco_api.dataset.get("annotations", [])
        ids = {annotation["id"] for annotation in annotations}
        if 0 in ids or len(ids) < len(annotations):
            for number, annotation in enumerate(annotations, start=1):
                annotation["id"] = number
            self._coco_api.createIndex()
        # Each class of the model needs a category, also one that this file does not have.
        self._names = {
            id: self._metadata.thing_classes[index]
            for id, index in self._metadata.get("thing_dataset_id_to_contiguous_id", {}).items()
        }
        known = {category["id"] for category in self._coco_api.dataset.get("categories", [])}
        absent = [{"id": id, "name": name} for id, name in self._names.items() if id not in known]
        if known and absent:
            self._coco_api.dataset["categories"] += absent
            self._coco_api.createIndex()

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        """As Detectron2's, which takes the classes for being in the order of their ids in the file."""
        if class_names:
            class_names = [self._names[id] for id in sorted(self._names)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the detections of the images in `inputs` (dicts with ``image_id``) as COCO results."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            fields = instances.get_fields()
            masks = fields.pop("pred_masks", None)
            results = instances_to_coco_json(Instances(instances.image_size, **fields), image["image_id"])
            if masks is not None:
                for result, rle in zip(results, mask_rles(masks), strict=True):
                    result["segmentation"] = rle
            self._predictions.append({"image_id": image["image_id"], "instances": results})


class CellEvaluators(DatasetEvaluators):
    """Several evaluators as one, whose `evaluate` takes ``img_ids``; Detectron2's own takes the whole dataset."""

    def evaluate(self, img_ids: Sequence[int] | None = None) -> OrderedDict:
        results: OrderedDict = OrderedDict()
        for evaluator in self._evaluators:
            results.update(evaluator.evaluate(img_ids=img_ids) or {})
        return results


def build_evaluators(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> CellEvaluators:
    """COCO's AP and the paper's figures on the same predictions.

    COCO's evaluation stops at 100 detections an image by default, which turns a perfect detector's AP on 200 cells into
    50; here it looks at ``TEST.COCO_MAX_DETECTIONS``. ``TEST.PAPER_IOUS`` are the thresholds of the paper's figures.

    Args:
        cfg: a config with `add_kg_config`'s keys.
        dataset_name: a registered dataset whose metadata has ``json_file``.
        output_dir: where the COCO evaluator writes ``coco_instances_results.json``; None writes nothing.
    Raises:
        ValueError: a cap below 10.
    """
    cap = cfg.TEST.COCO_MAX_DETECTIONS
    if cap < 10:  # pycocotools sorts the limits [1, 10, cap] and Detectron2 then reads the third, which would be 10
        raise ValueError(f"TEST.COCO_MAX_DETECTIONS must be at least 10, got {cap}")
    return CellEvaluators(
        [
            # Both tasks by name: else a model without any detection has no figures of masks.
            CropCOCOEvaluator(dataset_name, ("bbox", "segm"), output_dir=output_dir, max_dets_per_image=cap),
            PaperEvaluator(dataset_name, cfg.TEST.PAPER_IOUS),
        ]
    )


def mask_rles(masks: MaskCrops | Iterable[torch.Tensor | np.ndarray]) -> list[RLE]:
    """Compressed run-length encodings of masks, in the size of the image.

    Args:
        masks: `MaskCrops`, of which no whole mask is ever made, or anything that yields (H, W) boolean masks.
    """
    if isinstance(masks, MaskCrops):
        return masks.rle()
    return [encode_mask(np.asarray(torch.as_tensor(mask).cpu(), bool)) for mask in masks]


def _ground_truth(record: dict, dataset_name: str) -> tuple[np.ndarray, list[RLE]]:
    """Boxes (M,4) and M masks of one of Detectron2's dataset dicts."""
    boxes, masks = [], []
    for i, annotation in enumerate(record.get("annotations", [])):
        where = f"annotation {i} of {record['file_name']} in {dataset_name!r}"
        if annotation.get("iscrowd", 0):
            raise ValueError(f"{where} is a crowd; the paper's metrics need one annotation a cell")
        if not annotation.get("segmentation"):
            raise ValueError(f"{where} has no segmentation")
        boxes.append(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))
        try:
            masks.append(checked_rle(annotation["segmentation"], record["height"], record["width"])[0])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4), masks

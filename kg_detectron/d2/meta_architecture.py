"""Detectron2's meta-architectures: unpack `Instances`, call the core's network, pack `Instances`."""

import dataclasses
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
    detector_postprocess,
)
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.d2.classes import check_classes
from kg_detectron.d2.config import check_input, method_settings, settings_of
from kg_detectron.d2.model_files import require_all_weights, take_description, without_needless_weights
from kg_detectron.d2.registered_parts import CellBackbone, CellMaskHead, KeypointGraph, KGROIHeads
from kg_detectron.modeling import (
    InstanceNet,
    KeypointGraphNet,
    KeypointGraphSettings,
    Preprocessing,
    Scores,
    method_class,
)
from kg_detectron.modeling.precision import autocast, check_precision
from kg_detectron.modeling.preprocessing import NetworkImage, as_tensor


@META_ARCH_REGISTRY.register()
class CellInstanceSegmentation(nn.Module):
    """Any method of the core that is registered by a name, ``MODEL.CELLS.METHOD``.

    In training it takes images that `CellMapper` prepared; in evaluation raw ones, for the network has its own
    preprocessing. So `DefaultPredictor` gives what the core's `predict` gives.

    Args:
        network: the method's network.
    """

    @configurable
    def __init__(self, *, network: InstanceNet) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        check_input(cfg)
        check_classes(cfg)
        cfg = without_needless_weights(cfg)
        network = method_class(cfg.MODEL.CELLS.METHOD).build(method_settings(cfg))
        network.scores = settings_of(cfg, Scores)
        return {"network": network.accelerate(cfg.MODEL.CELLS.PRECISION, compiled=cfg.MODEL.CELLS.COMPILED)}

    @property
    def device(self) -> torch.device:
        return self.network.place.device

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        require_all_weights(self, state_dict, prefix, local_metadata)
        if not self.training:
            take_description(self.network, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training; in evaluation for each image ``instances`` in the frame of its file.

        Args:
            batched_inputs: for each image ``image``, (3, H, W) BGR; in training ``instances`` with ``gt_boxes``,
                ``gt_masks`` and ``gt_classes`` (from 0; -1 where it is not known); in evaluation ``height`` and
                ``width`` of the output where they differ from the image's.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = [inputs["image"].to(self.network.place) for inputs in batched_inputs]
        truth = [inputs["instances"].to(self.device) for inputs in batched_inputs]
        targets = [{"boxes": t.gt_boxes.tensor, "masks": t.gt_masks.tensor, "labels": t.gt_classes + 1} for t in truth]
        return self.network(images, targets)

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """``instances`` of each image: ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks`` (`MaskCrops`)."""
        results = []
        for inputs in batched_inputs:
            image = raw_image(inputs["image"])
            cells = self.network.predict_whole(image)
            size: tuple[int, int] = (inputs.get("height") or image.shape[0], inputs.get("width") or image.shape[1])
            if size != cells.size:
                ratio = size[0] / cells.size[0], size[1] / cells.size[1]
                cells = cells.in_frame(size, (1 / ratio[0], 1 / ratio[1]))
            results.append({"instances": instances_of(cells)})
        return results


def raw_image(image: Tensor) -> np.ndarray:
    """An image (3, H, W) as (H, W, 3). Floats that hold 8 or 16 bits, as of Detectron2's predictor, become those."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    if pixels.dtype.kind == "f" and pixels.max(initial=0) > 1:
        for kind in (np.uint8, np.uint16):
            integers = pixels.clip(0, np.iinfo(kind).max).astype(kind)
            if np.array_equal(integers, pixels):
                return integers
    return pixels


def instances_of(cells: Cells) -> Instances:
    """Cells as Detectron2's results; classes from 0."""
    return Instances(
        cells.size,
        pred_boxes=Boxes(cells.boxes),
        scores=cells.scores,
        pred_classes=cells.labels - 1,
        pred_masks=cells.masks,
    )


@META_ARCH_REGISTRY.register()
def KGInstanceSegmentation(cfg: CfgNode) -> nn.Module:  # noqa: N802  (the name of a meta-architecture)
    """The keypoint graph, its parts built through Detectron2's registries.

    Where all of them are ours, this is the core's network in `CellInstanceSegmentation`; otherwise a
    `CellGeneralizedRCNN`.
    """
    check_input(cfg)
    check_classes(cfg)
    cfg = without_needless_weights(cfg)
    backbone = build_backbone(cfg)
    proposals = build_proposal_generator(cfg, backbone.output_shape())
    heads = build_roi_heads(cfg, backbone.output_shape())
    ours = isinstance(backbone, CellBackbone) and isinstance(proposals, KeypointGraph) and isinstance(heads, KGROIHeads)
    if not (ours and isinstance(heads.mask_head, CellMaskHead)):
        if cfg.MODEL.CELLS.CONFIDENCE:
            raise ValueError(
                "MODEL.CELLS.CONFIDENCE: expected none, for a confidence head is fitted only to a network whose parts "
                "are all of this project"
            )
        return CellGeneralizedRCNN(backbone=backbone, proposal_generator=proposals, roi_heads=heads, **_preparing(cfg))
    # What a registered part decides itself, as SegS1MaskHead what masks are cut from, belongs to the description.
    settings = dataclasses.replace(
        settings_of(cfg, KeypointGraphSettings),
        targets=proposals.targets,
        decoding=proposals.decoder.settings,
        segmentation=heads.mask_head.core.settings,
        ranking=heads.ranking.settings,
    )
    network = KeypointGraphNet(
        settings,
        backbone=backbone.core,
        keypoint_branch=proposals.branch,
        decoder=proposals.decoder,
        segmentation=heads.mask_head.core,
        ranking=heads.ranking,
    )
    network.scores = settings_of(cfg, Scores)
    network.accelerate(cfg.MODEL.CELLS.PRECISION, compiled=cfg.MODEL.CELLS.COMPILED)
    return CellInstanceSegmentation(network=network)


def _preparing(cfg: CfgNode) -> dict[str, Any]:
    """What `CellGeneralizedRCNN` takes beside its parts."""
    return {"preprocessing": settings_of(cfg, Preprocessing), "precision": cfg.MODEL.CELLS.PRECISION}


@META_ARCH_REGISTRY.register()
class CellGeneralizedRCNN(GeneralizedRCNN):
    """Detectron2's generalised R-CNN, such as Mask R-CNN, with the core's preprocessing.

    In training it takes images that `CellMapper` prepared; in evaluation raw ones, from `DefaultPredictor` too. Its
    parts may be ours, and its masks crops of any size.

    Args:
        backbone, proposal_generator, roi_heads: see `GeneralizedRCNN`.
        preprocessing: of the images.
        precision: of the convolutions in evaluation: "float32", "bfloat16" or "float16".
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        preprocessing: Preprocessing,
        precision: str,
    ) -> None:
        super().__init__(
            backbone=backbone,
            proposal_generator=proposal_generator,
            roi_heads=roi_heads,
            pixel_mean=preprocessing.pixel_mean,
            pixel_std=preprocessing.pixel_std,
        )
        self.preprocessing = preprocessing
        self.precision = check_precision(precision)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        check_input(cfg)
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "roi_heads": build_roi_heads(cfg, backbone.output_shape()),
            **_preparing(cfg),
        }

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        require_all_weights(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Prepared images in training, raw ones in evaluation -> the network's input."""
        images = [self._prepared(inputs["image"]) for inputs in batched_inputs]
        batch = self.preprocessing.batch(images, self.backbone.size_divisibility or 1)  # ResNets say 0
        return ImageList(batch, [(image.shape[1], image.shape[2]) for image in images])

    def _prepared(self, image: Tensor) -> Tensor:
        if self.training:
            return image.to(self.device).float()
        pixels = raw_image(image)
        scale = self.preprocessing.training_scale(pixels.shape[:2])
        if scale is None:
            raise ValueError("INPUT.RESIZE: expected 'squeeze', for only the core's networks estimate a scale")
        seen = NetworkImage(pixels, self.preprocessing.levels(pixels), scale.value)
        return as_tensor(seen[:, :], self.pixel_mean)

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict[str, Instances]] | list[Instances]:
        """As in `GeneralizedRCNN`; ``pred_masks`` may be `MaskCrops` in the frame of each output image."""
        with autocast(self.precision, self.device):
            results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        processed = []
        for result, inputs in zip(results, batched_inputs, strict=True):
            size = inputs.get("height", inputs["image"].shape[1]), inputs.get("width", inputs["image"].shape[2])
            processed.append({"instances": _postprocessed(result, size)})
        return processed


def _postprocessed(result: Instances, size: tuple[int, int]) -> Instances:
    if not result.has("pred_masks") or not isinstance(result.pred_masks, MaskCrops):
        return detector_postprocess(result, *size)
    masks = result.pred_masks
    result.remove("pred_masks")
    boxes = result.pred_boxes.clone()
    boxes.scale(size[1] / result.image_size[1], size[0] / result.image_size[0])
    result.pred_boxes = boxes
    return Instances(size, **result.get_fields(), pred_masks=masks.resized(size))


class Description:
    """What checkpoints keep of the core's network, so that the core alone can load them.

    Args:
        network: the network.
    """

    def __init__(self, network: InstanceNet) -> None:
        self.network = network

    @classmethod
    def of(cls, model: nn.Module) -> "Description | None":
        """The description of a model; None where it is not one of the core's networks."""
        model = getattr(model, "module", model)  # without DistributedDataParallel
        return cls(model.network) if isinstance(model, CellInstanceSegmentation) else None

    def state_dict(self) -> dict[str, Any]:
        return self.network.description()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A resumed run is described by its own config: nothing is taken from the checkpoint."""

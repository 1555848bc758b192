"""The keypoint-graph model as parts of Detectron2's generalised R-CNN: `Instances` in, `Instances` out."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    build_mask_head,
    detector_postprocess,
)
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.inference.model_file import DESCRIPTION_KEY
from kg_detectron.modeling import (
    CellRanking,
    KeypointBranch,
    KeypointDecoder,
    ResNetC4,
    SegmentationBranch,
    build_keypoint_branch,
    jittered_boxes,
    keypoint_losses,
)
from kg_detectron.modeling.backbone import SIZE_DIVISIBILITY, STRIDES
from kg_detectron.modeling.precision import autocast, check_precision, full_precision

FEATURES = ("c0", "c1", "c2", "c3", "c4")


class KGBackbone(ResNetC4, Backbone):
    """`ResNetC4` with Detectron2's interface: a dict of c0..c4."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N,3,H,W) -> {"c0": ..., ..., "c4": ...}."""
        return dict(zip(FEATURES, super().forward(image), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=c, stride=s) for name, c, s in zip(FEATURES, self.channels, STRIDES, strict=True)
        }

    @property
    def size_divisibility(self) -> int:
        return SIZE_DIVISIBILITY


@BACKBONE_REGISTRY.register()
def build_kg_resnet_c4_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> KGBackbone:
    kg = cfg.MODEL.KEYPOINT_GRAPH
    return KGBackbone(kg.DEPTH, kg.NORM, kg.C0_CHANNELS, kg.BACKBONE_WEIGHTS or None)


@PROPOSAL_GENERATOR_REGISTRY.register()
class KeypointGraph(nn.Module):
    """Keypoint branch and decoder as a proposal generator.

    It adds the decoder maps, from the lowest scale with heads up to s4, to the dict of features, where heads behind it
    find them. In training its proposals are the ground-truth boxes, on which the paper trains the segmentation branch.
    """

    @configurable
    def __init__(
        self,
        *,
        branch: KeypointBranch,
        decoder: KeypointDecoder,
        losses: dict[str, float | None],
        in_features: list[str],
    ) -> None:
        super().__init__()
        self.branch = branch
        self.decoder = decoder
        self.losses = losses
        self.in_features = in_features

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        kg = cfg.MODEL.KEYPOINT_GRAPH
        channels = [input_shape[name].channels for name in FEATURES]
        return {
            "branch": build_keypoint_branch(kg.BRANCH, channels, kg.WIDTHS, kg.HEAD_KERNEL, kg.SCALES, kg.NORM),
            "decoder": KeypointDecoder(
                kg.RADIUS, kg.SMOOTH_SIGMA, kg.PEAK_THRESHOLD, kg.HOPS, kg.CORNER_AND_CENTRE, kg.NMS_THRESHOLD
            ),
            "losses": {
                "min_side": kg.MIN_SIDE or None,
                "heatmap_weight": kg.HEATMAP_WEIGHT,
                "single_offset_weight": kg.SINGLE_OFFSET_WEIGHT,
                "group_offset_weight": kg.GROUP_OFFSET_WEIGHT,
            },
            "in_features": list(FEATURES),
        }

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """In training the ground truth and the losses; in testing what was decoded.

        Proposals have ``proposal_boxes`` and ``objectness_logits``, in testing ``scores`` too.
        """
        maps, decoded = self.branch([features[name] for name in self.in_features])
        features.update(decoded)
        if not self.training:
            with full_precision(images.tensor.device):
                found = self.decoder(maps, images.image_sizes)
            return [_proposals(size, *f) for size, f in zip(images.image_sizes, found, strict=True)], {}
        boxes = [g.gt_boxes.tensor for g in gt_instances]
        size = images.tensor.shape[2:]
        losses = keypoint_losses(maps, boxes, size, self.decoder.radius, **self.losses)
        return [_proposals(g.image_size, b) for g, b in zip(gt_instances, boxes, strict=True)], losses


def _proposals(size: tuple[int, int], boxes: Tensor, scores: Tensor | None = None) -> Instances:
    """Without scores, proposals that are certain."""
    logits = torch.logit(boxes.new_ones(len(boxes)) if scores is None else scores, eps=1e-6)
    fields = {} if scores is None else {"scores": scores}
    return Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits, **fields)


class MaskHead(SegmentationBranch):
    """`SegmentationBranch` on named features."""

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        in_channels: list[int],
        widths: list[int],
        pixels_in_flight: int,
        margin: float,
        loss_weight: float,
        threshold: float,
        box_jitter: float = 0.0,
    ) -> None:
        if not 0 <= box_jitter < 0.5:
            raise ValueError(
                f"MODEL.KEYPOINT_GRAPH.BOX_JITTER: expected a fraction from 0 to below 0.5, got {box_jitter}"
            )
        super().__init__(in_channels, widths, pixels_in_flight, margin)
        self.in_features = in_features
        self.box_jitter = box_jitter
        self.loss_weight = loss_weight
        self.threshold = threshold

    def masks(self, features: dict[str, Tensor], instances: list[Instances]) -> list[MaskCrops]:
        """The mask crops of the ``pred_boxes`` of each image."""
        boxes = [i.pred_boxes.tensor for i in instances]
        return self.predict_masks(
            [features[name] for name in self.in_features], boxes, [i.image_size for i in instances], self.threshold
        )

    def losses(self, features: dict[str, Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        """The mask loss on the ``gt_boxes``, jittered where asked for, and ``gt_masks`` of each image."""
        boxes = [t.gt_boxes.tensor for t in targets]
        if self.box_jitter:
            boxes = [jittered_boxes(b, t.image_size, self.box_jitter) for b, t in zip(boxes, targets, strict=True)]
        loss = self.loss([features[name] for name in self.in_features], boxes, [t.gt_masks.tensor for t in targets])
        return {"loss_mask": self.loss_weight * loss}


def _mask_head_arguments(cfg: CfgNode, in_features: Sequence[str], in_channels: list[int], widths: list[int]) -> dict:
    kg = cfg.MODEL.KEYPOINT_GRAPH
    return {
        "in_features": list(in_features),
        "in_channels": in_channels,
        "widths": widths,
        "pixels_in_flight": kg.PIXELS_IN_FLIGHT,
        "margin": kg.MASK_MARGIN,
        "loss_weight": kg.MASK_WEIGHT,
        "threshold": kg.MASK_THRESHOLD,
        "box_jitter": kg.BOX_JITTER,
    }


@ROI_MASK_HEAD_REGISTRY.register()
class CropFeatureMaskHead(MaskHead):
    """The paper's segmentation branch: crops of the backbone's c0..c4."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        channels = [input_shape[name].channels for name in FEATURES]
        return _mask_head_arguments(cfg, FEATURES, channels, cfg.MODEL.KEYPOINT_GRAPH.WIDTHS)


@ROI_MASK_HEAD_REGISTRY.register()
class SegS1MaskHead(MaskHead):
    """The paper's `seg s1`: crops of the decoder map s1."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        kg = cfg.MODEL.KEYPOINT_GRAPH
        if 1 not in kg.SCALES:
            raise ValueError(f"SegS1MaskHead needs scale 1, but MODEL.KEYPOINT_GRAPH.SCALES are {kg.SCALES}")
        width = kg.WIDTHS[:1]
        return _mask_head_arguments(cfg, ("s1",), width, width)


@ROI_HEADS_REGISTRY.register()
class KGROIHeads(nn.Module):
    """Proposals are the detections; a mask is cut out for each. Classes are all 0."""

    @configurable
    def __init__(self, *, mask_head: MaskHead, ranking: CellRanking) -> None:
        super().__init__()
        self.mask_head = mask_head
        self.ranking = ranking

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        kg = cfg.MODEL.KEYPOINT_GRAPH
        return {
            "mask_head": build_mask_head(cfg, input_shape),
            "ranking": CellRanking(kg.BLUR_WEIGHT, kg.OVERLAP_SIGMA),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """In training the mask loss; in testing ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks``."""
        if self.training:
            return proposals, self.mask_head.losses(features, targets)
        detections = self.forward_with_given_boxes(features, [_detections(p) for p in proposals])
        return [self._ranked(own) for own in detections], {}

    def _ranked(self, own: Instances) -> Instances:
        own.pred_boxes = Boxes(self.mask_head.cell_boxes(own.pred_boxes.tensor, own.pred_masks))
        order, scores = self.ranking(own.pred_boxes.tensor, own.scores, own.pred_masks)
        ranked = own[order]
        ranked.scores = scores
        return ranked

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """Add ``pred_masks`` to instances that have ``pred_boxes``."""
        for own, masks in zip(instances, self.mask_head.masks(features, instances), strict=True):
            own.pred_masks = masks
        return instances


def _detections(proposals: Instances) -> Instances:
    scores = proposals.scores if proposals.has("scores") else proposals.objectness_logits.sigmoid()
    boxes = proposals.proposal_boxes
    classes = torch.zeros_like(scores, dtype=torch.long)
    return Instances(proposals.image_size, pred_boxes=boxes, scores=scores, pred_classes=classes)


@META_ARCH_REGISTRY.register()
class KGInstanceSegmentation(GeneralizedRCNN):
    """Generalised R-CNN whose masks may be crops of any size.

    Args:
        precision: of the convolutions in evaluation: "float32", "bfloat16" or "float16".
        compiled: let `torch.compile` compile the backbone and the keypoint branch.
        **parts: those of `GeneralizedRCNN`.
    """

    @configurable
    def __init__(self, *, precision: str = "float32", compiled: bool = False, **parts: object) -> None:
        super().__init__(**parts)
        self.precision = check_precision(precision)
        if compiled:
            for part in (self.backbone, getattr(self.proposal_generator, "branch", None)):
                if part is not None:
                    part.compile()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        kg = cfg.MODEL.KEYPOINT_GRAPH
        return super().from_config(cfg) | {"precision": kg.PRECISION, "compiled": kg.COMPILED}

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """As in `GeneralizedRCNN`; ``pred_masks`` are `MaskCrops` in the frame of each output image."""
        with autocast(self.precision, self.device):
            results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        processed = []
        for result, given in zip(results, batched_inputs, strict=True):
            size = given.get("height", result.image_size[0]), given.get("width", result.image_size[1])
            processed.append({"instances": _postprocess(result, size)})
        return processed


def _postprocess(result: Instances, size: tuple[int, int]) -> Instances:
    if not result.has("pred_masks") or not isinstance(result.pred_masks, MaskCrops):
        return detector_postprocess(result, *size)
    masks = result.pred_masks
    result.remove("pred_masks")
    boxes = result.pred_boxes.clone()
    boxes.scale(size[1] / result.image_size[1], size[0] / result.image_size[0])
    result.pred_boxes = boxes
    return Instances(size, **result.get_fields(), pred_masks=masks.resized(size))


class ModelDescription:
    """The arguments of `KeypointGraphNet` for a config, kept in checkpoints so that the core alone can load them."""

    KEY = DESCRIPTION_KEY

    def __init__(self, arguments: dict) -> None:
        self.arguments = arguments

    @classmethod
    def of(cls, cfg: CfgNode) -> "ModelDescription | None":
        """The description of a config's model; None where a part is not one that `KeypointGraphNet` has."""
        model, kg = cfg.MODEL, cfg.MODEL.KEYPOINT_GRAPH
        segmentation = {"CropFeatureMaskHead": "branch", "SegS1MaskHead": "s1"}.get(model.ROI_MASK_HEAD.NAME)
        parts = (model.META_ARCHITECTURE, model.BACKBONE.NAME, model.PROPOSAL_GENERATOR.NAME, model.ROI_HEADS.NAME)
        ours = ("KGInstanceSegmentation", "build_kg_resnet_c4_backbone", "KeypointGraph", "KGROIHeads")
        if parts != ours or segmentation is None:
            return None
        return cls(
            {
                "depth": kg.DEPTH,
                "norm": kg.NORM,
                "c0_channels": kg.C0_CHANNELS,
                "branch": kg.BRANCH,
                "widths": list(kg.WIDTHS),
                "head_kernel": kg.HEAD_KERNEL,
                "scales": list(kg.SCALES),
                "segmentation": segmentation,
                "radius": kg.RADIUS,
                "min_side": kg.MIN_SIDE or None,
                "heatmap_weight": kg.HEATMAP_WEIGHT,
                "single_offset_weight": kg.SINGLE_OFFSET_WEIGHT,
                "group_offset_weight": kg.GROUP_OFFSET_WEIGHT,
                "mask_weight": kg.MASK_WEIGHT,
                "smooth_sigma": kg.SMOOTH_SIGMA,
                "peak_threshold": kg.PEAK_THRESHOLD,
                "hops": kg.HOPS,
                "corner_and_centre": kg.CORNER_AND_CENTRE,
                "nms_threshold": kg.NMS_THRESHOLD,
                "blur_weight": kg.BLUR_WEIGHT,
                "overlap_sigma": kg.OVERLAP_SIGMA,
                "pixels_in_flight": kg.PIXELS_IN_FLIGHT,
                "mask_margin": kg.MASK_MARGIN,
                "mask_threshold": kg.MASK_THRESHOLD,
                "pixel_mean": list(model.PIXEL_MEAN),
                "pixel_std": list(model.PIXEL_STD),
                "normalisation": cfg.INPUT.NORMALISATION,
                "percentiles": list(cfg.INPUT.PERCENTILES),
                "input_size": list(cfg.INPUT.SIZE),
            }
        )

    def state_dict(self) -> dict:
        return {"model": self.arguments}

    def load_state_dict(self, state: dict) -> None:
        """A resumed run is described by its own config: nothing is taken from the checkpoint."""

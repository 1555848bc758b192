"""The parts of the keypoint graph in Detectron2's registries, so that a config can swap each by its name.

`KGInstanceSegmentation` takes the core's parts out of these and runs the core's network. Where one of them stands
beside a part of somebody else (an RPN, Mask R-CNN's heads), it works in the flow of Detectron2's generalised R-CNN:
`Instances` in, `Instances` out.
"""

import dataclasses
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    Backbone,
    build_mask_head,
)
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from kg_detectron.d2.config import settings_of
from kg_detectron.modeling import (
    BackboneSettings,
    CellRanking,
    ClassSettings,
    DecodingSettings,
    HeadSettings,
    KeypointBranch,
    KeypointDecoder,
    RankingSettings,
    SegmentationBranch,
    SegmentationSettings,
    TargetSettings,
    TrunkSettings,
    build_backbone,
    build_keypoint_branch,
    build_trunk,
    keypoint_losses,
)
from kg_detectron.modeling.backbone import FEATURES, STRIDES
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.segmentation_branch import build_segmentation_branch
from kg_detectron.modeling.trunk import SCALES


class CellBackbone(Backbone):
    """A backbone of the core with Detectron2's interface: a dict of c0..c4.

    Args:
        core: the backbone.
    """

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core: Any = core

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {"c0": ..., ..., "c4": ...}."""
        return dict(zip(FEATURES, self.core(image), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels = zip(FEATURES, self.core.channels, STRIDES, strict=True)
        return {name: ShapeSpec(channels=c, stride=s) for name, c, s in channels}

    @property
    def size_divisibility(self) -> int:
        return self.core.divisor


@BACKBONE_REGISTRY.register()
def build_kg_resnet_c4_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> CellBackbone:
    """The backbone ``MODEL.CELLS.BACKBONE``, of any that is registered with the core."""
    return CellBackbone(build_backbone(settings_of(cfg, BackboneSettings)))


class CellPyramid(FPN):
    """A feature pyramid p2..p5, strides 4..32, on c2..c4 of a backbone of the core. p5 is every other value of p4.

    Args:
        core: the backbone; its layers for c0 are taken out, as nothing would train them.
        channels: of every level.
        norm: norm layers of the pyramid, by Detectron2's name.
    """

    def __init__(self, core: nn.Module, channels: int, norm: str) -> None:
        top = LastLevelMaxPool()
        top.in_feature = "p4"
        super().__init__(DeepCellBackbone(core), FEATURES[2:], channels, norm, top)

    @property
    def size_divisibility(self) -> int:
        return max(self.bottom_up.size_divisibility, STRIDES[-1])


class DeepCellBackbone(CellBackbone):
    """A backbone of the core without c0, and without the layers that only c0 needs."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__(core)
        del self.core.c0_conv

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {"c1": ..., ..., "c4": ...}."""
        return dict(zip(FEATURES[1:], self.core.deep_features(image), strict=True))


@BACKBONE_REGISTRY.register()
def build_kg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> CellPyramid:
    """A feature pyramid on the backbone ``MODEL.CELLS.BACKBONE``: Mask R-CNN on the backbone of a keypoint graph."""
    core = build_backbone(settings_of(cfg, BackboneSettings))
    return CellPyramid(core, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM)


def _core_features(features: dict[str, Tensor]) -> list[Tensor]:
    return [features[name] for name in FEATURES]


@PROPOSAL_GENERATOR_REGISTRY.register()
class KeypointGraph(nn.Module):
    """Keypoint branch and decoder as a proposal generator.

    It adds the decoder maps, from the lowest scale with heads up to s4, to the dict of features, where heads behind it
    find them. In training its proposals are the ground-truth boxes, on which the paper trains the segmentation branch.
    """

    @configurable
    def __init__(self, *, branch: KeypointBranch, decoder: KeypointDecoder, targets: TargetSettings) -> None:
        super().__init__()
        self.branch = branch
        self.decoder = decoder
        self.targets = targets

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        heads, targets = settings_of(cfg, HeadSettings), settings_of(cfg, TargetSettings)
        norm = settings_of(cfg, BackboneSettings).norm
        channels = [input_shape[name].channels for name in FEATURES]
        trunk = build_trunk(settings_of(cfg, TrunkSettings), channels, norm, min(heads.scales))
        return {
            "branch": build_keypoint_branch(heads, trunk, norm),
            "decoder": KeypointDecoder(targets.radius, settings_of(cfg, DecodingSettings)),
            "targets": targets,
        }

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """In training the ground truth and the losses; in testing what was decoded.

        Proposals have ``proposal_boxes`` and ``objectness_logits``, in testing ``scores`` too.
        """
        maps, decoded = self.branch(_core_features(features))
        features.update({f"s{scale}": value for scale, value in decoded.items()})
        if not self.training:
            with full_precision(images.tensor.device):
                detections = self.decoder(maps, images.image_sizes)
            return [_proposals(size, *d) for size, d in zip(images.image_sizes, detections, strict=True)], {}
        assert gt_instances is not None, "training needs ground truth"
        boxes = [g.gt_boxes.tensor for g in gt_instances]
        losses = keypoint_losses(maps, boxes, images.tensor.shape[2:], self.targets)
        return [_proposals(g.image_size, b) for g, b in zip(gt_instances, boxes, strict=True)], losses


def _proposals(size: tuple[int, int], boxes: Tensor, scores: Tensor | None = None) -> Instances:
    """Without scores, proposals that are certain."""
    logits = torch.logit(boxes.new_ones(len(boxes)) if scores is None else scores, eps=1e-6)
    fields = {} if scores is None else {"scores": scores}
    return Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits, **fields)


class CellMaskHead(nn.Module):
    """A segmentation branch on named features.

    Args:
        core: the branch.
    """

    cut_from = "features"

    @configurable
    def __init__(self, *, core: SegmentationBranch) -> None:
        super().__init__()
        self.core = core

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        settings = settings_of(cfg, SegmentationSettings)
        if settings.cut_from not in ("features", cls.cut_from):
            raise ValueError(
                f"MODEL.CELLS.CUT_FROM: {settings.cut_from!r} does not go with MODEL.ROI_MASK_HEAD.NAME "
                f"{cls.__name__}, which cuts from {cls.cut_from!r}"
            )
        settings = dataclasses.replace(settings, cut_from=cls.cut_from)
        channels = [input_shape[name].channels for name in FEATURES]
        lowest = min(settings_of(cfg, HeadSettings).scales)
        widths, classes = settings_of(cfg, TrunkSettings).widths, settings_of(cfg, ClassSettings)
        return {"core": build_segmentation_branch(settings, channels, widths, lowest, classes)}

    def maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The maps that crops are cut from."""
        decoded = {scale: features[f"s{scale}"] for scale in SCALES if f"s{scale}" in features}
        return self.core.maps(_core_features(features), decoded)


@ROI_MASK_HEAD_REGISTRY.register()
class CropFeatureMaskHead(CellMaskHead):
    """The paper's segmentation branch: crops of the backbone's c0..c4."""


@ROI_MASK_HEAD_REGISTRY.register()
class SegS1MaskHead(CellMaskHead):
    """The paper's `seg s1`: crops of the decoder map s1."""

    cut_from = "s1"


@ROI_HEADS_REGISTRY.register()
class KGROIHeads(nn.Module):
    """Proposals are the detections; a mask is cut out for each, and its class told by the features inside it."""

    @configurable
    def __init__(self, *, mask_head: CellMaskHead, ranking: CellRanking) -> None:
        super().__init__()
        self.mask_head = mask_head
        self.ranking = ranking

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return {
            "mask_head": build_mask_head(cfg, input_shape),
            "ranking": CellRanking(settings_of(cfg, RankingSettings)),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """In training the losses of masks and classes; in testing instances.

        These have ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks``.
        """
        branch, maps = self.mask_head.core, self.mask_head.maps(features)
        if self.training:
            assert targets is not None, "training needs ground truth"
            boxes = [t.gt_boxes.tensor for t in targets]
            labels = [t.gt_classes + 1 for t in targets]
            return proposals, branch.losses(maps, boxes, [t.gt_masks.tensor for t in targets], labels)
        boxes = [p.proposal_boxes.tensor for p in proposals]
        segmented = branch.predict_cells(maps, boxes, [p.image_size for p in proposals])
        results = []
        for proposal, box, (mask, classes, confidence) in zip(proposals, boxes, segmented, strict=True):
            scores = proposal.scores if proposal.has("scores") else proposal.objectness_logits.sigmoid()
            box = branch.cell_boxes(box, mask)
            order, scores = self.ranking(box, scores, mask, confidence)
            fields = {"pred_boxes": Boxes(box[order]), "scores": scores, "pred_classes": classes[order] - 1}
            results.append(Instances(proposal.image_size, **fields, pred_masks=mask[order]))
        return results, {}

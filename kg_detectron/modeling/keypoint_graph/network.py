"""The keypoint graph: keypoints to boxes, and a mask in each box (paper, figure 1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from kg_detectron.cells import Cells
from kg_detectron.modeling.backbone import build_backbone
from kg_detectron.modeling.instance_net import InstanceNet, cells_of_image
from kg_detectron.modeling.keypoint_graph.decoding import KeypointDecoder
from kg_detectron.modeling.keypoint_graph.heads import KeypointBranch, KeypointMaps, build_keypoint_branch
from kg_detectron.modeling.keypoint_graph.losses import keypoint_losses
from kg_detectron.modeling.keypoint_graph.settings import KeypointGraphSettings
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.ranking import CellRanking
from kg_detectron.modeling.scores import Scores
from kg_detectron.modeling.segmentation_branch import SegmentationBranch, Segmented, build_segmentation_branch
from kg_detectron.modeling.trunk import build_trunk


@register_method("keypoint_graph")
class KeypointGraphNet(InstanceNet):
    """Keypoint-graph instance segmentation.

    Args:
        settings: of all parts, see `KeypointGraphSettings`; those of ``targets`` are used in training.
        backbone: image -> c0..c4, see `Backbone`.
        keypoint_branch: c0..c4 -> keypoint maps and decoder maps.
        decoder: keypoint maps -> boxes.
        segmentation: boxes and maps -> masks.
        ranking: scores after segmentation.
    """

    Settings: ClassVar[type] = KeypointGraphSettings
    tiled: ClassVar[bool] = True

    def __init__(
        self,
        settings: KeypointGraphSettings,
        *,
        backbone: Any,
        keypoint_branch: KeypointBranch,
        decoder: KeypointDecoder,
        segmentation: SegmentationBranch,
        ranking: CellRanking,
    ) -> None:
        super().__init__(settings)
        self.backbone = backbone
        self.divisor = self.backbone.divisor
        self.keypoint_branch = keypoint_branch
        self.decoder = decoder
        self.segmentation = segmentation
        self.ranking = ranking

    @classmethod
    def build(cls, settings: KeypointGraphSettings | None = None) -> "KeypointGraphNet":
        """The network of settings (the paper's by default)."""
        settings = settings or KeypointGraphSettings()
        backbone: Any = build_backbone(settings.backbone)
        norm, lowest = settings.backbone.norm, min(settings.heads.scales)
        trunk = build_trunk(settings.trunk, backbone.channels, norm, lowest)
        return cls(
            settings,
            backbone=backbone,
            keypoint_branch=build_keypoint_branch(settings.heads, trunk, norm),
            decoder=KeypointDecoder(settings.targets.radius, settings.decoding),
            segmentation=build_segmentation_branch(
                settings.segmentation, backbone.channels, settings.trunk.widths, lowest, settings.classes
            ),
            ranking=CellRanking(settings.ranking),
        )

    def dense_modules(self) -> list[nn.Module]:
        return [self.backbone, self.keypoint_branch]

    # `kg_detectron.inference.dense_part` may put the same maps by another library in the place of `maps`. They hold the
    # weights of then.

    def train(self, mode: bool = True) -> "KeypointGraphNet":
        if mode:
            vars(self).pop("maps", None)
        return super().train(mode)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        vars(self).pop("maps", None)
        return super().load_state_dict(*args, **options)

    def losses(
        self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor], labels: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        maps, crop_maps = self.maps(batch)
        losses = keypoint_losses(maps, boxes, (batch.shape[2], batch.shape[3]), self.settings.targets)
        return losses | self.segmentation.losses(crop_maps, boxes, masks, labels)

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        return self.find_above(batch, sizes, 0.0, self.scores)

    def find_above(
        self, batch: Tensor, sizes: Sequence[tuple[int, int]], min_score: float, scores: Scores
    ) -> list[Cells]:
        maps, crop_maps = self.maps(batch)
        boxes, raw = self.boxes(maps, sizes)
        del maps  # large, as are those of masks
        if min_score > 0:
            wanted = [self.can_reach(min_score, raw_of_image, scores) for raw_of_image in raw]
            boxes = [b[w] for b, w in zip(boxes, wanted, strict=True)]
            raw = [r[w] for r, w in zip(raw, wanted, strict=True)]
        segmented = self.segmentation.predict_cells(crop_maps, boxes, sizes)
        return [self.finish(*cells) for cells in zip(boxes, raw, segmented, strict=True)]

    # The stages, which tiles and explanations call too.

    def maps(self, batch: Tensor) -> tuple[list[KeypointMaps], list[Tensor]]:
        """Images (N, 3, h, w) -> the keypoint maps of each scale, and the maps that masks are cut from."""
        if 1 in self.keypoint_branch.trunk.scales or self.is_compiled:
            features = self.backbone(batch)
            maps, decoded = self.keypoint_branch(features)
        else:  # c0, the largest map, is made when those of the trunk are gone
            features = [batch, *self.backbone.deep_features(batch)]
            maps, decoded = self.keypoint_branch(features)
            decoded.clear()
            features[0] = self.backbone.image_features(batch)
        return maps, self.segmentation.maps(features, decoded)

    def boxes(self, maps: list[KeypointMaps], sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Keypoint maps -> for each image boxes (R, 4), xyxy continuous input pixels, and scores (R,), falling."""
        with full_precision(maps[0].heatmap.device):
            detections = self.decoder(maps, sizes)
        return [boxes for boxes, _ in detections], [scores for _, scores in detections]

    def can_reach(self, min_score: float, raw: Tensor, scores: Scores | None = None) -> Tensor:
        """(R,) whether cells of raw scores (R,) of `boxes` may come to a probability of ``min_score`` or more.

        `finish` only lowers scores, and a score that is lower to begin with lowers no higher one: so what cannot reach
        it, however large its mask turns out, may be left out before its mask is made, and the others stay as they are.
        """
        return (scores or self.scores).at_most(self.ranking.at_most(raw)) >= min_score

    def finish(self, boxes: Tensor, scores: Tensor, segmented: Segmented, blur: Tensor | None = None) -> Cells:
        """Boxes, scores, masks and classes of one image -> its cells, ranked.

        Args:
            boxes: (R, 4), scores: (R,), falling, segmented: of the boxes.
            blur: (R,) `CellRanking.blur` of the masks, where they have lost their probabilities.
        """
        masks, labels, confidence = segmented
        boxes = self.segmentation.cell_boxes(boxes, masks)
        blur = self.ranking.blur(masks) if blur is None else blur
        order, scores = self.ranking.rank(boxes, scores, blur, confidence)
        return cells_of_image(boxes[order], scores, masks[order], labels[order])

"""CornerNet: cells as pairs of corners of their boxes (Law and Deng, ECCV 2018)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.modeling.classes import ClassBalance
from kg_detectron.modeling.cornernet.decoding import decode_corners
from kg_detectron.modeling.cornernet.heads import CornerHeads, CornerMaps
from kg_detectron.modeling.cornernet.losses import corner_losses
from kg_detectron.modeling.cornernet.settings import CornerNetSettings
from kg_detectron.modeling.cornernet.targets import corner_targets
from kg_detectron.modeling.instance_net import cells_of_image
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.segmentation_branch import SegmentationBranch, build_segmentation_branch
from kg_detectron.modeling.trunk_net import TrunkNet


@register_method("cornernet")
class CornerNet(TrunkNet):
    """CornerNet on the shared backbone and trunk; masks are an option, see `CornerHeadSettings`."""

    Settings: ClassVar[type] = CornerNetSettings

    def __init__(self, settings: CornerNetSettings) -> None:
        heads = settings.heads
        super().__init__(settings, heads.scale, reads_c0=heads.masks)
        self.stride = 2 ** (heads.scale - 1)
        self.heads = CornerHeads(
            settings.trunk.widths[heads.scale - 1], heads.channels, settings.backbone.norm, len(settings.classes)
        )
        self.class_balance = ClassBalance(settings.classes)
        self.segmentation: SegmentationBranch | None = None
        if heads.masks:
            self.segmentation = build_segmentation_branch(
                settings.segmentation, self.backbone.channels, settings.trunk.widths, heads.scale
            )

    def dense_modules(self) -> list[nn.Module]:
        return [self.backbone, self.trunk, self.heads]

    def of_classes(self, name: str) -> bool:
        """The last layer of the heatmaps has a channel for each class."""
        return name.startswith(("heads.heatmap.0.2.", "heads.heatmap.1.2."))

    def losses(
        self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor], labels: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        maps, crop_maps = self.maps(batch)
        size = (batch.shape[2], batch.shape[3])
        overlap, classes = self.settings.loss.min_overlap, len(self.settings.classes)
        targets = corner_targets(boxes, size, self.stride, overlap, labels, classes)
        weights = self.class_balance.weights if classes > 1 else None
        losses = corner_losses(maps, targets, self.settings.loss, weights)
        return losses if self.segmentation is None else losses | self.segmentation.losses(crop_maps, boxes, masks)

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        maps, crop_maps = self.maps(batch)
        with full_precision(batch.device):
            found = [
                decode_corners(CornerMaps(*(m[i] for m in maps)), self.stride, size, self.settings.decoding)
                for i, size in enumerate(sizes)
            ]
        boxes, scores, labels = map(list, zip(*found, strict=True))
        if self.segmentation is None:
            masks = [filled_boxes(b, size) for b, size in zip(boxes, sizes, strict=True)]
        else:
            masks = self.segmentation.predict_masks(crop_maps, boxes, sizes)
            boxes = [self.segmentation.cell_boxes(b, m) for b, m in zip(boxes, masks, strict=True)]
        return [cells_of_image(*cells) for cells in zip(boxes, scores, masks, labels, strict=True)]

    def maps(self, batch: Tensor) -> tuple[CornerMaps, list[Tensor]]:
        """Images (N, 3, h, w) -> the corner maps, and the maps that masks are cut from (none without masks)."""
        features = self.features(batch)
        decoded = self.trunk(features)
        crop_maps = [] if self.segmentation is None else self.segmentation.maps(features, decoded)
        return self.heads(decoded[self.settings.heads.scale]), crop_maps


def filled_boxes(boxes: Tensor, size: tuple[int, int]) -> MaskCrops:
    """Masks that fill their boxes (R, 4), xyxy within an image of size (H, W), rounded to pixels, one at least."""
    limit = torch.tensor([size[1], size[0]])
    edges = boxes.detach().cpu().round().long()
    low = torch.minimum(edges[:, :2], limit - 1)
    windows = torch.cat((low, torch.maximum(edges[:, 2:], low + 1)), dim=1)
    crops = [torch.ones(y2 - y1, x2 - x1, dtype=torch.bool, device=boxes.device) for x1, y1, x2, y2 in windows.tolist()]
    return MaskCrops(crops, windows, size)

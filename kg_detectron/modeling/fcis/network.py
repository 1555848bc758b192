"""FCIS: regions that are classified and segmented by the same position-sensitive maps (Li et al., CVPR 2017)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kg_detectron.cells import Cells
from kg_detectron.cells.cells import clip_boxes
from kg_detectron.modeling.fcis.decoding import decode_regions
from kg_detectron.modeling.fcis.losses import class_logits, mask_logits, region_losses
from kg_detectron.modeling.fcis.proposals import RegionProposals
from kg_detectron.modeling.fcis.regions import SAMPLES, assembled, moved_boxes, pooled, region_rows
from kg_detectron.modeling.fcis.settings import FCISSettings
from kg_detectron.modeling.fcis.targets import region_targets
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.trunk import convolution
from kg_detectron.modeling.trunk_net import TrunkNet

# Regions of sides below this are dropped, pixels.
_SHORTEST = 2


class PositionSensitiveMaps(nn.Module):
    """Score maps and box maps from a decoder map of ``width`` channels."""

    def __init__(self, width: int, channels: int, groups: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(convolution(width, channels, 3), nn.ReLU(inplace=True))
        self.scores = nn.Conv2d(channels, 4 * groups**2, 1)  # background and cell; outside and inside
        self.boxes = nn.Conv2d(channels, 4 * groups**2, 1)

    def forward(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """(N, width, h, w) -> two of (N, 4 k k, h, w), see `assembled`."""
        hidden = self.hidden(decoded)
        return self.scores(hidden), self.boxes(hidden)


@register_method("fcis")
class FCISNet(TrunkNet):
    """FCIS on the shared backbone and trunk."""

    Settings: ClassVar[type] = FCISSettings

    def __init__(self, settings: FCISSettings) -> None:
        heads, widths = settings.heads, settings.trunk.widths
        super().__init__(settings, min(heads.scale, 3))
        self.stride = 2 ** (heads.scale - 1)
        levels = (widths[2], widths[3], self.backbone.channels[4])
        self.proposals = RegionProposals(levels, heads.channels, settings.proposals)
        self.heads = PositionSensitiveMaps(widths[heads.scale - 1], heads.channels, heads.groups)

    def dense_modules(self) -> list[nn.Module]:
        return [self.backbone, self.trunk, *self.proposals.widen, self.proposals.network.head, self.heads]

    def losses(self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
        maps, levels = self.maps(batch)
        sizes = [(m.shape[1], m.shape[2]) for m in masks]
        proposals, losses = self.proposals(batch, levels, sizes, boxes)
        settings, groups = self.settings.loss, self.settings.heads.groups
        with full_precision(batch.device):
            # With the true boxes: there is a region for each cell from the start.
            regions = [torch.cat((p, b.to(p))) for p, b in zip(proposals, boxes, strict=True)]
            threshold = self.settings.decoding.mask_threshold
            targets = region_targets(regions, boxes, masks, SAMPLES * groups, settings.positive_overlap, threshold)
            return losses | region_losses(*self.read(maps, region_rows(regions)), targets, settings)

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        maps, levels = self.maps(batch)
        proposals, _ = self.proposals(batch, levels, sizes)
        with full_precision(batch.device):
            return [
                self.find_in_image([m[i : i + 1] for m in maps], proposals[i], size) for i, size in enumerate(sizes)
            ]

    def find_in_image(self, maps: Sequence[Tensor], proposals: Tensor, size: tuple[int, int]) -> Cells:
        """The cells of one image, from its maps (1, C, h, w) and proposals (P, 4).

        Each proposal is read twice: where it lies, and where its box lies, which it tells.
        """
        first = self.read(maps, region_rows([proposals]))
        refined = clip_boxes(moved_boxes(proposals, first[1]), size)
        wide = ((refined[:, 2:] - refined[:, :2]) >= _SHORTEST).all(1)
        refined = refined[wide]
        second = self.read(maps, region_rows([refined]))
        scores = torch.cat((first[0], second[0]))
        return decode_regions(
            torch.cat((proposals, refined)),
            class_logits(scores).softmax(1)[:, 1],
            mask_logits(scores).sigmoid(),
            size,
            self.settings.decoding,
        )

    def maps(self, batch: Tensor) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """Images (N, 3, h, w) -> the position-sensitive maps, and the maps that proposals come from: s3, s4, c4."""
        features = self.features(batch)
        decoded = self.trunk(features)
        return self.heads(decoded[self.settings.heads.scale]), [decoded[3], decoded[4], features[4]]

    def read(self, maps: Sequence[Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        """What the maps say of regions (R, 5): scores (R, 2, 2, S, S), see `region_losses`, and offsets (R, 4)."""
        scores, boxes = (m.float() for m in maps)
        groups = self.settings.heads.groups
        of_samples = assembled(scores, regions, self.stride, groups)
        return of_samples.unflatten(1, (2, 2)), pooled(boxes, regions, self.stride, groups)

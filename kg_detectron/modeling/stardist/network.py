"""StarDist: every pixel of a cell tells how far its outline is along each ray (Schmidt et al., MICCAI 2018)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from kg_detectron.cells import Cells
from kg_detectron.modeling.label_maps import label_maps
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.stardist.decoding import decode_stars
from kg_detectron.modeling.stardist.losses import star_losses
from kg_detectron.modeling.stardist.settings import StarDistSettings
from kg_detectron.modeling.stardist.targets import star_targets
from kg_detectron.modeling.trunk import convolution
from kg_detectron.modeling.trunk_net import TrunkNet


class StarHeads(nn.Module):
    """Object probability and distances from a decoder map of ``width`` channels."""

    def __init__(self, width: int, channels: int, rays: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(convolution(width, channels, 3), nn.ReLU(inplace=True))
        self.probability = nn.Conv2d(channels, 1, 1)
        self.distance = nn.Conv2d(channels, rays, 1)

    def forward(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """(N, width, h, w) -> logits (N, h, w) of the object probability, and distances (N, K, h, w) in pixels."""
        hidden = self.hidden(decoded)
        return self.probability(hidden)[:, 0], self.distance(hidden)


@register_method("stardist")
class StarDistNet(TrunkNet):
    """StarDist on the shared backbone and trunk."""

    Settings: ClassVar[type] = StarDistSettings

    def __init__(self, settings: StarDistSettings) -> None:
        heads = settings.heads
        super().__init__(settings, heads.scale)
        self.stride = 2 ** (heads.scale - 1)
        self.heads = StarHeads(settings.trunk.widths[heads.scale - 1], heads.channels, heads.rays)

    def losses(self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
        logits, distances = self.maps(batch)
        labels = label_maps(masks, (batch.shape[2], batch.shape[3]))
        settings = self.settings.heads
        return star_losses(logits, distances, *star_targets(labels, self.stride, settings.rays), settings)

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        logits, distances = self.maps(batch)
        with full_precision(batch.device):
            images = zip(logits.float().sigmoid(), distances.float(), sizes, strict=True)
            return [decode_stars(p, d, self.stride, size, self.settings.decoding) for p, d, size in images]

    def maps(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, h, w) -> logits of the object probability, and distances, see `StarHeads`."""
        return self.heads(self.decoded(batch)[self.settings.heads.scale])

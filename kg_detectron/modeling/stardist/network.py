"""StarDist: every pixel of a cell tells how far its outline is along each ray (Schmidt et al., MICCAI 2018).

With several classes every pixel tells its class too, as in the published code since version 0.7 (``n_classes``;
Weigert and Schmidt, ISBIC 2022).
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from kg_detectron.cells import Cells
from kg_detectron.modeling.classes import ClassBalance, ClassSettings
from kg_detectron.modeling.label_maps import label_maps
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.stardist.decoding import decode_stars
from kg_detectron.modeling.stardist.losses import star_class_loss, star_losses
from kg_detectron.modeling.stardist.settings import StarDistSettings, StarHeadSettings
from kg_detectron.modeling.stardist.targets import star_classes, star_targets
from kg_detectron.modeling.trunk import convolution
from kg_detectron.modeling.trunk_net import TrunkNet


class StarMaps(NamedTuple):
    """The maps of StarDist."""

    probability: Tensor  # [N,h,w] logits
    distances: Tensor  # [N,K,h,w] pixels of the input
    classes: Tensor | None  # [N,1+classes,h,w] logits, of the background first; None where there is one class


class StarClassHead(ClassBalance):
    """Class logits of pixels from a decoder map of ``width`` channels."""

    def __init__(self, width: int, channels: int, settings: ClassSettings) -> None:
        super().__init__(settings)
        self.layers = nn.Sequential(
            convolution(width, channels, 3), nn.ReLU(inplace=True), nn.Conv2d(channels, 1 + len(settings), 1)
        )

    def forward(self, decoded: Tensor) -> Tensor:
        """(N, width, h, w) -> logits (N, 1 + classes, h, w), of the background first."""
        return self.layers(decoded)

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """`star_class_loss`, weighted."""
        return self.settings.class_weight * star_class_loss(logits, classes, self.weights)


class StarHeads(nn.Module):
    """Object probability, distances and classes from a decoder map of ``width`` channels."""

    def __init__(self, width: int, settings: StarHeadSettings, classes: ClassSettings) -> None:
        super().__init__()
        channels, self.unit = settings.channels, settings.distance_unit
        self.hidden = nn.Sequential(convolution(width, channels, 3), nn.ReLU(inplace=True))
        self.probability = nn.Conv2d(channels, 1, 1)
        self.distance = nn.Conv2d(channels, settings.rays, 1)
        self.class_head = StarClassHead(width, channels, classes) if len(classes) > 1 else None

    def forward(self, decoded: Tensor) -> StarMaps:
        """(N, width, h, w) -> the maps."""
        hidden = self.hidden(decoded)
        classes = None if self.class_head is None else self.class_head(decoded)
        return StarMaps(self.probability(hidden)[:, 0], self.unit * self.distance(hidden), classes)


@register_method("stardist")
class StarDistNet(TrunkNet):
    """StarDist on the shared backbone and trunk."""

    Settings: ClassVar[type] = StarDistSettings

    def __init__(self, settings: StarDistSettings) -> None:
        heads = settings.heads
        super().__init__(settings, heads.scale)
        self.stride = 2 ** (heads.scale - 1)
        self.heads = StarHeads(settings.trunk.widths[heads.scale - 1], heads, settings.classes)

    def losses(
        self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor], labels: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        logits, distances, classes = self.maps(batch)
        cells = label_maps(masks, (batch.shape[2], batch.shape[3]))
        settings = self.settings.heads
        losses = star_losses(logits, distances, *star_targets(cells, self.stride, settings.rays), settings)
        head = self.heads.class_head
        if head is None or classes is None or labels is None:
            return losses
        return losses | {"loss_class": head.loss(classes, star_classes(cells, self.stride, labels))}

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        logits, distances, classes = self.maps(batch)
        # An object was found here already, whatever the background's logit.
        best = [None] * len(sizes) if classes is None else 1 + classes[:, 1:].argmax(1)
        with full_precision(batch.device):
            images = zip(logits.float().sigmoid(), distances.float(), sizes, best, strict=True)
            return [decode_stars(p, d, self.stride, size, self.settings.decoding, c) for p, d, size, c in images]

    def maps(self, batch: Tensor) -> StarMaps:
        """Images (N, 3, h, w) -> the maps."""
        return self.heads(self.decoded(batch)[self.settings.heads.scale])

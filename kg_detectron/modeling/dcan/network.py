"""DCAN: objects and their contours from several levels, and the objects' pieces between contours (Chen et al. 2016)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import interpolate

from kg_detectron.cells import Cells
from kg_detectron.modeling.dcan.decoding import decode_contours
from kg_detectron.modeling.dcan.losses import Branch, dcan_losses
from kg_detectron.modeling.dcan.settings import DCANSettings
from kg_detectron.modeling.dcan.targets import contour_targets
from kg_detectron.modeling.label_maps import label_maps
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.trunk import convolution
from kg_detectron.modeling.trunk_net import TrunkNet


class LevelHeads(nn.Module):
    """One branch: logits from each of several decoder maps, and their sum.

    Args:
        widths: channels of each decoder map that is read, by its scale.
    """

    def __init__(self, widths: Mapping[int, int]) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(
            {
                f"s{scale}": nn.Sequential(convolution(width, width, 3), nn.ReLU(inplace=True), nn.Conv2d(width, 1, 1))
                for scale, width in widths.items()
            }
        )

    def forward(self, decoded: Mapping[int, Tensor], size: tuple[int, int]) -> Branch:
        """Decoder maps by scale -> logits at size (h, w)."""
        maps = [head(decoded[int(name[1:])]) for name, head in self.levels.items()]
        logits = [interpolate(m, size, mode="bilinear", align_corners=False)[:, 0] for m in maps]
        return Branch(logits, sum(logits[1:], logits[0]))


@register_method("dcan")
class DCANNet(TrunkNet):
    """DCAN on the shared backbone and trunk."""

    Settings: ClassVar[type] = DCANSettings

    def __init__(self, settings: DCANSettings) -> None:
        levels = sorted(settings.heads.levels)
        super().__init__(settings, levels[0])
        widths = {scale: settings.trunk.widths[scale - 1] for scale in levels}
        self.object_heads = LevelHeads(widths)
        self.contour_heads = LevelHeads(widths)

    def losses(self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
        labels = label_maps(masks, (batch.shape[2], batch.shape[3]))
        targets = contour_targets(labels, self.settings.heads.contour_radius)
        return dcan_losses(*self.maps(batch), targets, self.settings.heads)

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        objects, contours = (branch.fused.float().sigmoid() for branch in self.maps(batch))
        with full_precision(batch.device):
            return [
                decode_contours(o[:height, :width], c[:height, :width], self.settings.decoding)
                for o, c, (height, width) in zip(objects, contours, sizes, strict=True)
            ]

    def maps(self, batch: Tensor) -> tuple[Branch, Branch]:
        """Images (N, 3, h, w) -> the logits of objects and of contours."""
        decoded, size = self.decoded(batch), (batch.shape[2], batch.shape[3])
        return self.object_heads(decoded, size), self.contour_heads(decoded, size)

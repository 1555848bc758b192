"""Keypoint branch: the trunk, and three heads at every scale (paper, figure 1a)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from kg_detectron.graph import GROUP_OFFSET_CHANNELS, HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS
from kg_detectron.modeling.backbone import NORMS, receptive_radius, zero_bias
from kg_detectron.modeling.bands import in_bands
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import SCALES, LargeKernelBlock, Trunk, convolution

# Discs cover few pixels: starting from a low probability, here as a logit, spares the first epochs.
HEATMAP_PRIOR = -3.0

HEADS = ("paper", "lite")


@dataclass(frozen=True)
class HeadSettings:
    """Settings of the keypoint heads (the paper's by default).

    Attributes:
        heads: "paper": three heads of two convolutions each; "lite": ours, one block of a depthwise convolution that
            the three share, and one 1x1 convolution.
        head_kernel: kernel side of the heads, pixels of a scale, odd.
        scales: scales with heads, of 1, 2, 3, 4 (strides 1, 2, 4, 8).

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.KEYPOINT_GRAPH"

    heads: str = "paper"
    head_kernel: int = 7
    scales: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        require(self.heads in HEADS, "heads", f"one of {', '.join(HEADS)}", self.heads)
        require(self.head_kernel >= 1 and self.head_kernel % 2 == 1, "head_kernel", "an odd number", self.head_kernel)
        scales = tuple(self.scales)
        good = bool(scales) and len(set(scales)) == len(scales) and set(scales) <= set(SCALES)
        require(good, "scales", f"different ones of {SCALES}", scales)


class KeypointMaps(NamedTuple):
    """The maps of one scale."""

    heatmap: Tensor  # [N,5,h,w] logits
    single_offset: Tensor  # [N,10,h,w] pixels of the scale
    group_offset: Tensor  # [N,40,h,w] pixels of the scale
    stride: int


class KeypointHeads(nn.Module):
    """Heatmap, single offset and group offset of one scale."""

    def __init__(self, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.heatmap = self._head(width, HEATMAP_CHANNELS, kernel)
        self.single_offset = self._head(width, SINGLE_OFFSET_CHANNELS, kernel)
        self.group_offset = self._head(width, GROUP_OFFSET_CHANNELS, kernel)
        nn.init.constant_(self.heatmap[-1].get_parameter("bias"), HEATMAP_PRIOR)

    @staticmethod
    def _head(width: int, channels: int, kernel: int) -> nn.Sequential:
        last = nn.Conv2d(width, channels, kernel, padding=kernel // 2)
        nn.init.normal_(last.weight, std=0.1 / kernel / width**0.5)
        zero_bias(last)
        return nn.Sequential(convolution(width, width, kernel), nn.ReLU(inplace=True), last)

    @property
    def receptive_radius(self) -> int:
        """Receptive-field radius in pixels of the scale."""
        return receptive_radius(self.heatmap)

    def forward(self, decoded: Tensor) -> KeypointMaps:
        """(N, width, h, w) -> the maps of that scale."""
        return KeypointMaps(self.heatmap(decoded), self.single_offset(decoded), self.group_offset(decoded), self.stride)


class LiteHeads(nn.Module):
    """Heatmap, single offset and group offset of one scale, by one 1x1 convolution behind one block that they share."""

    def __init__(self, width: int, kernel: int, stride: int, norm: str) -> None:
        super().__init__()
        self.stride = stride
        self.trunk = nn.Sequential(LargeKernelBlock(width, kernel, norm), NORMS[norm](width), nn.ReLU(inplace=True))
        self.channels = (HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS, GROUP_OFFSET_CHANNELS)
        self.predict = nn.Conv2d(width, sum(self.channels), 1)
        nn.init.normal_(self.predict.weight, std=0.1 / width**0.5)
        zero_bias(self.predict)
        nn.init.constant_(self.predict.get_parameter("bias")[:HEATMAP_CHANNELS], HEATMAP_PRIOR)

    @property
    def receptive_radius(self) -> int:
        """Receptive-field radius in pixels of the scale."""
        return receptive_radius(self.trunk)

    def forward(self, decoded: Tensor) -> KeypointMaps:
        """(N, width, h, w) -> the maps of that scale."""
        block, norm, relu = self.trunk
        maps = in_bands(
            lambda rows: self.predict(relu(norm(rows))), block(decoded), channels=sum(self.channels), before=0, after=0
        )
        heatmap, single_offset, group_offset = maps.split(self.channels, dim=1)
        return KeypointMaps(heatmap, single_offset, group_offset, self.stride)


class KeypointBranch(nn.Module):
    """Decoder maps, up to the lowest scale with heads, and keypoint maps.

    Args:
        trunk: makes the decoder maps, up to the lowest of ``scales`` at least.
        head_kernel: kernel side of the heads, odd.
        scales: scales with heads, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        heads: makes the heads of a scale, called with their width, kernel and stride.

    Raises:
        ValueError: the trunk does not go up to the lowest scale.
    """

    def __init__(
        self,
        trunk: Trunk,
        head_kernel: int = 7,
        scales: Sequence[int] = SCALES,
        heads: Callable[[int, int, int], nn.Module] = KeypointHeads,
    ) -> None:
        super().__init__()
        require(min(scales) in trunk.scales, "scales", f"scales of the trunk, {list(trunk.scales)}", tuple(scales))
        self.trunk = trunk
        self.heads = nn.ModuleDict(
            {f"s{s}": heads(trunk.widths[s - 1], head_kernel, 2 ** (s - 1)) for s in sorted(scales)}
        )

    @property
    def scales(self) -> list[int]:
        """Scales with heads, ascending."""
        return [int(name[1:]) for name in self.heads]

    def head(self, scale: int) -> Any:
        """The heads of a scale."""
        return self.heads[f"s{scale}"]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[KeypointMaps], dict[int, Tensor]]:
        """[c0..c4] -> the maps of each scale with heads, from shallow to deep, and the decoder maps by scale."""
        decoded = self.trunk(features)
        return [self.head(scale)(decoded[scale]) for scale in self.scales], decoded


def build_keypoint_branch(settings: HeadSettings, trunk: Trunk, norm: str) -> KeypointBranch:
    """The keypoint branch on a trunk; ``norm`` is the norm layer of the "lite" heads."""
    heads = KeypointHeads if settings.heads == "paper" else partial(LiteHeads, norm=norm)
    return KeypointBranch(trunk, settings.head_kernel, settings.scales, heads)

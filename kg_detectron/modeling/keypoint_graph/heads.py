"""Keypoint branch: the decoder from c4 up to s1, and three heads at every scale (paper, figure 1a)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kg_detectron.graph import GROUP_OFFSET_CHANNELS, HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS

SCALES = (1, 2, 3, 4)

# Discs cover few pixels: starting from a low probability, here as a logit, spares the first epochs.
HEATMAP_PRIOR = -3.0


class KeypointMaps(NamedTuple):
    """The maps of one scale."""

    heatmap: Tensor  # [N,5,h,w] logits
    single_offset: Tensor  # [N,10,h,w] pixels of the scale
    group_offset: Tensor  # [N,40,h,w] pixels of the scale
    stride: int


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size, initialised for a ReLU behind it."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def reach(module: nn.Module) -> int:
    """How far away, in pixels to every side, an input of convolutions in a row has a part in their output."""
    return sum(layer.kernel_size[0] // 2 for layer in module.modules() if isinstance(layer, nn.Conv2d))


class UpCombine(nn.Module):
    """One step up: conv3x3 on the up-sampled deep map, concatenation with the shallow one, conv1x1."""

    def __init__(self, deep: int, shallow: int, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(convolution(deep, width, 3), nn.ReLU(inplace=True))
        self.combine = nn.Sequential(convolution(width + shallow, width, 1), nn.ReLU(inplace=True))

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """deep (N,deep,h/2,w/2), shallow (N,shallow,h,w) -> (N,width,h,w)."""
        deep = interpolate(deep, shallow.shape[2:], mode="bilinear", align_corners=False)
        return self.combine(torch.cat((self.up(deep), shallow), dim=1))


class KeypointHeads(nn.Module):
    """Heatmap, single offset and group offset of one scale."""

    def __init__(self, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.heatmap = self._head(width, HEATMAP_CHANNELS, kernel)
        self.single_offset = self._head(width, SINGLE_OFFSET_CHANNELS, kernel)
        self.group_offset = self._head(width, GROUP_OFFSET_CHANNELS, kernel)
        nn.init.constant_(self.heatmap[-1].bias, HEATMAP_PRIOR)

    @staticmethod
    def _head(width: int, channels: int, kernel: int) -> nn.Sequential:
        last = nn.Conv2d(width, channels, kernel, padding=kernel // 2)
        nn.init.normal_(last.weight, std=0.1 / kernel / width**0.5)
        nn.init.zeros_(last.bias)
        return nn.Sequential(convolution(width, width, kernel), nn.ReLU(inplace=True), last)

    @property
    def reach(self) -> int:
        """How far away, in pixels of the scale to every side, a value of the decoder map has a part in the maps."""
        return reach(self.heatmap)

    def forward(self, decoded: Tensor) -> KeypointMaps:
        """(N,width,h,w) -> the maps of that scale."""
        return KeypointMaps(self.heatmap(decoded), self.single_offset(decoded), self.group_offset(decoded), self.stride)


class KeypointBranch(nn.Module):
    """Decoder maps, down to the lowest scale with heads, and keypoint maps.

    Args:
        in_channels: channels of c0..c4.
        widths: channels of the decoder maps s1..s4.
        head_kernel: kernel size of the heads, odd.
        scales: scales with heads, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        step: makes one step up, called with the channels of the deep map, of the shallow one, and of the result.
        heads: makes the heads of a scale, called with their width, kernel and stride.

    Raises:
        ValueError: for arguments that do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        head_kernel: int = 7,
        scales: Sequence[int] = (1, 2, 3, 4),
        step: Callable[[int, int, int], nn.Module] = UpCombine,
        heads: Callable[[int, int, int], nn.Module] = KeypointHeads,
    ) -> None:
        super().__init__()
        if len(in_channels) != 5 or len(widths) != 4:
            raise ValueError(
                f"in_channels and widths: expected 5 and 4 numbers, got {tuple(in_channels)}, {tuple(widths)}"
            )
        if head_kernel < 1 or head_kernel % 2 == 0:
            raise ValueError(f"head_kernel: expected an odd positive number, got {head_kernel}")
        if not scales or sorted(set(scales)) != sorted(scales) or not set(scales) <= set(SCALES):
            raise ValueError(f"scales: expected different ones of {SCALES}, got {tuple(scales)}")
        deep = (*widths[1:], in_channels[4])
        self.decoded_scales = range(min(scales), len(SCALES) + 1)
        self.steps = nn.ModuleList(step(deep[s - 1], in_channels[s - 1], widths[s - 1]) for s in self.decoded_scales)
        self.heads = nn.ModuleDict({f"s{s}": heads(widths[s - 1], head_kernel, 2 ** (s - 1)) for s in sorted(scales)})

    def up(self, scale: int, deep: Tensor, shallow: Tensor) -> Tensor:
        """Decoder map of a scale, from the one below (c4 for scale 4) and the feature map beside it."""
        return self.steps[self.decoded_scales.index(scale)](deep, shallow)

    @property
    def reaches(self) -> tuple[dict[int, int], dict[int, int]]:
        """How far away, in pixels of a scale to every side, values of other maps have a part in its own.

        Returns:
            By scale: of what a step up starts from, in the decoder map; of the decoder map, in the heads' maps.
        """
        up = {s: 2 + reach(step) for s, step in zip(self.decoded_scales, self.steps, strict=True)}  # 2: bilinear
        return up, {int(name[1]): heads.reach for name, heads in self.heads.items()}

    def forward(self, features: Sequence[Tensor]) -> tuple[list[KeypointMaps], dict[str, Tensor]]:
        """[c0..c4] -> the maps of each chosen scale, from shallow to deep, and the decoder maps by name."""
        decoded: dict[str, Tensor] = {}
        deep = features[len(SCALES)]
        for s in reversed(self.decoded_scales):
            deep = decoded[f"s{s}"] = self.up(s, deep, features[s - 1])
        return [heads(decoded[name]) for name, heads in self.heads.items()], decoded

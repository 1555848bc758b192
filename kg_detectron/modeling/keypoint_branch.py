"""Keypoint branch: the decoder from c4 up to s1, and three heads at every scale (paper, figure 1a)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..graph import GROUP_OFFSET_CHANNELS, HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS

NUM_SCALES = 4


def scale_name(scale: int) -> str:
    """ "s1" for 1: the name of a scale of stride 2 ** (scale - 1)."""
    return f"s{scale}"


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


class UpCombine(nn.Module):
    """One step up: conv3x3 on the up-sampled deep map, concatenation with the shallow one, conv1x1."""

    def __init__(self, deep: int, shallow: int, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(convolution(deep, width, 3), nn.ReLU(inplace=True))
        self.combine = nn.Sequential(convolution(width + shallow, width, 1), nn.ReLU(inplace=True))

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """deep (N,deep,h,w) already at the size of shallow (N,shallow,h,w) -> (N,width,h,w)."""
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

    def forward(self, decoded: Tensor) -> KeypointMaps:
        """(N,width,h,w) -> the maps of that scale."""
        return KeypointMaps(self.heatmap(decoded), self.single_offset(decoded), self.group_offset(decoded), self.stride)


def check_branch_arguments(
    in_channels: Sequence[int], widths: Sequence[int], head_kernel: int, scales: Sequence[int]
) -> None:
    """Raise a ValueError for arguments that do not fit a keypoint branch."""
    if len(in_channels) != 5 or len(widths) != 4:
        raise ValueError(f"in_channels and widths: expected 5 and 4 numbers, got {tuple(in_channels)}, {tuple(widths)}")
    if head_kernel < 1 or head_kernel % 2 == 0:
        raise ValueError(f"head_kernel: expected an odd positive number, got {head_kernel}")
    if not scales or sorted(set(scales)) != sorted(scales) or not set(scales) <= {1, 2, 3, 4}:
        raise ValueError(f"scales: expected different ones of 1, 2, 3, 4, got {tuple(scales)}")


class KeypointBranch(nn.Module):
    """Decoder maps, down to the lowest scale with heads, and keypoint maps.

    Args:
        in_channels: channels of c0..c4.
        widths: channels of the decoder maps s1..s4.
        head_kernel: kernel size of the heads, odd.
        scales: scales with heads, of 1, 2, 3, 4 (strides 1, 2, 4, 8).

    Raises:
        ValueError: for arguments that do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        head_kernel: int = 7,
        scales: Sequence[int] = (1, 2, 3, 4),
    ) -> None:
        super().__init__()
        check_branch_arguments(in_channels, widths, head_kernel, scales)
        lowest = min(scales)
        deep = (*widths[1:], in_channels[4])
        self.steps = nn.ModuleList(
            UpCombine(deep[s - 1], in_channels[s - 1], widths[s - 1]) for s in range(lowest, NUM_SCALES + 1)
        )
        self.heads = nn.ModuleDict(
            {scale_name(s): KeypointHeads(widths[s - 1], head_kernel, 2 ** (s - 1)) for s in sorted(scales)}
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[list[KeypointMaps], dict[str, Tensor]]:
        """[c0..c4] -> the maps of each chosen scale, from shallow to deep, and the decoder maps by name."""
        decoded: dict[str, Tensor] = {}
        current = features[NUM_SCALES]
        for step, s in zip(reversed(self.steps), range(NUM_SCALES, 0, -1), strict=False):
            shallow = features[s - 1]
            current = interpolate(current, shallow.shape[2:], mode="bilinear", align_corners=False)
            current = decoded[scale_name(s)] = step(current, shallow)
        return [head(decoded[name]) for name, head in self.heads.items()], decoded

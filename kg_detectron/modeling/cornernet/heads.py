"""Corner pooling, and the maps of the two corner types (Law and Deng 2018, section 3.4)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kg_detectron.modeling.backbone import NORMS
from kg_detectron.modeling.trunk import convolution

CORNERS = ("top_left", "bottom_right")
# Corners cover few pixels: heatmaps start from a low probability, here as a logit.
HEATMAP_PRIOR = -2.19


class CornerMaps(NamedTuple):
    """The maps of both corner types, top left and bottom right."""

    heatmap: Tensor  # [N,2,K,h,w] logits of each class
    tag: Tensor  # [N,2,h,w] embedding: the two corners of one cell have the same
    offset: Tensor  # [N,2,2,h,w] corner type, then x, y: place of the corner within its pixel, 0..1


def running_maximum(x: Tensor, axis: int, from_end: bool) -> Tensor:
    """The largest value up to each place along an axis, or from each place on (``from_end``)."""
    return x.flip(axis).cummax(axis)[0].flip(axis) if from_end else x.cummax(axis)[0]


class CornerPooling(nn.Module):
    """What lies on the two sides of a box gathered at its corner.

    Args:
        channels: of the input and the output.
        first: whether the corner is the top left one, whose sides lie below it and to its right.
        norm: a key of `NORMS`.
    """

    def __init__(self, channels: int, first: bool, norm: str) -> None:
        super().__init__()
        self.first = first
        half = channels // 2
        self.vertical = self._block(channels, half, 3, norm)
        self.horizontal = self._block(channels, half, 3, norm)
        self.pooled = self._block(half, channels, 3, norm)[:2]
        self.shortcut = self._block(channels, channels, 1, norm)[:2]
        self.last = self._block(channels, channels, 3, norm)

    @staticmethod
    def _block(inputs: int, outputs: int, kernel: int, norm: str) -> nn.Sequential:
        return nn.Sequential(convolution(inputs, outputs, kernel), NORMS[norm](outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> the same shape."""
        sides = running_maximum(self.vertical(x), 2, self.first) + running_maximum(self.horizontal(x), 3, self.first)
        return self.last(torch.relu(self.pooled(sides) + self.shortcut(x)))


class CornerHeads(nn.Module):
    """Heatmap of each class, tag and offset of both corner types from a decoder map of ``width`` channels."""

    def __init__(self, width: int, channels: int, norm: str, classes: int = 1) -> None:
        super().__init__()
        self.widen = nn.Sequential(convolution(width, channels, 3), nn.ReLU(inplace=True))
        self.pooling = nn.ModuleList(CornerPooling(channels, first, norm) for first in (True, False))
        self.heatmap = self._heads(channels, classes)
        self.tag = self._heads(channels, 1)
        self.offset = self._heads(channels, 2)
        for head in self.heatmap:
            nn.init.constant_(head.get_parameter("2.bias"), HEATMAP_PRIOR)

    @staticmethod
    def _heads(channels: int, outputs: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.Sequential(convolution(channels, channels, 3), nn.ReLU(inplace=True), nn.Conv2d(channels, outputs, 1))
            for _ in CORNERS
        )

    def forward(self, decoded: Tensor) -> CornerMaps:
        """(N, width, h, w) -> the maps."""
        x = self.widen(decoded)
        corners = [pool(x) for pool in self.pooling]
        heatmap, tag, offset = (
            torch.stack([head(corner) for head, corner in zip(heads, corners, strict=True)], dim=1)
            for heads in (self.heatmap, self.tag, self.offset)
        )
        return CornerMaps(heatmap, tag[:, :, 0], offset)

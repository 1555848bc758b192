"""Training targets of CornerNet.

A corner is the centre of a corner pixel of the box, (i + 0.5) / stride in pixels of the map, whose pixel k covers
k..k + 1. So every corner lies within the map.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CornerTargets(NamedTuple):
    """Targets of N images with M cells together."""

    heatmap: Tensor  # [N,2,K,h,w] 0..1 of each class, 1 at the corners
    unclassified: Tensor  # [N,2,h,w] the same, of cells whose class is not known
    image: Tensor  # [M] int64
    place: Tensor  # [M,2,2] int64: corner type, then x, y of its pixel of the map
    offset: Tensor  # [M,2,2] corner type, then x, y: place within the pixel, 0..1


def corner_targets(
    boxes: Sequence[Tensor],
    size: tuple[int, int],
    stride: int,
    min_overlap: float = 0.3,
    labels: Sequence[Tensor] | None = None,
    classes: int = 1,
) -> CornerTargets:
    """Targets of boxes.

    Args:
        boxes: N tensors (M, 4), xyxy continuous, input pixels.
        size: (h, w) of the input, multiples of the stride.
        stride: of the map.
        min_overlap: see `CornerLossSettings`.
        labels: N tensors (M,) int64, the class of each cell, 1..K, or 0 where it is not known; 1 by default.
        classes: K.
    """
    every = torch.cat(list(boxes)).float()
    image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes])).to(every.device)
    corner = (every.reshape(-1, 2, 2) + every.new_tensor([[0.5], [-0.5]])) / stride
    limit = torch.tensor([size[1] // stride - 1, size[0] // stride - 1], device=every.device)
    place = torch.minimum(corner.floor().long().clamp(min=0), limit)
    radius = gaussian_radius((every[:, 2:] - every[:, :2]).div(stride).ceil(), min_overlap).floor()
    kind = torch.ones_like(image) if labels is None else torch.cat(list(labels))
    heatmap = every.new_zeros((len(boxes), 2, 1 + classes, size[0] // stride, size[1] // stride))
    y = torch.arange(heatmap.shape[3], device=every.device)[:, None]
    x = torch.arange(heatmap.shape[4], device=every.device)
    for i in range(len(boxes)):
        mine = image == i
        if mine.any():
            distance_x = (x - place[mine][:, :, 0, None, None]).abs()  # [M,2,1,w]
            distance_y = (y - place[mine][:, :, 1, None, None]).abs()  # [M,2,h,1]
            r = radius[mine][:, None, None, None]
            squared = distance_x**2 + distance_y**2
            window = (distance_x <= r) & (distance_y <= r)
            bumps = torch.exp(-squared / (2 * ((2 * r + 1) / 6) ** 2)) * window
            for number in kind[mine].unique().tolist():
                heatmap[i, :, number] = bumps[kind[mine] == number].amax(0)
    return CornerTargets(heatmap[:, :, 1:], heatmap[:, :, 0], image, place, corner - place)


def gaussian_radius(sides: Tensor, min_overlap: float) -> Tensor:
    """How far both corners of a box may be off, at least, with an IoU of `min_overlap` with the box.

    The smallest of three cases: both corners moved the same way, both inwards, both outwards.

    Args:
        sides: (M, 2), width and height of the boxes.
        min_overlap: between 0 and 1.

    Returns:
        (M,), in the unit of the sides.
    """
    total, area, o = sides.sum(1), sides.prod(1), min_overlap
    same = (total - (total**2 - 4 * area * (1 - o) / (1 + o)).sqrt()) / 2
    inwards = (total - (total**2 - 4 * (1 - o) * area).sqrt()) / 4
    outwards = (-o * total + ((o * total) ** 2 + 4 * o * (1 - o) * area).sqrt()) / (4 * o)
    return torch.minimum(torch.minimum(same, inwards), outwards)

"""Hough voting and the smoothing of the votes (paper, equation 2)."""

import math

import torch
from torch import Tensor

from ..checks import check_smoothing, check_votes


@torch.no_grad()
def hough_vote(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    """`layers.hough_vote`: (N, K, H, W) and (N, 2K, H, W) -> (N, K, H, W)."""
    check_votes(heatmap, offsets, radius)
    n, k, h, w = heatmap.shape
    dtype = torch.promote_types(heatmap.dtype, torch.float32)
    value = heatmap.to(dtype)
    offset = offsets.to(dtype).reshape(n, k, 2, h, w)
    x = torch.arange(w, device=value.device, dtype=dtype) + offset[:, :, 0]
    y = torch.arange(h, device=value.device, dtype=dtype)[:, None] + offset[:, :, 1]
    lands = torch.isfinite(value) & (x > -1) & (x < w) & (y > -1) & (y < h)  # false for nan too
    plane, value, x, y = lands.reshape(n * k, h * w).nonzero()[:, 0], value[lands], x[lands], y[lands]

    votes = value.new_zeros(n * k * h * w)
    left, top = x.floor(), y.floor()
    dx, dy = x - left, y - top
    left, top = left.long(), top.long()
    for column, row, weight in (
        (left, top, (1 - dx) * (1 - dy)),
        (left + 1, top, dx * (1 - dy)),
        (left, top + 1, (1 - dx) * dy),
        (left + 1, top + 1, dx * dy),
    ):
        inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
        index = (plane * h + row) * w + column
        votes.index_add_(0, index[inside], (value * weight)[inside])
    return votes.reshape(n, k, h, w) / (math.pi * radius**2)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Half-sample symmetric continuation (scipy's border `reflect`), for any distance from the border."""
    index = index.remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


@torch.no_grad()
def smooth_votes(votes: Tensor, sigma: float) -> Tensor:
    """`layers.smooth_votes`: (N, K, H, W) -> (N, K, H, W)."""
    check_smoothing(votes, sigma)
    n, k, h, w = votes.shape
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    if sigma == 0 or votes.numel() == 0:
        return votes.clone()
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, device=votes.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(votes.dtype)
    planes = votes.reshape(n * k, 1, h, w)
    rows = _reflect(torch.arange(-reach, h + reach, device=votes.device), h)
    planes = torch.nn.functional.conv2d(planes[:, :, rows], kernel.reshape(1, 1, -1, 1))
    columns = _reflect(torch.arange(-reach, w + reach, device=votes.device), w)
    planes = torch.nn.functional.conv2d(planes[..., columns], kernel.reshape(1, 1, 1, -1))
    return planes.reshape(n, k, h, w)

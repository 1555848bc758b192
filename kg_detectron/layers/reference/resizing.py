"""Convolution 3x3 of resized crops (paper, figure 1b: up-sampling and the convolution after it), and its gradient.

Resizing takes two steps: down the columns, from the pixels of the crops to lines of the width before and the height
after, and along these lines. Each step adds up terms: three taps of the kernel, two pixels of each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import check_crops, check_products
from ..crops import crop_pixels

# The tap, the row of the table that it is taken from (P,), and its weight (P,).
Term = tuple[int, Tensor, Tensor]


def convolve_resized(products: Tensor, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> Tensor:
    """`layers.convolve_resized`: the nine products (P, 9, C) of crops -> (pixels, C)."""
    check_products(products)
    check_crops(products.shape[0], before, after, places, pixels)
    channels, device = products.shape[2], products.device
    rows = products.reshape(-1, 3, 3, channels)
    lines = products.new_zeros(int((after[:, 0] * before[:, 1]).sum()), 3, channels)
    for tap, source, weight in _vertical_terms(before, after, device):
        lines = lines + weight.to(lines)[:, None, None] * rows[source, tap]
    resized = products.new_zeros(int(after.prod(1).sum()), channels)
    for tap, source, weight in _horizontal_terms(before, after, device):
        resized = resized + weight.to(resized)[:, None] * lines[source, tap]
    return products.new_zeros(pixels, channels).index_copy(0, _placed_pixels(after, places, device), resized)


def convolve_resized_backward(gradient: Tensor, products: int, before: Tensor, after: Tensor, places: Tensor) -> Tensor:
    """The transpose of `convolve_resized`: gradient of the result (pixels, C) -> of the products (P, 9, C)."""
    check_crops(products, before, after, places, gradient.shape[0])
    channels, device = gradient.shape[1], gradient.device
    resized = gradient[_placed_pixels(after, places, device)]
    lines = gradient.new_zeros(int((after[:, 0] * before[:, 1]).sum()), 3, channels)
    for tap, source, weight in _horizontal_terms(before, after, device):
        lines[:, tap].index_add_(0, source, weight.to(resized)[:, None] * resized)
    rows = gradient.new_zeros(products, 3, 3, channels)
    for tap, source, weight in _vertical_terms(before, after, device):
        rows[:, tap].index_add_(0, source, weight.to(lines)[:, None, None] * lines)
    return rows.view(products, 9, channels)


def _vertical_terms(before: Tensor, after: Tensor, device: torch.device) -> Iterator[Term]:
    """What the pixels of the lines are made of."""
    crop, y, x = crop_pixels(torch.stack((after[:, 0], before[:, 1]), dim=1), device)
    first = _first(before.prod(1)).to(device)
    (height, width), resized_height = before.to(device).unbind(1), after[:, 0].to(device)
    for tap in range(3):
        for row, weight in _resized_sources(y + tap - 1, height[crop], resized_height[crop]):
            yield tap, first[crop] + row * width[crop] + x, weight


def _horizontal_terms(before: Tensor, after: Tensor, device: torch.device) -> Iterator[Term]:
    """What the pixels of the resized crops are made of."""
    crop, y, x = crop_pixels(after, device)
    first = _first(after[:, 0] * before[:, 1]).to(device)
    width, resized_width = before[:, 1].to(device), after[:, 1].to(device)
    for tap in range(3):
        for column, weight in _resized_sources(x + tap - 1, width[crop], resized_width[crop]):
            yield tap, first[crop] + y * width[crop] + column, weight


def _placed_pixels(after: Tensor, places: Tensor, device: torch.device) -> Tensor:
    """Where the pixels of the resized crops lie in the result."""
    crop, y, x = crop_pixels(after, device)
    first, stride = places.to(device).unbind(1)
    return first[crop] + y * stride[crop] + x


def _first(counts: Tensor) -> Tensor:
    """Where each of several runs begins."""
    return counts.cumsum(0) - counts


def _resized_sources(place: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two pixels (P,), and their weights, that bilinear resizing takes for a place; weight 0 outside the crop."""
    last = before - 1
    source = torch.minimum(((place + 0.5) * (before.double() / after) - 0.5).clamp(min=0), last)
    low = source.floor()
    inside = (place >= 0) & (place < after)
    high_weight = source - low
    low = low.long()
    return [(low, (1 - high_weight) * inside), (torch.minimum(low + 1, last), high_weight * inside)]

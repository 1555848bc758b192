"""Wide maps a few rows at a time, in evaluation on a CPU: they stay in the cache, and never take memory as a whole.

The results are those of the whole map. N: images; C: channels; h, w: height and width of a map in pixels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Of the widest map of a band, for each thread: 2 MiB, about what the second-level cache of a core holds.
BAND_VALUES = 2**19


def is_banded(x: Tensor) -> bool:
    """Whether a map (N, C, h, w) is worked on in bands: one image on a CPU, channels last, and no gradient is kept.

    Otherwise rows of it are no contiguous part of the memory. A compiler plans its own memory.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return len(x) == 1 and x.stride(1) == 1


def bands(height: int, width: int, channels: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) row of each band of a map whose widest form has so many channels.

    Args:
        height, width: of the map, pixels.
        channels: of its widest form.
        step: bands begin at multiples of it, and have at least as many rows.
    """
    rows = max(1, torch.get_num_threads() * BAND_VALUES // (width * channels * step)) * step
    return ((first, min(first + rows, height)) for first in range(0, height, rows))


def in_bands(
    layers: Callable[[Tensor], Tensor], x: Tensor, *, channels: int, before: int, after: int, stride: int = 1
) -> Tensor:
    """``layers(x)``, computed in bands where `is_banded` allows.

    Args:
        layers: convolutions with padding, and what works on single pixels.
        x: (N, C, h, w); with a stride, h is a multiple of it.
        channels: of the widest map within.
        before, after: rows of x above and below row ``i * stride`` that have a part in row i of the result.
        stride: of all layers together.

    Returns:
        (N, C', h / stride, w / stride).
    """
    height, width = x.shape[2:]
    parts = list(bands(height, width, channels, 8 * stride)) if is_banded(x) else []
    if len(parts) < 2:
        return layers(x)
    result = None
    for first, last in parts:
        # Whole strides, so that every row keeps its place among them. What the padding of a band reaches is cut off.
        low = max(0, first - before) // stride * stride
        high = min(height, -(-(last + after) // stride) * stride)
        rows = layers(x[:, :, low:high])[:, :, (first - low) // stride : (last - low) // stride]
        if result is None:
            shape = (*rows.shape[:2], height // stride, rows.shape[3])
            result = torch.empty(shape, dtype=rows.dtype, memory_format=torch.channels_last)
        result[:, :, first // stride : last // stride] = rows
    assert result is not None
    return result


def add(total: Tensor, other: Tensor) -> Tensor:
    """``total + other``, in the memory of ``total`` where no gradient is kept."""
    if torch.is_grad_enabled() or total.dtype != other.dtype:
        return total + other
    return total.add_(other)

"""Images that are read where somebody looks: for planes of Zarr and slides that do not fit into memory.

H, W: height and width in pixels; C: channels.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

OVERVIEW = 4096  # side of an overview at most, pixels
BLOCK = 1024  # side of the blocks that are kept, pixels
_KEPT = 2**28  # bytes of blocks that are kept


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a memory map, or a view of one."""
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


class PlaneSource(ABC):
    """Where the pixels of one plane come from.

    Attributes:
        shape: (H, W, C).
        dtype: of the values.
        levels: (h, w) of its copies at falling resolution; the first is the plane itself.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    levels: Sequence[tuple[int, int]]

    @abstractmethod
    def read(self, level: int, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
        """(h, w, C) of a window within a level, pixels of that level."""

    def coarse(self, step: int) -> np.ndarray:
        """(h, w, C) with h = ceil(H / step): every `step`-th pixel, from the coarsest level that is fine enough."""
        height, width, channels = self.shape
        level = max(i for i, (h, w) in enumerate(self.levels) if i == 0 or height / h <= step and width / w <= step)
        h, w = self.levels[level]
        rows, columns = (
            np.minimum(np.arange(0, side, step) * of_level // side, of_level - 1)
            for side, of_level in ((height, h), (width, w))
        )
        out = np.empty((len(rows), len(columns), channels), self.dtype)
        together = max(1, BLOCK * h // (height * step))
        for first in range(0, len(rows), together):
            part = rows[first : first + together]
            band = self.read(level, int(part[0]), int(part[-1]) + 1, 0, w)
            out[first : first + together] = band[part - part[0]][:, columns]
        return out


class LazyPlane:
    """A plane that is sliced like an array (H, W, C), and read then: `image[rows, columns]`, `image[..., channels]`.

    Args:
        source: of the pixels.
        channels: those of the source to show, in this order; all where None.
    """

    ndim = 3

    def __init__(self, source: PlaneSource, channels: Sequence[int] | None = None) -> None:
        self._source = source
        self._channels = tuple(range(source.shape[2])) if channels is None else tuple(channels)
        self.shape = (source.shape[0], source.shape[1], len(self._channels))
        self.dtype = np.dtype(source.dtype)
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.dtype.itemsize

    def take(self, channels: Sequence[int]) -> "LazyPlane":
        """The same plane with some of its channels, which share the blocks that are kept."""
        taken = LazyPlane(self._source, [self._channels[channel] for channel in channels])
        taken._blocks = self._blocks
        return taken

    def overview(self) -> np.ndarray:
        """(h, w, C): the plane made coarser, at most `OVERVIEW` pixels a side."""
        step = max(1, -(-max(self.shape[:2]) // OVERVIEW))
        return self._source.coarse(step)[..., list(self._channels)]

    def __getitem__(self, key: Any) -> Any:
        """A window, (h, w, C); with steps of more than one pixel from a coarser level, where there is one."""
        key = key if isinstance(key, tuple) else (key,)
        if key[0] is Ellipsis and len(key) == 2 and isinstance(key[1], slice):
            return self.take(range(self.shape[2])[key[1]])
        if len(key) > 2 or not all(isinstance(part, slice) for part in key):
            raise TypeError(f"expected slices of rows and columns, got {key}")
        spans = [part.indices(side) for part, side in zip((*key, slice(None))[:2], self.shape, strict=False)]
        if any(step < 1 for _, _, step in spans):
            raise TypeError(f"expected slices with steps of 1 or more, got {key}")
        (y1, y2, step_y), (x1, x2, step_x) = spans
        if step_y == step_x > 1 and (y1, x1) == (0, 0) and (y2, x2) == self.shape[:2]:
            return self._source.coarse(step_y)[..., list(self._channels)]
        return self._window(y1, max(y1, y2), x1, max(x1, x2))[::step_y, ::step_x]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, for functions that want an array."""
        return np.asarray(self[:, :], dtype)

    def _window(self, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
        out = np.empty((y2 - y1, x2 - x1, self.shape[2]), self.dtype)
        for top in range(y1 // BLOCK * BLOCK, y2, BLOCK):
            for left in range(x1 // BLOCK * BLOCK, x2, BLOCK):
                low_y, high_y = max(y1, top), min(y2, top + BLOCK)
                low_x, high_x = max(x1, left), min(x2, left + BLOCK)
                part = self._block(top, left)[low_y - top : high_y - top, low_x - left : high_x - left]
                out[low_y - y1 : high_y - y1, low_x - x1 : high_x - x1] = part[..., list(self._channels)]
        return out

    def _block(self, top: int, left: int) -> np.ndarray:
        """(h, w, C of the source); the last ones are kept."""
        if (top, left) in self._blocks:
            self._blocks.move_to_end((top, left))
            return self._blocks[top, left]
        height, width = self._source.shape[:2]
        block = self._source.read(0, top, min(top + BLOCK, height), left, min(left + BLOCK, width))
        self._blocks[top, left] = block
        while len(self._blocks) * block.nbytes > _KEPT and len(self._blocks) > 4:
            self._blocks.popitem(last=False)
        return block


class LazyStack:
    """Planes by their place along the axes before Y, as an array (..., H, W, C) has them.

    Args:
        lengths: of the axes before Y.
        source: the pixels of the plane at a place.
    """

    def __init__(self, lengths: Sequence[int], source: Callable[[tuple[int, ...]], PlaneSource]) -> None:
        self._source = source
        self.shape = (*lengths, *source((0,) * len(lengths)).shape)

    def __getitem__(self, place: tuple[int, ...]) -> LazyPlane:
        return LazyPlane(self._source(place))

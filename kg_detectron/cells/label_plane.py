"""Label images that are drawn where somebody looks: for images larger than memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kg_detectron.cells.masks import MaskCrops, label_dtype

_LARGE = 8192 * 8192  # pixels from which a label image is drawn piece by piece
_BUCKET = 256  # side of the squares by which cells are found, pixels
_BLOCK = 2048  # side of the blocks in which pixels are counted, pixels


class LabelPlane:
    """The label image of cells, sliced like an array (H, W): ``plane[rows, columns]`` draws that window.

    It takes the memory of the masks and of the window, whatever the size of the image.

    Args:
        masks: the cells on the CPU; ids are 1..R in their order. Where masks overlap, the first one wins.
    """

    ndim = 2

    def __init__(self, masks: MaskCrops) -> None:
        self.shape = masks.size
        self.dtype = np.dtype(label_dtype(len(masks)))
        self._masks = masks
        self._windows = masks.windows.numpy().reshape(-1, 4)
        buckets: dict[tuple[int, int], list[int]] = {}
        first = self._windows[:, :2] // _BUCKET
        last = (self._windows[:, 2:] - 1) // _BUCKET
        for cell, ((x1, y1), (x2, y2)) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            for row in range(y1, y2 + 1):
                for column in range(x1, x2 + 1):
                    buckets.setdefault((row, column), []).append(cell)
        self._buckets = {place: np.array(cells) for place, cells in buckets.items()}

    @property
    def size(self) -> int:
        """Number of pixels."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole image."""
        return self.size * self.dtype.itemsize

    def max(self, initial: int = 0) -> int:
        """The highest id, or `initial` if that is higher."""
        return max(len(self._masks), initial)

    def __getitem__(self, key: Any) -> np.ndarray:
        """A window, a new array (h, w)."""
        key = key if isinstance(key, tuple) else (key,)
        if len(key) > 2 or not all(isinstance(part, slice) for part in key):
            raise TypeError(f"expected slices of rows and columns, got {key}")
        spans = [part.indices(side) for part, side in zip((*key, slice(None))[:2], self.shape, strict=True)]
        if any(step < 1 for _, _, step in spans):
            raise TypeError(f"expected slices with steps of 1 or more, got {key}")
        (y1, y2, step_y), (x1, x2, step_x) = spans
        out = np.zeros([len(range(*span)) for span in spans], self.dtype)
        cells = self._cells(y1, y2, x1, x2)
        windows = self._windows[cells]
        # Of the rows and columns that were asked for, those from `low` up to `high` lie in a cell's window.
        start, step = np.array([x1, y1]), np.array([step_x, step_y])
        low = np.maximum(-(-(windows[:, :2] - start) // step), 0)
        high = np.minimum(-(-(windows[:, 2:] - start) // step), out.shape[::-1])
        offsets = start + low * step - windows[:, :2]
        there = np.flatnonzero((high > low).all(axis=1))[::-1]
        pixels = self._masks.pixels(cells[there].tolist())
        for i, (crop, _) in zip(there.tolist(), pixels, strict=True):
            (left, top), (right, bottom), (x, y) = low[i].tolist(), high[i].tolist(), offsets[i].tolist()
            part = crop[y::step_y, x::step_x][: bottom - top, : right - left]
            out[top:bottom, left:right][part] = cells[i] + 1
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, for functions that want an array."""
        return np.asarray(self[:, :], dtype)

    def blocks(self) -> Iterator[np.ndarray]:
        """All of it in blocks, row by row."""
        height, width = self.shape
        for y in range(0, height, _BLOCK):
            for x in range(0, width, _BLOCK):
                yield self[y : y + _BLOCK, x : x + _BLOCK]

    def _cells(self, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
        """Indices of the cells whose windows may lie in a window, rising."""
        rows, columns = range(y1 // _BUCKET, -(-y2 // _BUCKET)), range(x1 // _BUCKET, -(-x2 // _BUCKET))
        if len(rows) * len(columns) >= len(self._buckets):
            return np.arange(len(self._masks))
        found = [cells for row in rows for c in columns if (cells := self._buckets.get((row, c))) is not None]
        if len(found) <= 1:
            return found[0] if found else np.zeros(0, np.int64)
        return np.unique(np.concatenate(found))


LabelImage = np.ndarray | LabelPlane


def label_image_of(masks: MaskCrops) -> LabelImage:
    """The label image (H, W) of cells on the CPU: an array, or for a large image one that is drawn by window."""
    height, width = masks.size
    return LabelPlane(masks) if height * width > _LARGE else masks.label_image()

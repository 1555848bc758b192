"""The grey levels of images of any type, brought to 0..255: one rule for training, evaluation and prediction.

H, W: height and width in pixels; C: channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kg_detectron.io.grey import distinct_channels
from kg_detectron.io.lazy import LazyPlane, is_mapped
from kg_detectron.io.scale_bars import without_scale_bars

_BLOCK = 2**22  # values looked at together, which bounds the memory
_IN_MEMORY = 2**27  # values up to which a channel that is in memory is sorted in memory


class UnknownWhiteLevel(ValueError):
    """Fixed normalisation does not know which level of an image is white. Percentile normalisation needs no white."""


@dataclass(frozen=True)
class Levels:
    """The levels of an image that become 0 and 255.

    Attributes:
        low, high: (C,) float64. Where they are equal, higher levels become 255.
    """

    low: np.ndarray
    high: np.ndarray

    def __call__(self, part: np.ndarray) -> np.ndarray:
        """Scale any part (h,w,C) of the image to float32 in 0..255; NaN becomes 0."""
        scaled = np.empty(part.shape, np.float32)
        if part.dtype.kind == "u" and part.dtype.itemsize <= 2 and part.size > 2**16:
            table = self._scaled(np.arange(np.iinfo(part.dtype).max + 1)[:, None]).astype(np.float32)
            for c in range(part.shape[2]):
                scaled[..., c] = np.take(table[:, c], part[..., c])
            return scaled
        rows = max(1, _BLOCK // max(1, part[0].size))
        for start in range(0, len(part), rows):
            scaled[start : start + rows] = self._scaled(part[start : start + rows])
        return scaled

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """(...,C) -> float64. In double precision the levels of 8 bits and of 16 bits x 257 come out equal."""
        span = np.where(self.high > self.low, self.high - self.low, np.finfo(np.float64).tiny)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((values - self.low) / span * 255).clip(0, 255)
        return np.nan_to_num(scaled, copy=False, nan=0)


class NormalisedImage:
    """A normalised image whose parts are computed when they are read: for images that do not fit into memory.

    Args:
        image: (H,W,C), may be a `numpy.memmap`.
        normalisation: see `Normalisation`; its errors.
    """

    def __init__(self, image: np.ndarray, normalisation: "Normalisation") -> None:
        self.image = image
        self.levels = normalisation.levels(image)
        self.shape = image.shape

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        """Rows and columns -> (h,w,C) float32 in 0..255."""
        return self.levels(self.image[part])


@dataclass(frozen=True)
class Normalisation:
    """How the levels of an image become 0..255, which the network then takes less its mean, by its deviation.

    An image of 8 bits and the same image x 257 in 16 bits come out equal.

    Args:
        kind: "fixed": 0 and the largest value of the type become 0 and 255; for float images the largest is 1.
            "percentile": for each channel, the values at the two percentiles of the whole image do, and what lies
            beyond them is clipped. It suits any type and range.
        percentiles: the two, of 0..100.

    Raises:
        ValueError: another kind, or percentiles that are not in rising order within 0..100.
    """

    kind: str = "fixed"
    percentiles: tuple[float, float] = (1.0, 99.8)

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "percentile"):
            raise ValueError(f"normalisation: expected 'fixed' or 'percentile', got {self.kind!r}")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles: expected two in rising order within 0..100, got {self.percentiles}")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Normalise an image (H,W,C) of any real type -> (H,W,C) float32 in 0..255; errors as in `levels`."""
        return self.levels(image)(image)

    def levels(self, image: np.ndarray) -> Levels:
        """The levels of a whole image, by which any part of it can be normalised later.

        Percentiles are values of the image, exact for every type. Those of a memory map are found block by block, in
        bounded memory; of a `LazyPlane` they are those of its overview. NaN and infinite values do not count, nor do
        scale bars that are drawn into an image in memory.

        Args:
            image: (H,W,C), integer, bool or float; may be a `numpy.memmap`.

        Raises:
            ValueError: another shape or type.
            UnknownWhiteLevel: "fixed" normalisation of an image whose type does not tell what is white: integers other
                than 8 and 16 bits unsigned, float values outside 0..1, 12 bits stored in 16.
        """
        if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "buif":
            raise ValueError(f"image: expected shape (H,W,C) of real numbers, got {image.shape} of type {image.dtype}")
        if isinstance(image, LazyPlane):
            image = image.overview()
        channels = image.shape[2]
        if self.kind == "fixed":
            return Levels(np.zeros(channels), np.full(channels, _white(image)))
        distinct = without_scale_bars(distinct_channels(image))
        levels = np.array([_percentiles(distinct[..., c], self.percentiles) for c in range(distinct.shape[2])])
        low, high = np.broadcast_to(levels.astype(np.float64), (channels, 2)).T
        return Levels(low, high)


def has_finite_value(image: np.ndarray) -> bool:
    """Whether a value of an image (H,W,C) or (H,W) is finite. It is read block by block, until there is one."""
    return image.dtype.kind != "f" or any(np.isfinite(block).any() for block in _blocks(image))


def _white(image: np.ndarray) -> float:
    """The level that is white in an image of its type."""
    advice = "fixed normalisation cannot know which level is white; percentile normalisation need not know it"
    dtype = image.dtype.newbyteorder("=")
    if dtype.kind == "b":
        return 1
    if dtype == np.uint8:
        return 255
    if dtype == np.uint16:
        # What 8-bit images x 257 cannot be: all below 4096, and no multiples of 257.
        if all(block.max() < 4096 for block in _blocks(image)) and any((b % 257).any() for b in _blocks(image)):
            highest = max(int(block.max()) for block in _blocks(image))
            raise UnknownWhiteLevel(f"it seems to hold 12 bits or less in 16, the largest value is {highest}: {advice}")
        return 65535
    if dtype.kind == "f":
        low = np.fmin.reduce([np.fmin.reduce(block, axis=None) for block in _blocks(image)])
        high = np.fmax.reduce([np.fmax.reduce(block, axis=None) for block in _blocks(image)])
        if low < 0 or high > 1:  # not so where all is NaN
            raise UnknownWhiteLevel(f"its values are in {low:g}..{high:g}, expected 0..1: {advice}")
        return 1
    raise UnknownWhiteLevel(f"its values are of type {dtype}: {advice}")


def _blocks(image: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK // max(1, math.prod(image.shape[1:])))
    return (image[start : start + rows] for start in range(0, image.shape[0], rows))


def _percentiles(channel: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The values of a channel (H,W) at two percentiles: of n in rising order, number ceil(n * percentile / 100).

    This is `numpy.percentile(..., method="inverted_cdf")` with an exact rank: NumPy rounds the percentile first.
    """
    in_memory = channel.size <= _IN_MEMORY and not is_mapped(channel)
    if in_memory:
        values = channel[np.isfinite(channel)] if channel.dtype.kind == "f" else channel.ravel()
        count = len(values)
    else:
        count = sum(int(np.isfinite(block).sum()) for block in _blocks(channel))
    if count == 0:
        return 0, 0
    low, high = (max(0, int(np.ceil(count * percentile / 100)) - 1) for percentile in percentiles)
    if in_memory:
        ordered = np.partition(values, (low, high))
        return float(ordered[low]), float(ordered[high])
    return _value_of_rank(channel, low), _value_of_rank(channel, high)


def _value_of_rank(channel: np.ndarray, rank: int) -> float:
    """The finite value of a channel before which ``rank`` others come, found 16 bits at a time by histograms."""
    bits = 8 * channel.dtype.itemsize
    key = 0
    for shift in range(max(bits, 16) - 16, -1, -16):
        counts = np.zeros(2**16, np.int64)
        for block in _blocks(channel):
            keys = _keys(block[np.isfinite(block)])
            if shift + 16 < bits:
                keys = keys[keys >> (shift + 16) == key]
            counts += np.bincount((keys >> shift & 0xFFFF).astype(np.int64), minlength=2**16)
        until = np.cumsum(counts)
        digit = int(np.searchsorted(until, rank, side="right"))
        rank -= int(until[digit] - counts[digit])
        key = key << 16 | digit
    return _value_of_key(key, channel.dtype)


def _keys(values: np.ndarray) -> np.ndarray:
    """Unsigned integers of the same size and in the same order as the values (N,)."""
    values = values.astype(values.dtype.newbyteorder("="))
    keys = values.view(f"u{values.itemsize}").astype(np.uint64)
    sign = np.uint64(1 << (8 * values.itemsize - 1))
    if values.dtype.kind == "i":
        keys ^= sign
    elif values.dtype.kind == "f":
        keys = np.where(keys & sign, sign - 1 - (keys ^ sign), keys | sign)
    return keys


def _value_of_key(key: int, dtype: np.dtype) -> float:
    sign = 1 << (8 * dtype.itemsize - 1)
    if dtype.kind == "i":
        key ^= sign
    elif dtype.kind == "f":
        key = key ^ sign if key & sign else (sign - 1 - key) ^ sign
    return float(np.array(key, f"u{dtype.itemsize}").view(dtype.newbyteorder("=")))

"""COCO run-length encodings (RLE) of masks: the one codec of the project. H, W: height and width in pixels.

A mask is counted down the columns: background pixels, foreground pixels, background pixels, and so on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


class RLE(TypedDict):
    """A compressed run-length encoding, ready for JSON and for pycocotools.

    ``size``: [H, W]. ``counts``: the run lengths, as `encode_runs` writes them.
    """

    size: Sequence[int]
    counts: str


def encode_runs(runs: Sequence[int] | NDArray[np.integer], size: Sequence[int]) -> RLE:
    """Compress run lengths.

    Args:
        runs: (R,) lengths, background and foreground in turn, column by column; together H x W pixels.
        size: (H, W) of the image.
    """
    height, width = map(int, size)
    plain = {"size": [height, width], "counts": np.asarray(runs).tolist()}
    return as_text(coco_mask.frPyObjects(plain, height, width))


def encode_mask(mask: NDArray[np.bool_]) -> RLE:
    """Encode a mask as compressed RLE.

    Args:
        mask: (H, W) bool.

    Raises:
        ValueError: another type or shape.

    Example:
        >>> encode_mask(np.array([[False, True], [False, True]]))
        {'size': [2, 2], 'counts': '22'}
    """
    if mask.dtype != bool or mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask must be a bool array (H, W), got {mask.dtype} {mask.shape}")
    return as_text(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def as_text(rle: Mapping[str, Any]) -> RLE:
    """A compressed encoding whose ``counts`` are bytes, as pycocotools returns it, or str -> the same with str."""
    height, width = map(int, rle["size"])
    counts = rle["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def mask_areas(masks: Sequence[RLE]) -> NDArray[np.float64]:
    """Pixels of each mask, (N,) float64, which has room for their sums."""
    # One by one: with NumPy 2, pycocotools fails on a list of more than 255.
    return np.array([coco_mask.area(mask) for mask in masks], dtype=np.float64)


def decode_runs(counts: str | bytes) -> NDArray[np.int64]:
    """Decode COCO's compressed run lengths, without decoding the mask.

    The code: a number is a string of groups of five bits, lowest first, each a character from ASCII 48; 32 is set where
    a group follows, and 16 of the last is the sign. From the fourth on, a number is the difference from the run two
    before.

    Returns:
        (R,) int64: lengths of the runs, background and foreground in turn, column by column.

    Raises:
        ValueError: not such a string.
    """
    code = counts.encode("ascii", errors="replace") if isinstance(counts, str) else counts
    corrupt = ValueError(f"counts are corrupt: expected a string of run lengths, got {str(counts)[:80]!r}")
    if not isinstance(code, bytes) or not code:
        raise corrupt
    groups = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((groups & 32) == 0)
    if groups.min() < 0 or groups.max() > 63 or last.size == 0 or last[-1] != groups.size - 1:
        raise corrupt
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits: more pixels than any image has
        raise corrupt
    place = 5 * (np.arange(groups.size) - np.repeat(first, lengths))
    runs = np.add.reduceat((groups & 31) << place, first)
    runs -= ((groups[last] & 16) >> 4) << (5 * lengths)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def foreground(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) flat indices, column by column, of the foreground pixels of run lengths."""
    lengths = runs[1::2]
    ends = runs.cumsum()[1::2]
    return np.arange(lengths.sum()) + np.repeat(ends - lengths.cumsum(), lengths)

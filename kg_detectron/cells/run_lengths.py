"""COCO run-length encodings (RLE) of masks, read without making the masks."""

import numpy as np


def decode_runs(counts: str | bytes) -> np.ndarray:
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

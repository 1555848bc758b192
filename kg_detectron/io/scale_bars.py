"""Scale bars that a program has drawn into an image: they would pass for its brightest part, or its darkest, and their
text for small cells.

H, W: height and width in pixels; C: channels.
"""

from typing import NamedTuple

import cv2
import numpy as np

from kg_detectron.io.grey import distinct_channels
from kg_detectron.io.lazy import is_mapped

# A bar is a rectangle at an end of the range, alone or with another; in JPEG its values and its edges vary a little.
_NEAR_TOP, _FILLED = 0.03, 0.95
_MOST = 2
# Length over thickness; length in pixels, and as a share of the longer side of the image; share of the image's area.
_SLENDER, _SHORTEST, _SHORTEST_SHARE, _LARGEST_SHARE = 4, 16, 1 / 32, 0.05
# Its text lies within so many lengths of it, and letters have smooth edges of so many pixels.
_TEXT, _EDGE = (0.75, 0.25), 2  # vertically, horizontally
# A dark one is so many pixels thick at least: of real images, one has a line of one pixel that is its darkest part.
_THINNEST_DARK = 2
_FILL_RADIUS = 3  # pixels around each one that it is filled from, from the outside in
_BRIGHTEST = 99.8  # a percentile
# Pixels a side in which bars are looked for; of larger images every second row and column, or fewer.
_SIDE = 2048


class ScaleBars(NamedTuple):
    """The scale bars of a channel.

    Attributes:
        value: from it on, pixels are as bright as the bars; of dark bars, in the inverted channel.
        boxes: (B, 4) int64 xyxy, pixels of the image.
        dark: whether they are its darkest part, not its brightest.
    """

    value: float
    boxes: np.ndarray
    dark: bool


def scale_bars(channel: np.ndarray) -> ScaleBars | None:
    """The scale bars of a channel (H, W), its brightest or darkest part, straight, filled, not at an edge; or None."""
    return _bars(channel, dark=False) or _bars(channel, dark=True)


def _bars(channel: np.ndarray, *, dark: bool) -> ScaleBars | None:
    step = -(-max(channel.shape) // _SIDE)
    sample = _as_bright(np.asarray(channel[::step, ::step]), dark)
    finite = sample if sample.dtype.kind != "f" else sample[np.isfinite(sample)]
    if not finite.size:
        return None
    low, top = float(finite.min()), float(finite.max())
    value = top - _NEAR_TOP * (top - low)
    near_top = ((sample >= value) & (sample <= top)).view(np.uint8)
    shortest = max(_SHORTEST / step, _SHORTEST_SHARE * max(sample.shape))
    most = max(int(cv2.reduce(near_top, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).max()) for axis in (0, 1))
    if most < _FILLED * shortest:  # no row or column has as many of them as one of a bar has in the mean
        return None
    _, _, parts, _ = cv2.connectedComponentsWithStats(near_top)
    x, y, width, height, area = parts[1:].astype(np.int64).T
    length, thickness = np.maximum(width, height), np.minimum(width, height)
    bars = (length >= _SLENDER * thickness) & (length >= shortest) & (area >= _FILLED * width * height)
    bars &= (area <= _LARGEST_SHARE * sample.size) & (thickness >= (_THINNEST_DARK / step if dark else 1))
    bars &= (x > 0) & (y > 0) & (x + width < sample.shape[1]) & (y + height < sample.shape[0])
    if not 1 <= np.count_nonzero(bars) <= _MOST:
        return None
    return ScaleBars(value, step * np.stack((x, y, x + width, y + height), axis=1)[bars], dark)


def _as_bright(values: np.ndarray, dark: bool) -> np.ndarray:
    """Values of any real type, inverted where what is looked for is dark."""
    if not dark:
        return values
    return -values if values.dtype.kind == "f" else ~values


def without_scale_bars(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C) whose scale bars and their text are painted over with what is around them.

    Returns:
        The image itself where it has none, is read piece by piece, or holds no real numbers.
    """
    if not isinstance(image, np.ndarray) or is_mapped(image) or image.dtype.kind not in "buif":
        return image
    distinct = distinct_channels(image)
    found = {c: bars for c in range(distinct.shape[2]) if (bars := scale_bars(distinct[..., c]))}
    if not found:
        return image
    painted = distinct.copy()
    letters = {c: _letter_value(_as_bright(distinct[..., c], bars.dark), bars.value) for c, bars in found.items()}
    for bars in found.values():
        for x1, y1, x2, y2 in bars.boxes:
            down, across = (round(share * max(x2 - x1, y2 - y1)) for share in _TEXT)
            part = painted[max(0, y1 - down) : y2 + down, max(0, x1 - across) : x2 + across]
            ink = [_as_bright(part[..., c], found[c].dark) >= value for c, value in letters.items()]
            _, labels, boxes, _ = cv2.connectedComponentsWithStats(np.any(ink, axis=0).view(np.uint8))
            x, y, width, height, _ = boxes.T
            # What goes on beyond the part is no letter.
            inside = (x > 0) & (y > 0) & (x + width < part.shape[1]) & (y + height < part.shape[0])
            inside[0] = False
            marks = cv2.dilate(inside[labels].view(np.uint8), np.ones((2 * _EDGE + 1,) * 2, np.uint8))
            for c in range(part.shape[2]):
                values = part[..., c]
                filled = cv2.inpaint(values.astype(np.float32), marks, _FILL_RADIUS, cv2.INPAINT_TELEA)
                values[marks > 0] = filled[marks > 0].clip(np.nanmin(values), np.nanmax(values))
    return np.broadcast_to(painted, image.shape)


def _letter_value(channel: np.ndarray, value: float) -> float:
    """From which value on a pixel near a bar belongs to a letter: these are smooth, so from half the way on between the
    brightest part of the image and them."""
    below = channel[channel < value]
    return float(np.percentile(below, _BRIGHTEST) + value) / 2 if below.size else value

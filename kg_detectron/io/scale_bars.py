"""Scale bars that a program has drawn into an image: in a dark one they would pass for its brightest part, and their
text for small cells.

H, W: height and width in pixels; C: channels.
"""

from typing import NamedTuple

import cv2
import numpy as np

from kg_detectron.io.lazy import is_mapped

# A bar is a rectangle at the top of the range, alone or with another; in JPEG its values and its edges vary a little.
_NEAR_TOP, _FILLED = 0.03, 0.95
_MOST = 2
# Length over thickness; length in pixels, and as a share of the longer side of the image; share of the image's area.
_SLENDER, _SHORTEST, _SHORTEST_SHARE, _LARGEST_SHARE = 4, 16, 1 / 32, 0.05
# Its text lies within so many lengths of it, and letters have smooth edges of so many pixels.
_TEXT, _EDGE = (0.75, 0.25), 2  # vertically, horizontally
_FILL_RADIUS = 3  # pixels around each one that it is filled from, from the outside in
_BRIGHTEST = 99.8  # a percentile
# Pixels a side in which bars are looked for; of larger images every second row and column, or fewer.
_SIDE = 2048


class ScaleBars(NamedTuple):
    """The scale bars of a channel.

    Attributes:
        value: from it on, pixels are as bright as the bars.
        boxes: (B, 4) int64 xyxy, pixels of the image.
    """

    value: float
    boxes: np.ndarray


def scale_bars(channel: np.ndarray) -> ScaleBars | None:
    """The scale bars of a channel (H, W): its brightest part, straight, filled, not at an edge; None without any."""
    step = -(-max(channel.shape) // _SIDE)
    sample = np.asarray(channel[::step, ::step])
    finite = sample if sample.dtype.kind != "f" else sample[np.isfinite(sample)]
    if not finite.size:
        return None
    low, top = float(finite.min()), float(finite.max())
    value = top - _NEAR_TOP * (top - low)
    _, _, parts, _ = cv2.connectedComponentsWithStats(((sample >= value) & (sample <= top)).view(np.uint8))
    x, y, width, height, area = parts[1:].astype(np.int64).T
    length, thickness = np.maximum(width, height), np.minimum(width, height)
    shortest = max(_SHORTEST / step, _SHORTEST_SHARE * max(sample.shape))
    bars = (length >= _SLENDER * thickness) & (length >= shortest) & (area >= _FILLED * width * height)
    bars &= area <= _LARGEST_SHARE * sample.size
    bars &= (x > 0) & (y > 0) & (x + width < sample.shape[1]) & (y + height < sample.shape[0])
    if not 1 <= np.count_nonzero(bars) <= _MOST:
        return None
    return ScaleBars(value, step * np.stack((x, y, x + width, y + height), axis=1)[bars])


def without_scale_bars(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C) whose scale bars and their text are painted over with what is around them.

    Returns:
        The image itself where it has none, is read piece by piece, or holds no real numbers.
    """
    if not isinstance(image, np.ndarray) or is_mapped(image) or image.dtype.kind not in "buif":
        return image
    distinct = image[..., :1] if image.strides[2] == 0 else image
    found = [scale_bars(distinct[..., c]) for c in range(distinct.shape[2])]
    if not any(found):
        return image
    painted = distinct.copy()
    values = [np.inf if bars is None else _letter_value(distinct[..., c], bars.value) for c, bars in enumerate(found)]
    for bars in filter(None, found):
        for x1, y1, x2, y2 in bars.boxes:
            down, across = (round(share * max(x2 - x1, y2 - y1)) for share in _TEXT)
            part = painted[max(0, y1 - down) : y2 + down, max(0, x1 - across) : x2 + across]
            _, labels, boxes, _ = cv2.connectedComponentsWithStats((part >= values).any(2).view(np.uint8))
            x, y, width, height, _ = boxes.T
            # What goes on beyond the part is no letter.
            inside = (x > 0) & (y > 0) & (x + width < part.shape[1]) & (y + height < part.shape[0])
            inside[0] = False
            marks = cv2.dilate(inside[labels].view(np.uint8), np.ones((2 * _EDGE + 1,) * 2, np.uint8))
            for c in range(part.shape[2]):
                filled = cv2.inpaint(part[..., c].astype(np.float32), marks, _FILL_RADIUS, cv2.INPAINT_TELEA)
                part[..., c][marks > 0] = filled[marks > 0]
    return np.broadcast_to(painted, image.shape)


def _letter_value(channel: np.ndarray, value: float) -> float:
    """From which value on a pixel near a bar belongs to a letter: these are smooth, so from half the way on between the
    brightest part of the image and them."""
    below = channel[channel < value]
    return float(np.percentile(below, _BRIGHTEST) + value) / 2 if below.size else value

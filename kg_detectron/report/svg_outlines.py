"""Outlines of cells as short SVG paths."""

from collections.abc import Sequence

import cv2
import numpy as np

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.metrics import RLE

TOLERANCE = 0.75  # pixels by which an outline may leave the edges of the mask's pixels


def outline(crop: np.ndarray, x: int, y: int) -> str:
    """The outline of a mask, holes included, along the edges of its pixels but for `TOLERANCE`.

    Args:
        crop: (h,w) bool.
        x, y: the place of its first pixel in the image.

    Returns:
        For each ring an absolute start and steps, all whole numbers: ``Mx yl dx dy dx dy...z``; "" for an empty mask.
    """
    # Each pixel becomes 2 x 2, so that the contour through pixel centres tells the two edges of a pixel apart.
    double = np.pad(crop, 1).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    rings, _ = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return "".join(_path(_simplified((ring - 1) // 2), x, y) for ring in rings)


def outlines(masks: Sequence[RLE]) -> list[str]:
    """The `outline` of each mask, in the frame of the image."""
    if not len(masks):
        return []
    return [outline(crop, left, top) for crop, (left, top, _, _) in MaskCrops.from_rle(masks).pixels()]


def _simplified(ring: np.ndarray) -> np.ndarray:
    """A ring (K,1,2) within `TOLERANCE`, less where it is so small that nothing would be left of it."""
    return cv2.approxPolyDP(ring, min(TOLERANCE, 0.05 * cv2.arcLength(ring, True)), True)


def _path(ring: np.ndarray, x: int, y: int) -> str:
    points = ring[:, 0] + (x, y)
    first, steps = points[0], np.diff(points, axis=0).ravel().tolist()
    return f"M{first[0]} {first[1]}l{' '.join(map(str, steps))}z" if steps else ""

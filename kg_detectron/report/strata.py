"""What kind of cell each one is: its size, how long it is for its width, and how crowded it lies."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kg_detectron.cells import MaskCrops
from kg_detectron.io.cell_sets import ImageCells

# Cells within this many pixels of each other are neighbours.
GAP = 2


class Strata(NamedTuple):
    """Of all cells of some images, image after image, (M,) each."""

    diameter: NDArray[np.float64]  # of a disc of the cell's area, pixels
    elongation: NDArray[np.float64]  # length over width of the ellipse of its second moments, 1 or more
    crowding: NDArray[np.float64]  # percent of its outline with another cell within GAP pixels


def strata(images: Sequence[ImageCells]) -> Strata:
    """The strata of cells; a mask without pixels has an elongation of 1."""
    diameters, elongations, crowdings = [], [], []
    for image in images:
        masks = MaskCrops.from_rle(image.masks, image.size)
        labels = masks.label_image()
        for number, (cell, (x1, y1, x2, y2)) in enumerate(masks.pixels(), start=1):
            diameters.append(2 * np.sqrt(cell.sum() / np.pi))
            elongations.append(elongation(cell))
            # The crop with a rim, as far as the image has one.
            top, left = max(y1 - GAP - 1, 0), max(x1 - GAP - 1, 0)
            around = labels[top : y2 + GAP + 1, left : x2 + GAP + 1]
            own = np.zeros(around.shape, bool)
            own[y1 - top : y2 - top, x1 - left : x2 - left] = cell
            crowdings.append(100 * crowding(own, (around != 0) & (around != number)))
    return Strata(*(np.array(values, np.float64) for values in (diameters, elongations, crowdings)))


def elongation(cell: NDArray[np.bool_]) -> float:
    """Length over width of the ellipse with the second moments of a mask (h, w), whose pixels are squares."""
    y, x = np.nonzero(cell)
    if not len(y):
        return 1.0
    small, large = np.linalg.eigvalsh(np.cov(y, x, bias=True) + np.eye(2) / 12)
    return float(np.sqrt(large / small))


def crowding(cell: NDArray[np.bool_], others: NDArray[np.bool_]) -> float:
    """Share, 0..1, of the outermost pixels of a mask (h, w) that have one of ``others`` within `GAP` pixels."""
    if not cell.any():
        return 0.0
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
    outline = cell & (cv2.erode(cell.view(np.uint8), cross) == 0)
    square = np.ones((2 * GAP + 1, 2 * GAP + 1), np.uint8)
    near = cv2.dilate(others.astype(np.uint8), square) > 0
    return float((outline & near).sum() / max(1, outline.sum()))

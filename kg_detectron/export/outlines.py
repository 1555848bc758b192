"""The outline of a cell along the edges of its pixels, as polygons on whole numbers.

Pixel (x, y) is the square from corner (x, y) to corner (x + 1, y + 1). A polygon through the corners, unlike one
through the centres, encloses exactly the cell's pixels: a cell of one pixel has an area, and so has a process of one
pixel's width.
"""

import cv2
import numpy as np

from kg_detectron.cells.masks import MaskCrops

# What a 2 x 2 block of pixels looks like around the corner in its middle; bits from the left, top to bottom: 8 4 2 1.
# Every turn of the outline there, as (the boundary goes on to the right, it goes on downwards). At two pixels that meet
# at a corner there are two turns, each around one pixel of background: the cell is joined through the corner.
_LEFT_UP, _RIGHT_UP, _LEFT_DOWN, _RIGHT_DOWN = (False, False), (True, False), (False, True), (True, True)
_TURNS = {
    0b1000: (_LEFT_UP,),
    0b0111: (_LEFT_UP,),
    0b0100: (_RIGHT_UP,),
    0b1011: (_RIGHT_UP,),
    0b0010: (_LEFT_DOWN,),
    0b1101: (_LEFT_DOWN,),
    0b0001: (_RIGHT_DOWN,),
    0b1110: (_RIGHT_DOWN,),
    0b0110: (_LEFT_UP, _RIGHT_DOWN),
    0b1001: (_RIGHT_UP, _LEFT_DOWN),
}
_TURN_OF = np.zeros((2, 16, 3), bool)  # [first or second turn, block] -> there is one, to the right, downwards
for _block, _turns in _TURNS.items():
    for _i, _turn in enumerate(_turns):
        _TURN_OF[_i, _block] = (True, *_turn)


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """The outline of one 4-connected cell: its outer ring and a ring for each hole.

    The rings together enclose exactly the pixels of the mask. Each is a simple polygon, of horizontal and vertical
    sides in turn; two may touch at a corner, never along a side. The first point is not repeated at the end.

    Args:
        mask: (h,w) bool, one 4-connected component.
    Returns:
        Integer arrays (K,2) of x, y in the frame of the mask: the outer ring, clockwise on the screen, then the holes,
        the other way round.
    Raises:
        ValueError: for a mask that is empty or in several pieces.
    """
    pieces = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)[0] - 1 if mask.size else 0
    if pieces != 1:
        raise ValueError(f"mask: expected one 4-connected component, got {pieces}")
    padded = np.pad(mask, 1).view(np.uint8)
    block = 8 * padded[:-1, :-1] + 4 * padded[:-1, 1:] + 2 * padded[1:, :-1] + padded[1:, 1:]
    y, x = np.nonzero(_TURN_OF[0, :, 0][block])
    at = block[y, x]
    second = _TURN_OF[1, at, 0]
    x, y = np.concatenate((x, x[second])), np.concatenate((y, y[second]))
    _, right, down = np.concatenate((_TURN_OF[0, at], _TURN_OF[1, at[second]])).T

    # Along a row of corners, sides begin and end in turn; along a column too.
    by_row = np.lexsort((right, x, y))
    across = _partners(by_row)
    along = _partners(np.lexsort((down, y, x)))

    rings: list[np.ndarray] = []
    free = np.ones(len(x), bool)
    # The first corner, row by row, is the top left one of the outer ring. From there every ring is walked to the right
    # first, clockwise.
    for start in by_row.tolist():
        if free[start]:
            ring: list[int] = []
            corner = start
            while True:
                following = across[corner]
                ring += (corner, following)
                corner = along[following]
                if corner == start:
                    break
            free[ring] = False
            points = np.stack((x[ring], y[ring]), axis=1)
            rings.append(points[::-1] if rings else points)
    return rings


def _partners(order: np.ndarray) -> list[int]:
    """For each corner the one at the other end of its side; the ends of every side are neighbours in `order`."""
    partners = np.empty(len(order), np.int64)
    partners[order[0::2]] = order[1::2]
    partners[order[1::2]] = order[0::2]
    return partners.tolist()


def outlines(masks: MaskCrops) -> list[list[np.ndarray]]:
    """The `outline` of every cell, in the frame of the image.

    Raises:
        ValueError: for a cell that is empty or in several pieces; it names the cell.
    """
    rings = []
    for i, (crop, (left, top, _, _)) in enumerate(masks.pixels()):
        try:
            rings.append([ring + (left, top) for ring in outline(crop)])
        except ValueError as error:
            raise ValueError(f"cell {i + 1}: {error}") from None
    return rings

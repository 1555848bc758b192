"""Overlapping cells made separate: every pixel belongs to one cell at most, and every cell is one piece."""

import dataclasses

import cv2
import numpy as np
import skimage
import torch

from kg_detectron.cells.cells import Cells
from kg_detectron.cells.label_plane import label_image_of
from kg_detectron.cells.masks import MaskCrops


def separate_cells(cells: Cells) -> Cells:
    """Give each pixel to one cell, and leave each cell one piece.

    A pixel belongs to the cell with the highest score of those that claim it (of equals, the first). Of what a cell
    then has, the largest 4-connected component stays (of equals, the one whose first pixel comes first, row by row); a
    cell without any pixel is dropped. Pixels that a cell loses as a smaller piece go to no other cell.

    4-connected, because such a piece is one piece to every program that counts, whether it joins pixels at corners or
    not, and its outline is a polygon that never crosses or touches itself.

    Args:
        cells: of one image.
    Returns:
        The cells that are left, by falling score, their masks as bool crops, on the CPU, without empty margins.
    """
    masks = cells.masks
    order = torch.argsort(cells.scores, descending=True, stable=True).cpu()
    claims = label_image_of(masks[order])
    windows = masks.windows[order]
    kept, crops, places = [], [], []
    for i, (x1, y1, x2, y2) in enumerate(windows.tolist()):
        piece = _largest_piece(claims[y1:y2, x1:x2] == i + 1)
        if piece is not None:
            (left, top, right, bottom), crop = piece
            kept.append(i)
            crops.append(torch.from_numpy(crop))
            places.append([x1 + left, y1 + top, x1 + right, y1 + bottom])
    rows = order[kept]
    separate = MaskCrops(crops, torch.tensor(places, dtype=torch.int64).reshape(-1, 4), masks.size)
    return dataclasses.replace(cells[rows.to(cells.scores.device)], masks=separate)


def connected_pieces(mask: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """The connected pieces of a mask: the project's one definition of "a piece".

    Pixels that share an edge are connected; pixels that meet at a corner only are not.

    Args:
        mask: (H, W) bool.
    Returns:
        Their number K; (H, W) int32, 0 background, 1..K the pieces; and (K,) int64, their areas in pixels.
    """
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(mask).view(np.uint8), connectivity=4
    )
    return count - 1, pieces, stats[1:, cv2.CC_STAT_AREA].astype(np.int64)


def pieces_of_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many pieces, as `connected_pieces` tells them, every number of a label image has.

    Args:
        labels: (H, W) integers, 0 background.
    Returns:
        The K numbers, rising, and their pieces, (K,) int64 each.
    """
    pieces = skimage.measure.label(labels, background=0, connectivity=1)
    _, first = np.unique(pieces, return_index=True)
    values = labels.ravel()[first]
    return np.unique(values[values > 0], return_counts=True)


def _largest_piece(mask: np.ndarray) -> tuple[tuple[int, int, int, int], np.ndarray] | None:
    """The largest 4-connected component of a mask (h,w), as its window xyxy and its pixels; None for an empty mask."""
    if not mask.any():
        return None
    count, components, areas = connected_pieces(mask)
    best = 1
    if count > 1:
        largest = np.flatnonzero(areas == areas.max()) + 1
        if len(largest) > 1:  # OpenCV does not promise the order of its labels
            ids = components.ravel()
            best = ids[np.isin(ids, largest).argmax()]
        else:
            best = largest[0]
    piece = components == best
    rows, columns = np.flatnonzero(piece.any(axis=1)), np.flatnonzero(piece.any(axis=0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return (left, top, right, bottom), piece[top:bottom, left:right]

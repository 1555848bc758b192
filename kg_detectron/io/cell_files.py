"""Files of one cell each: what of their pixels is the cell. H, W: height and width in pixels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray
from PIL import Image

from kg_detectron.cells.separation import connected_pieces
from kg_detectron.io import fault
from kg_detectron.io.images import no_limit_of_pillow, read_image

_FORMATS = ("PNG", "TIFF", "GIF")  # that Pillow reads alpha from
_BETWEEN = 0.125  # of the range: pixels farther than this from both ends are neither cell nor background
_EDGE = 8  # pixels from the outline within which soft edges, and the blocks of JPEG, may lie between
_FEW = 0.02  # of the cell's area: pixels between the levels that may lie farther inside or outside
_PIECES = 8  # of which a picture of many levels has more, and a soft-edged cell has fewer


class CellMask(NamedTuple):
    """The pixels of a cell: ``mask`` (H, W) bool, and what is wrong with it: a kind of fault and a text, or None."""

    mask: NDArray[np.bool_]
    fault: tuple[str, str] | None


def read_cell_mask(path: str | Path) -> CellMask:
    """Read the mask of one cell from an image file.

    Alpha counts where the colours are constant, as in files that hold the cell as opacity.

    Raises:
        OSError, ValueError: as `read_image` does.
    """
    colours = read_image(path)
    alpha = None
    if colours.size and (colours == colours[0, 0]).all():
        alpha = _alpha(path)
    return cell_mask(colours, alpha)


def cell_mask(colours: np.ndarray, alpha: np.ndarray | None = None) -> CellMask:
    """Tell the cell from the background: above half of the range of levels.

    Args:
        colours: (H, W, 3); of each pixel the highest counts.
        alpha: (H, W), which takes the place of colours that are constant.

    Returns:
        The mask, with a fault where it is empty (`fault.NO_CELL`), covers most of the image and all of its corners
        (`fault.INVERTED`), or is a picture of many levels (`fault.NO_MASK`). Soft edges are named and no more
        (`fault.GREY`).

    Example:
        >>> picture = np.zeros((5, 5, 3), np.uint8)
        >>> picture[1:3, 1:4] = 255
        >>> cell_mask(picture).mask.sum()
        np.int64(6)
    """
    levels = colours.max(axis=2)
    if alpha is not None and levels.min() == levels.max() and alpha.min() < alpha.max():
        levels = alpha
    levels = levels.astype(np.float64)
    low, high = float(levels.min()), float(levels.max())
    if low == high:
        if high == 0:
            return CellMask(levels > 0, (fault.NO_CELL, "there is no cell in it"))
        return CellMask(levels > 0, (fault.INVERTED, f"all of it is one level, {high:g}"))
    mask = levels > (low + high) / 2
    text = _picture(levels, mask, low, high)
    if text:
        return CellMask(mask, (fault.NO_MASK, text))
    share = mask.mean()
    corners = int(mask[[0, 0, -1, -1], [0, -1, 0, -1]].sum())
    if share > 0.5 and corners >= 3:
        text = f"the cell would cover {share:.0%} of the image and {corners} of its corners"
        return CellMask(mask, (fault.INVERTED, text))
    between = np.count_nonzero((levels > low) & (levels < high))
    if between:
        text = f"{between} pixels lie between its levels {low:g} and {high:g}; the cell is taken from half of them on"
        return CellMask(mask, (fault.GREY, text))
    return CellMask(mask, None)


def _picture(levels: NDArray[np.float64], mask: NDArray[np.bool_], low: float, high: float) -> str:
    """What makes the levels (H, W) those of a picture, not of a mask; "" for a mask."""
    margin = _BETWEEN * (high - low)
    between = (levels > low + margin) & (levels < high - margin)
    if not between.any():
        return ""
    outline = mask ^ scipy.ndimage.binary_erosion(mask, border_value=1)
    distance = scipy.ndimage.distance_transform_cdt(~outline, "chessboard")
    far = int(np.count_nonzero(between & (distance > _EDGE)))
    pieces = connected_pieces(mask)[0]
    if far > _FEW * np.count_nonzero(mask) or pieces > _PIECES:
        count = len(np.unique(levels))
        return f"expected two levels, cell and background, got {count} from {low:g} to {high:g}"
    return ""


def _alpha(path: str | Path) -> NDArray[np.uint8] | None:
    """The opacity (H, W) that a file holds, or None."""
    try:
        with no_limit_of_pillow(), Image.open(path, formats=_FORMATS) as picture:
            if not picture.has_transparency_data:
                return None
            return np.asarray(picture.convert("RGBA"))[..., 3]
    except (OSError, ValueError, SyntaxError):
        return None

"""The scale of an image from the cells in it: a first pass of the model tells their diameter."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.io.normalisation import Levels
from kg_detectron.modeling.preprocessing import BLOCK, NetworkImage, Scale, as_tensor, block_side

if TYPE_CHECKING:
    from kg_detectron.modeling.instance_net import InstanceNet

# Scales that the first pass tries; a model that was trained on cells of half to twice its diameter sees cells of any
# diameter that is not far off at one of them.
FIRST_SCALES = (0.25, 0.5, 1.0, 2.0)
# Side of the part of an image that the first pass looks at, pixels of the network's input.
PART = 512
# A detection counts less, the further its diameter in the network's input is from that of the training; octaves.
SPREAD = 0.75


def diameters(cells: Cells) -> np.ndarray:
    """(R,) diameters of the circles of the cells' areas, pixels: 2 sqrt(area / pi)."""
    areas = np.array([int(mask.sum()) for mask, _ in cells.masks.pixels()], dtype=float)
    return 2 * np.sqrt(areas / math.pi)


@torch.no_grad()
def estimate_scale(model: "InstanceNet", image: np.ndarray, levels: Levels) -> Scale:
    """The scale at which the cells of an image get the diameter that the model was trained for.

    The model looks for cells at several scales, each time in a part of the image of bounded size. Every cell that it
    takes for true votes for its diameter, with its score and the more, the closer it is to the trained diameter. The
    weighted median decides. Where the model finds none, the image keeps its pixels.

    Args:
        model: in evaluation mode.
        image: (H, W, 3), may be a `numpy.memmap`.
        levels: see `Preprocessing.levels`.
    """
    trained = model.preprocessing.diameter
    votes, weights = [], []
    for scale in FIRST_SCALES:
        seen = NetworkImage(image, levels, scale)
        if max(seen.shape[:2]) < BLOCK:
            continue
        window = _part(seen)
        (cells,) = model.detect([as_tensor(seen[window], model.place)])
        cells = cells.above(max(model.threshold, 1e-6))
        found = diameters(cells)
        octaves = np.log2(np.maximum(found, 1) / trained)
        votes.append(found / seen.scale[0])
        # Of a part, cells stand for those of the whole image.
        covered = math.prod(part.stop - part.start for part in window) / math.prod(seen.shape[:2])
        weights.append(cells.scores.cpu().numpy() * np.exp(-0.5 * (octaves / SPREAD) ** 2) / covered)
    diameter = weighted_median(np.concatenate(votes), np.concatenate(weights))
    if diameter is None:
        return Scale(1.0, "own pixels, for the model found no cell to estimate a diameter from")
    value = BLOCK / block_side(trained / diameter)
    return Scale(value, f"estimated from cells of about {diameter:.0f} pixels")


def _part(seen: NetworkImage) -> tuple[slice, slice]:
    """The middle of an image, `PART` pixels a side at most, from a multiple of `BLOCK` on."""
    starts = [max(0, (side - PART) // 2) // BLOCK * BLOCK for side in seen.shape[:2]]
    rows, columns = (slice(a, min(a + PART, side)) for a, side in zip(starts, seen.shape[:2], strict=True))
    return rows, columns


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float | None:
    """The value (N,) at which half of the weights (N,) is reached; None where there is no weight."""
    if not weights.sum() > 0:
        return None
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])

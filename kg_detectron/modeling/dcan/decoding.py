"""From the maps of DCAN to cells: objects without their contours, in connected pieces, which grow back."""

import numpy as np
import scipy
import skimage
import torch
from torch import Tensor

from kg_detectron.cells import Cells
from kg_detectron.cells.separation import connected_pieces
from kg_detectron.modeling.dcan.settings import ContourDecodingSettings
from kg_detectron.modeling.label_maps import cells_of_labels


@torch.no_grad()
def decode_contours(objects: Tensor, contours: Tensor, settings: ContourDecodingSettings) -> Cells:
    """The cells of one image.

    Args:
        objects, contours: (H, W) probabilities.
        settings: the thresholds.

    Returns:
        The cells; their scores are their mean probabilities of objects.
    """
    probability = objects.cpu().numpy()
    labels = separated_objects(probability, contours.cpu().numpy(), settings)
    count = int(labels.max(initial=0))
    scores = scipy.ndimage.mean(probability, labels, np.arange(1, count + 1)) if count else np.zeros(0)
    return cells_of_labels(labels, torch.from_numpy(np.asarray(scores, np.float32)).to(objects.device))


def separated_objects(objects: np.ndarray, contours: np.ndarray, settings: ContourDecodingSettings) -> np.ndarray:
    """Labels (H, W), 0 background, 1..K, from probabilities (H, W).

    The connected pieces of what is object and no contour grow within the objects, first where contours are unlikely.
    A piece of objects that is contour all over, such as a small or slender cell, is one cell.
    """
    foreground = objects >= settings.object_threshold
    _, seeds, _ = connected_pieces(foreground & (contours < settings.contour_threshold))
    _, pieces, _ = connected_pieces(foreground)
    seeded = np.unique(pieces[seeds > 0])
    alone = foreground & ~np.isin(pieces, seeded)
    seeds = np.where(alone, pieces + seeds.max(initial=0), seeds)
    labels = skimage.segmentation.watershed(contours, seeds, mask=foreground)
    areas = np.bincount(labels.ravel())
    numbers = np.flatnonzero(areas[1:] >= max(settings.min_area, 1)) + 1
    place = np.zeros(len(areas), np.int32)
    place[numbers] = np.arange(1, len(numbers) + 1)
    return _without_holes(place[labels])


def _without_holes(labels: np.ndarray) -> np.ndarray:
    """Background that a cell surrounds becomes the cell's (in place)."""
    for number, window in enumerate(scipy.ndimage.find_objects(labels), start=1):
        part = labels[window]
        part[scipy.ndimage.binary_fill_holes(part == number) & (part == 0)] = number
    return labels

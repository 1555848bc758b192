"""Training targets of StarDist: object probability, and the distance to the outline along each ray.

A location of a map of stride s lies at ((i + 0.5) s, (j + 0.5) s) of the image, where pixel p covers p..p + 1.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import scipy
import torch
from torch import Tensor
from torch.nn.functional import pad


def star_targets(labels: Tensor, stride: int, rays: int) -> tuple[Tensor, Tensor]:
    """Targets of label maps.

    Args:
        labels: (N, h, w) int64, 0 background, sides multiples of the stride.
        stride: of the targets, pixels.
        rays: number of rays K; ray k has the angle 2 pi k / K from x towards y.

    Returns:
        Object probability (N, h / stride, w / stride), and distances (N, K, h / stride, w / stride) in pixels, zeros
        outside cells; float32.
    """
    at = slice(stride // 2, None, stride)
    probability = torch.stack([object_probability(image) for image in labels])[:, at, at]
    return probability, star_distances(labels, stride, rays)


def star_classes(labels: Tensor, stride: int, classes: Sequence[Tensor]) -> Tensor:
    """The class of the cell at each location.

    Args:
        labels, stride: as in `star_targets`.
        classes: N tensors (M,) int64, the class of the cells 1..M of each image, or 0 where it is not known.

    Returns:
        (N, h / stride, w / stride) int64: 0 background, else the class; -1 in cells whose class is not known.
    """
    at = slice(stride // 2, None, stride)
    of_labels = [torch.cat((c.new_zeros(1), torch.where(c > 0, c, -1))) for c in classes]
    cells = labels[:, at, at]
    return torch.stack([of_image[image] for of_image, image in zip(of_labels, cells, strict=True)])


def object_probability(labels: Tensor) -> Tensor:
    """Distance of each pixel (h, w) to the outline of its own cell, divided by the largest one of the cell; 0..1.

    The border of the image is no outline, as in the published code.
    """
    image = labels.cpu().numpy().astype(np.int32)
    probability = np.zeros(image.shape, np.float32)
    for number, window in enumerate(scipy.ndimage.find_objects(image), start=1):
        if window is not None:
            rim = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in window)
            cell = image[rim] == number
            depth = cv2.distanceTransform(cell.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            probability[rim] += depth / depth.max()
    return torch.from_numpy(probability).to(labels.device)


def star_distances(labels: Tensor, stride: int, rays: int) -> Tensor:
    """Length of each ray within the cell of its location, (N, K, h / stride, w / stride), pixels; 0 outside cells.

    All locations lie at the same place within their pixel, so ray k crosses the same pixels, relative to each.
    """
    height, width = labels.shape[1:]
    at = slice(stride // 2, None, stride)
    cell = labels[:, at, at].int()
    windows = [w for image in labels.cpu().numpy() for w in scipy.ndimage.find_objects(image) if w]
    longest = max((part.stop - part.start for window in windows for part in window), default=0)
    # No ray within a cell is longer than 1.5 sides of its box; beyond the image lies no cell.
    reach = int(1.5 * longest) + stride + 1
    around = pad(labels.int(), (reach, reach, reach, reach))
    distances = torch.zeros((rays, *cell.shape), device=labels.device)
    for k, distance in enumerate(distances):
        within = cell > 0
        for row, column, length in _crossed_pixels(2 * math.pi * k / rays, stride / 2, reach):
            top, left = reach + row, reach + column
            within &= around[:, top : top + height : stride, left : left + width : stride] == cell
            if not within.any():
                break
            distance += length * within
    return distances.transpose(0, 1)


@lru_cache(maxsize=1024)
def _crossed_pixels(angle: float, start: float, reach: int) -> list[tuple[int, int, float]]:
    """The pixels that a ray from (start, start) crosses, in their order: row, column, and its length in each.

    Within ``reach`` - 1 pixels of the start on both axes.
    """
    direction = np.round((math.sin(angle), math.cos(angle)), 9)
    borders = np.arange(1, reach + 1)
    crossings = [np.zeros(1)]
    for part in direction:
        if part > 0:
            crossings.append((math.floor(start) + borders - start) / part)
        elif part < 0:
            crossings.append((math.ceil(start) - borders - start) / part)
    lengths = np.unique(np.concatenate(crossings))
    middles = (lengths[:-1] + lengths[1:]) / 2
    pixels = np.floor(start + middles[:, None] * direction).astype(int)
    near = (np.abs(pixels) < reach).all(1).cumprod().astype(bool)
    return [
        (*pixel, length) for pixel, length in zip(pixels[near].tolist(), np.diff(lengths)[near].tolist(), strict=True)
    ]

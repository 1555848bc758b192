"""Star-convex polygons: which pixels they hold, and suppression of those that overlap better ones.

C polygons, K rays. A polygon has a centre x, y and K distances; vertex k lies at that distance in the direction
2 pi k / K from x towards y. Pixel p covers p..p + 1.
"""

import math

import torch
from torch import Tensor

# Pixels of a polygon, at most about so many, by which its overlap with others is measured; large ones are sampled.
_SAMPLES = 1024


def vertices(centres: Tensor, distances: Tensor) -> Tensor:
    """(C, 2) centres and (C, K) distances -> (C, K, 2) x, y of the vertices."""
    angle = torch.arange(distances.shape[1], device=distances.device) * (2 * math.pi / distances.shape[1])
    return centres[:, None] + distances[..., None] * torch.stack((angle.cos(), angle.sin()), dim=1)


def areas(distances: Tensor) -> Tensor:
    """(C, K) distances -> (C,) areas: the triangles between neighbouring rays."""
    return math.sin(2 * math.pi / distances.shape[1]) / 2 * (distances * distances.roll(-1, 1)).sum(1)


def holds(offsets: Tensor, distances: Tensor) -> Tensor:
    """Whether polygons hold points.

    Args:
        offsets: (C, P, 2), x, y from each polygon's centre to its points.
        distances: (C, K), positive.

    Returns:
        (C, P) bool.
    """
    rays = distances.shape[1]
    step = 2 * math.pi / rays
    angle = torch.atan2(offsets[..., 1], offsets[..., 0]).remainder(2 * math.pi)
    sector = (angle / step).long().clamp(max=rays - 1)
    first = distances.gather(1, sector)
    second = distances.roll(-1, 1).gather(1, sector)
    angle = angle - sector * step
    # The edge between two vertices in polar coordinates, without its division.
    edge = first * angle.sin() + second * (step - angle).sin()
    return offsets.norm(dim=2) * edge <= first * second * math.sin(step)


def polygon_pixels(centre: Tensor, distances: Tensor, size: tuple[int, int] | None = None, every: int = 1) -> Tensor:
    """The pixels (P, 2), x, y, int64, whose centres a polygon (2,), (K,) holds: of an image (H, W), or of the plane.

    With ``every`` n only each n-th row and column.
    """
    corners = vertices(centre[None], distances[None])[0]
    low = corners.amin(0).floor().long().tolist()
    high = corners.amax(0).ceil().long().tolist()
    if size is not None:
        low = [max(edge, 0) for edge in low]
        high = [min(edge, limit) for edge, limit in zip(high, reversed(size), strict=True)]
    x, y = (torch.arange(low[axis], max(low[axis], high[axis]), every, device=centre.device) for axis in (0, 1))
    pixels = torch.cartesian_prod(x, y).reshape(-1, 2)
    return pixels[holds((pixels + 0.5 - centre)[None], distances[None])[0]]


def suppress(centres: Tensor, distances: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Drop every polygon that overlaps a better one that stays by more than the threshold.

    The overlap is the shared area, counted in pixels, over the area of the smaller one, as in the published code, which
    rounds vertices to whole pixels first.

    Args:
        centres: (C, 2), x, y, pixels.
        distances: (C, K), pixels above 0.
        scores: (C,).
        threshold: 0..1.

    Returns:
        int64, the indices of those that stay, by falling score; of equal ones the first.
    """
    area = areas(distances)
    corners = vertices(centres, distances)
    low, high = corners.amin(1), corners.amax(1)
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        smaller = torch.minimum(area[left], area[best])
        sides = torch.minimum(high[left], high[best]) - torch.maximum(low[left], low[best])
        near = (sides.clamp(min=0).prod(1) > threshold * smaller).nonzero()[:, 0]  # the others cannot overlap enough
        every = max(1, int(math.sqrt(float(area[best]) / _SAMPLES)))
        pixels = polygon_pixels(centres[best], distances[best], every=every)
        other = left[near]
        shared = holds(pixels + 0.5 - centres[other][:, None], distances[other]).sum(1) * every**2
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[near] = shared <= threshold * smaller[near]
        left = left[stays]
    return torch.stack(kept) if kept else left

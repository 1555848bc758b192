"""The cosine embedding loss with local neighbours (Payer et al. 2018, equations 1 and 2).

D dimensions, P pixels, I instances: the background, and the cells that have pixels.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kg_detectron.modeling.precision import for_losses


def embedding_loss(
    embedding: Tensor, labels: Tensor, radius: float, contrast_weight: float = 1.0, max_cells: int = 0
) -> Tensor:
    """The loss of one image.

    The mean embedding of an instance should be that of its pixels, by the cosine, and orthogonal to those of its
    neighbours: mean over the instance of 1 - cosine, plus `contrast_weight` times the mean over the neighbours' pixels
    of cosine^2; then the mean over the instances. The background is an instance, whose neighbours are all cells.

    Args:
        embedding: (D, h, w).
        labels: (h, w) int64, 0 background.
        radius: see `neighbours`, pixels of the map.
        contrast_weight, max_cells: see `EmbeddingHeadSettings`.
    """
    pixels = for_losses(embedding).flatten(1).T  # [P,D]
    numbers, instance = labels.flatten().unique(return_inverse=True)
    counts = instance.bincount(minlength=len(numbers))
    means = pixels.new_zeros(len(numbers), pixels.shape[1]).index_add(0, instance, pixels) / counts[:, None]
    chosen = torch.arange(len(numbers), device=labels.device)
    cells = chosen[numbers > 0]
    if max_cells and len(cells) > max_cells:
        drawn = cells[torch.randperm(len(cells), device=cells.device)[:max_cells]]
        chosen = torch.cat((chosen[numbers == 0], drawn.sort()[0]))
    cosine = normalize(pixels, dim=1) @ normalize(means[chosen], dim=1).T  # [P,chosen]
    own = instance[:, None] == chosen
    attraction = ((1 - cosine) * own).sum(0) / counts[chosen]
    # By instance of the pixel, and chosen instance.
    squares = pixels.new_zeros(len(numbers), len(chosen)).index_add(0, instance, cosine.square())
    beside = neighbours(labels, numbers, instance, radius)[chosen].T  # [I,chosen]
    others = (beside * counts[:, None]).sum(0)
    contrast = (beside * squares).sum(0) / others.clamp(min=1)
    return (attraction + contrast_weight * contrast).mean()


def neighbours(labels: Tensor, numbers: Tensor, instance: Tensor, radius: float) -> Tensor:
    """Which instances are whose neighbours.

    Those of a cell are the other cells that have a pixel within the radius of its centroid; those of the background all
    cells. The background is no neighbour of a cell, whose term its many pixels would rule.

    Args:
        labels: (h, w).
        numbers: (I,), the labels that occur, rising.
        instance: (P,), index of each pixel's label among them.
        radius: pixels of the map.

    Returns:
        (I, I) bool: row the instance, column its neighbour.
    """
    height, width = labels.shape
    y = torch.arange(height, device=labels.device).repeat_interleave(width).float()
    x = torch.arange(width, device=labels.device).repeat(height).float()
    place = torch.stack((y, x), dim=1)
    sums = place.new_zeros(len(numbers), 2).index_add(0, instance, place)
    centroids = sums / instance.bincount(minlength=len(numbers))[:, None]
    near = (torch.cdist(place, centroids) <= radius).float()  # [P,I]
    beside = near.new_zeros(len(numbers), len(numbers)).index_add(0, instance, near).T > 0
    cell = numbers > 0
    beside = torch.where(cell[:, None], beside, True) & cell
    return beside & ~torch.eye(len(numbers), dtype=torch.bool, device=labels.device)

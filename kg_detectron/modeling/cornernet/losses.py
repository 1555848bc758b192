"""Losses of CornerNet (Law and Deng 2018, equations 1 to 5)."""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kg_detectron.modeling.cornernet.heads import CornerMaps
from kg_detectron.modeling.cornernet.settings import CornerLossSettings
from kg_detectron.modeling.cornernet.targets import CornerTargets
from kg_detectron.modeling.precision import for_losses


def corner_losses(
    maps: CornerMaps, targets: CornerTargets, settings: CornerLossSettings, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Focal loss of the heatmaps, pull and push of the tags, smooth L1 of the offsets; both corner types summed.

    Args:
        maps, targets: of a batch.
        settings: the weights of the losses.
        weights: (K,) of the classes; 1 by default.

    Returns:
        ``loss_heatmap``, ``loss_pull``, ``loss_push``, ``loss_offset``: scalars, weighted; the tags' are means over the
        images.
    """
    image, corner = targets.image[:, None], torch.arange(2, device=targets.image.device)
    x, y = targets.place.unbind(2)  # [M,2] each
    tags = for_losses(maps.tag)[image, corner, y, x]
    offsets = for_losses(maps.offset)[image, corner, :, y, x]
    pull, push = tag_losses(tags, targets.image, len(maps.tag))
    cells = max(1, len(tags))
    return {
        "loss_heatmap": focal_loss(
            for_losses(maps.heatmap).sigmoid(),
            targets.heatmap,
            targets.unclassified if targets.heatmap.shape[2] > 1 else None,
            weights,
        ),
        "loss_pull": settings.pull_weight * pull + 0 * maps.tag.sum(),
        "loss_push": settings.push_weight * push,
        "loss_offset": settings.offset_weight
        * smooth_l1_loss(offsets, targets.offset.to(offsets), reduction="sum")
        / cells
        + 0 * maps.offset.sum(),
    }


def focal_loss(
    probability: Tensor, target: Tensor, unclassified: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Focal loss with the penalty lowered around the corners, over the number of corners of each type.

    At a corner of a cell whose class is not known the most probable class counts as the true one, and around it the
    penalty is lowered for all classes.

    Args:
        probability, target: (N, 2, K, h, w), 0..1, of each class; the target is 1 at corners.
        unclassified: (N, 2, h, w), the same of cells whose class is not known; none by default.
        weights: (K,) of the corners of each class; 1 by default.
    """
    p = probability.clamp(1e-4, 1 - 1e-4)
    corner = target == 1
    positive = (1 - p) ** 2 * p.log() * corner
    if weights is not None:
        positive = positive * weights[:, None, None]
    if unclassified is not None:
        target = torch.maximum(target, unclassified[:, :, None])
    negative = (1 - target) ** 4 * p**2 * (1 - p).log()  # 0 at corners
    total, corners = (positive + negative).sum((0, 2, 3, 4)), corner.sum((0, 2, 3, 4))
    if unclassified is not None:
        best, corner = p.amax(2), unclassified == 1
        total = total + ((1 - best) ** 2 * best.log() * corner).sum((0, 2, 3))
        corners = corners + corner.sum((0, 2, 3))
    return -(total / corners.clamp(min=1)).sum()


def tag_losses(tags: Tensor, image: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Pull of the two tags of each cell to their mean, and push of the means of an image's cells by 1 apart.

    Args:
        tags: (M, 2) of both corners.
        image: (M,) int64, the image of each cell.
        images: their number N.

    Returns:
        Scalars, means over the images.
    """
    pull = push = tags.sum() * 0
    for i in range(images):
        mine = tags[image == i]
        if len(mine):
            mean = mine.mean(1)
            pull = pull + (mine - mean[:, None]).square().sum() / len(mine) / images
        if len(mine) > 1:
            close = (1 - (mean[:, None] - mean).abs()).relu()
            push = push + (close.sum() - close.trace()) / (len(mine) * (len(mine) - 1)) / images
    return pull, push

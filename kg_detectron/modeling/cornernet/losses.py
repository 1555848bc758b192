"""Losses of CornerNet (Law and Deng 2018, equations 1 to 5)."""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kg_detectron.modeling.cornernet.heads import CornerMaps
from kg_detectron.modeling.cornernet.settings import CornerLossSettings
from kg_detectron.modeling.cornernet.targets import CornerTargets


def corner_losses(maps: CornerMaps, targets: CornerTargets, settings: CornerLossSettings) -> dict[str, Tensor]:
    """Focal loss of the heatmaps, pull and push of the tags, smooth L1 of the offsets; both corner types summed.

    Returns:
        ``loss_heatmap``, ``loss_pull``, ``loss_push``, ``loss_offset``: scalars, weighted; the tags' are means over the
        images.
    """
    image, corner = targets.image[:, None], torch.arange(2, device=targets.image.device)
    x, y = targets.place.unbind(2)  # [M,2] each
    tags = maps.tag.float()[image, corner, y, x]
    offsets = maps.offset.float()[image, corner, :, y, x]
    pull, push = tag_losses(tags, targets.image, len(maps.tag))
    cells = max(1, len(tags))
    return {
        "loss_heatmap": focal_loss(maps.heatmap.float().sigmoid(), targets.heatmap),
        "loss_pull": settings.pull_weight * pull + 0 * maps.tag.sum(),
        "loss_push": settings.push_weight * push,
        "loss_offset": settings.offset_weight * smooth_l1_loss(offsets, targets.offset, reduction="sum") / cells
        + 0 * maps.offset.sum(),
    }


def focal_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Focal loss with the penalty lowered around the corners, over the number of corners of each type.

    Args:
        probability, target: (N, 2, h, w), 0..1; the target is 1 at corners.
    """
    p = probability.clamp(1e-4, 1 - 1e-4)
    corner = target == 1
    positive = (1 - p) ** 2 * p.log() * corner
    negative = (1 - target) ** 4 * p**2 * (1 - p).log()  # 0 at corners
    return -((positive + negative).sum((0, 2, 3)) / corner.sum((0, 2, 3)).clamp(min=1)).sum()


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

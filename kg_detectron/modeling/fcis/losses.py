"""Losses of FCIS (Li et al. 2017, section 3.3), of the hardest regions."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

from kg_detectron.modeling.fcis.settings import RegionLossSettings
from kg_detectron.modeling.fcis.targets import RegionTargets
from kg_detectron.modeling.precision import for_losses


def class_logits(scores: Tensor) -> Tensor:
    """Scores (R, 2, 2, S, S) of both classes, outside and inside -> (R, 2): the mean of the larger one of the two.

    A sample counts for a class where it is likely inside, or likely outside, an instance of it.
    """
    return scores.amax(2).mean((2, 3))


def mask_logits(scores: Tensor) -> Tensor:
    """Scores (R, 2, 2, S, S) -> (R, S, S): inside against outside a cell; the sigmoid is the softmax of the two."""
    return scores[:, 1, 1] - scores[:, 1, 0]


def region_losses(
    scores: Tensor, offsets: Tensor, targets: RegionTargets, settings: RegionLossSettings
) -> dict[str, Tensor]:
    """Classification of the regions, and masks and boxes of those that are cells.

    A region's loss is the cross entropy of its class, and for a cell, weighted, the mean cross entropy of the mask's
    samples and the smooth L1 of the offsets. In each image the regions of the highest loss are taken; the losses are
    sums over these, divided by their number.

    Args:
        scores: (R, 2, 2, S, S): background and cell; outside and inside.
        offsets: (R, 4).
        targets: of the same regions.
        settings: weights and number.

    Returns:
        ``loss_class``, ``loss_mask``, ``loss_box``: scalars, weighted.
    """
    scores, offsets = for_losses(scores), for_losses(offsets)
    of_class = cross_entropy(class_logits(scores), targets.cell.long(), reduction="none")
    of_mask = binary_cross_entropy_with_logits(mask_logits(scores), targets.mask.to(scores), reduction="none")
    of_box = smooth_l1_loss(offsets, targets.offset.to(offsets), reduction="none").sum(1)
    losses = {
        "loss_class": of_class,
        "loss_mask": settings.mask_weight * of_mask.mean((1, 2)) * targets.cell,
        "loss_box": settings.box_weight * of_box * targets.cell,
    }
    total = torch.stack(list(losses.values())).sum(0).detach()
    hard = hardest(total, targets.image, settings.hard_regions)
    return {name: loss[hard].sum() / max(1, len(hard)) for name, loss in losses.items()}


def hardest(loss: Tensor, image: Tensor, count: int) -> Tensor:
    """The indices of at most ``count`` regions of each image, those of the highest loss; both arguments (R,)."""
    falling = loss.argsort(descending=True, stable=True)
    chosen = [falling[image[falling] == i][:count] for i in image.unique().tolist()]
    return torch.cat(chosen) if chosen else falling

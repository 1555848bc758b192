"""Losses of DCAN (Chen et al. 2016, equation 2)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.modeling.dcan.settings import ContourHeadSettings
from kg_detectron.modeling.precision import for_losses


class Branch(NamedTuple):
    """The logits of one branch, objects or contours."""

    levels: list[Tensor]  # of each level alone, [N,h,w] at full size
    fused: Tensor  # [N,h,w], their sum


def dcan_losses(
    objects: Branch, contours: Branch, targets: tuple[Tensor, Tensor], settings: ContourHeadSettings
) -> dict[str, Tensor]:
    """Cross entropy of both branches: of the fused maps, and, as a help for the lower layers, of each level alone.

    Args:
        objects, contours: the logits.
        targets: of objects and contours, (N, h, w) of 0 and 1.
        settings: the weights.

    Returns:
        ``loss_object``, ``loss_contour``, ``loss_auxiliary``: scalars, weighted.
    """

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        logits = for_losses(logits)
        return binary_cross_entropy_with_logits(logits, target.to(logits))

    weights = (1.0, settings.contour_weight)
    branches = list(zip((objects, contours), targets, weights, strict=True))
    loss_object, loss_contour = (w * entropy(branch.fused, target) for branch, target, w in branches)
    levels = [w * entropy(level, target) for branch, target, w in branches for level in branch.levels]
    return {
        "loss_object": loss_object,
        "loss_contour": loss_contour,
        "loss_auxiliary": settings.auxiliary_weight * torch.stack(levels).sum(),
    }

"""Losses of StarDist (Schmidt et al. 2018, section 2.2; normalised as in the published code)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from kg_detectron.modeling.precision import for_losses
from kg_detectron.modeling.stardist.settings import StarHeadSettings


def star_losses(
    logits: Tensor, distances: Tensor, probability: Tensor, true_distances: Tensor, settings: StarHeadSettings
) -> dict[str, Tensor]:
    """Cross entropy of the object probabilities, and absolute error of the distances.

    The error, a mean over the rays, is weighted by the true object probability, so that pixels in the middle of cells
    count most. Where this probability is below 1, distances are drawn to 0 a little.

    Args:
        logits, probability: (N, h, w), predicted and true; the latter 0..1.
        distances, true_distances: (N, K, h, w), pixels.
        settings: the weights.

    Returns:
        ``loss_probability``, ``loss_distance``: scalars, weighted.
    """
    logits, distances = for_losses(logits), for_losses(distances)
    probability, true_distances = probability.to(logits), true_distances.to(distances)
    error = (distances - true_distances).abs().mean(1)
    loss = (probability * error).sum() / probability.sum().clamp(min=1e-6)
    loss = loss + settings.background_weight * ((1 - probability) * distances.abs().mean(1)).mean()
    return {
        "loss_probability": binary_cross_entropy_with_logits(logits, probability),
        "loss_distance": settings.distance_weight * loss,
    }


def star_class_loss(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross entropy of the classes of pixels, as in the published code: a mean over all pixels, to which those
    of no known class add nothing.

    Args:
        logits: (N, 1 + K, h, w), of the background and the classes.
        classes: (N, h, w) int64, see `star_classes`.
        weights: (K,) of the classes; that of the background is 1.
    """
    of_pixel = (weights.new_ones(1), weights, weights.new_zeros(1))  # -1 is the last
    entropy = cross_entropy(for_losses(logits), classes.clamp(min=0), reduction="none")
    return (torch.cat(of_pixel)[classes] * entropy).mean()

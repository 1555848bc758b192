"""Losses of the keypoint branch."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.graph import DIRECTED_EDGES, NUM_KEYPOINTS
from kg_detectron.modeling.keypoint_graph.heads import KeypointMaps
from kg_detectron.modeling.keypoint_graph.targets import TargetSettings, keypoint_targets

# Keypoint whose disc each channel of the offset maps lives in.
_SINGLE_KEYPOINT = [k for k in range(NUM_KEYPOINTS) for _ in "xy"]
_GROUP_KEYPOINT = [k for k, _ in DIRECTED_EDGES for _ in "xy"]


def _disc_l1(offset: Tensor, target: Tensor, disc: Tensor) -> Tensor:
    """Mean absolute error over the disc pixels of all channels; 0 where there are none."""
    return ((offset.float() - target).abs() * disc).sum() / disc.sum().clamp(min=1)


def keypoint_losses(
    maps: list[KeypointMaps],
    boxes: list[Tensor],
    size: tuple[int, int],
    settings: TargetSettings | None = None,
) -> dict[str, Tensor]:
    """Losses of the keypoint branch, summed over its scales (paper, equations 2 and 4).

    Per scale: binary cross entropy of the heatmap over all pixels and channels; L1 / r of the single and of the group
    offsets over the pixels inside the discs. An image without cells gives finite losses.

    Args:
        maps: the maps of each scale.
        boxes: N tensors (M, 4), xyxy continuous, input pixels.
        size: (H, W) of the padded input.
        settings: radius, smallest cell and weights; the paper's by default.

    Returns:
        ``loss_heatmap``, ``loss_single_offset``, ``loss_group_offset``: scalars, weighted.
    """
    settings = settings or TargetSettings()
    radius = settings.radius
    heatmap_loss = single_loss = group_loss = maps[0].heatmap.new_zeros((), dtype=torch.float32)
    finest = min(scale.stride for scale in maps)
    for scale in maps:
        smallest = settings.min_side if scale.stride == finest else None
        heatmap, single, group = keypoint_targets(boxes, size, scale.stride, radius, smallest)
        heatmap_loss = heatmap_loss + binary_cross_entropy_with_logits(scale.heatmap.float(), heatmap)
        single_loss = single_loss + _disc_l1(scale.single_offset, single, heatmap[:, _SINGLE_KEYPOINT]) / radius
        group_loss = group_loss + _disc_l1(scale.group_offset, group, heatmap[:, _GROUP_KEYPOINT]) / radius
    return {
        "loss_heatmap": settings.heatmap_weight * heatmap_loss,
        "loss_single_offset": settings.single_offset_weight * single_loss,
        "loss_group_offset": settings.group_offset_weight * group_loss,
    }

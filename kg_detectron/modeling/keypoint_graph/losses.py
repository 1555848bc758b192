"""Losses of the keypoint branch."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.graph import DIRECTED_EDGES, NUM_KEYPOINTS
from kg_detectron.modeling.keypoint_graph.heads import KeypointMaps
from kg_detectron.modeling.keypoint_graph.targets import TargetSettings, keypoint_targets
from kg_detectron.modeling.precision import for_losses
from kg_detectron.modeling.processes import loss_divisor

# Keypoint whose disc each channel of the offset maps lives in.
_SINGLE_KEYPOINT = [k for k in range(NUM_KEYPOINTS) for _ in "xy"]
_GROUP_KEYPOINT = [k for k, _ in DIRECTED_EDGES for _ in "xy"]


def _disc_l1(offset: Tensor, target: Tensor, disc: Tensor) -> Tensor:
    """Sum of the absolute errors over the disc pixels of all channels."""
    return ((for_losses(offset) - target).abs() * disc).sum()


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
    finest = min(scale.stride for scale in maps)
    sums, counts = [], []
    for scale in maps:
        smallest = settings.min_side if scale.stride == finest else None
        heatmap, single, group = keypoint_targets(boxes, size, scale.stride, settings.radius, smallest)
        logits = for_losses(scale.heatmap)
        in_single, in_group = heatmap[:, _SINGLE_KEYPOINT], heatmap[:, _GROUP_KEYPOINT]
        sums += [
            binary_cross_entropy_with_logits(logits, heatmap.to(logits), reduction="sum"),
            _disc_l1(scale.single_offset, single, in_single) / settings.radius,
            _disc_l1(scale.group_offset, group, in_group) / settings.radius,
        ]
        counts += [in_single.new_tensor(heatmap.numel(), dtype=torch.float64), in_single.sum(), in_group.sum()]
    means = torch.stack(sums) / loss_divisor(torch.stack([count.double() for count in counts])).to(sums[0])
    heatmap_loss, single_loss, group_loss = means.view(len(maps), 3).sum(0)
    return {
        "loss_heatmap": settings.heatmap_weight * heatmap_loss,
        "loss_single_offset": settings.single_offset_weight * single_loss,
        "loss_group_offset": settings.group_offset_weight * group_loss,
    }

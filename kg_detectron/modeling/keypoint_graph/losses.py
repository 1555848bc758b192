"""Losses of the keypoint branch and of the masks."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.graph import DIRECTED_EDGES, NUM_KEYPOINTS
from kg_detectron.modeling.keypoint_graph.heads import KeypointMaps
from kg_detectron.modeling.keypoint_graph.targets import keypoint_targets

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
    radius: float = 5.0,
    heatmap_weight: float = 1.0,
    single_offset_weight: float = 1.0,
    group_offset_weight: float = 0.25,
    min_side: float | None = None,
) -> dict[str, Tensor]:
    """Losses of the keypoint branch, summed over its scales.

    Per scale: binary cross entropy of the heatmap over all pixels and channels; L1 / r of the single and of the group
    offsets over the pixels inside the discs. An image without cells gives finite losses.

    Args:
        maps: the maps of each scale.
        boxes: N tensors (M,4), xyxy continuous, input pixels.
        size: (H, W) of the padded input.
        radius: disc radius r, pixels of each scale.
        heatmap_weight, single_offset_weight, group_offset_weight: weights.
        min_side: of the cells that are targets at the finest scale, see `keypoint_targets`; the others, which need not
            find the small ones, keep the paper's.

    Returns:
        ``loss_heatmap``, ``loss_single_offset``, ``loss_group_offset``: scalars, weighted.
    """
    heatmap_loss = single_loss = group_loss = 0
    finest = min(scale.stride for scale in maps)
    for scale in maps:
        smallest = min_side if scale.stride == finest else None
        heatmap, single, group = keypoint_targets(boxes, size, scale.stride, radius, smallest)
        heatmap_loss = heatmap_loss + binary_cross_entropy_with_logits(scale.heatmap.float(), heatmap)
        single_loss = single_loss + _disc_l1(scale.single_offset, single, heatmap[:, _SINGLE_KEYPOINT]) / radius
        group_loss = group_loss + _disc_l1(scale.group_offset, group, heatmap[:, _GROUP_KEYPOINT]) / radius
    return {
        "loss_heatmap": heatmap_weight * heatmap_loss,
        "loss_single_offset": single_offset_weight * single_loss,
        "loss_group_offset": group_offset_weight * group_loss,
    }


def mask_loss(logits: Tensor, targets: Tensor, areas: Tensor) -> Tensor:
    """Binary cross entropy of mask crops: mean over the pixels of a crop, then over the crops.

    Args:
        logits: (P,), the pixels of M crops, one crop after another.
        targets: (P,), bool or 0..1.
        areas: (M,) int64, pixels of each crop, M > 0.
    """
    areas = areas.to(logits.device)
    weight = (1 / areas).repeat_interleave(areas, output_size=len(logits))
    return binary_cross_entropy_with_logits(logits.float(), targets.float(), weight, reduction="sum") / len(areas)

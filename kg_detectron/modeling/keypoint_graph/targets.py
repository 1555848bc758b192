"""Training targets of the keypoint branch, rendered from boxes (paper, equations 1 and 3)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kg_detectron.layers import box_keypoints, render_targets
from kg_detectron.modeling.settings import require

__all__ = ["TargetSettings", "box_keypoints", "keypoint_targets"]


@dataclass(frozen=True)
class TargetSettings:
    """Settings of the training targets and of their losses (the paper's by default).

    Attributes:
        radius: radius r of the keypoint discs, pixels of each scale. Grouping matches within r + 1 and rejects within
            2 r.
        min_side: cells with both sides (last minus first pixel) above this many pixels of the finest scale are targets
            there; None is 2 r + 1, as at the other scales, which need not find the small ones.
        heatmap_weight, single_offset_weight, group_offset_weight: weights of the losses, 0 or more.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.KEYPOINT_GRAPH"

    radius: float = 5.0
    min_side: float | None = None
    heatmap_weight: float = 1.0
    single_offset_weight: float = 1.0
    group_offset_weight: float = 0.25

    def __post_init__(self) -> None:
        require(self.radius > 0, "radius", "pixels above 0", self.radius)
        require(self.min_side is None or self.min_side >= 0, "min_side", "0 or more pixels, or None", self.min_side)
        for name in ("heatmap_weight", "single_offset_weight", "group_offset_weight"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))


def keypoint_targets(
    boxes: list[Tensor], size: tuple[int, int], stride: int, radius: float = 5, min_side: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Render heatmap, single offsets and group offsets of one scale.

    A box is a target where both its sides (last minus first pixel) exceed `min_side` at that scale. Around each
    keypoint y the disc of the given radius holds heatmap 1, single offset y - x and group offsets y_l - x. A pixel in
    several discs of one type belongs to the nearest keypoint, of equally near ones to the first box.

    Args:
        boxes: N tensors (M,4), xyxy continuous (x2 = last pixel + 1), input pixels, all on one device.
        size: (H, W), input pixels.
        stride: of the scale; pixel index i of the input lies at (i + 0.5) / stride - 0.5.
        radius: of the discs, pixels of the scale.
        min_side: pixels of the scale; None is the paper's, 2 radius + 1.

    Returns:
        heatmap (N,5,h,w), single offset (N,10,h,w), group offset (N,40,h,w), float32; h = ceil(H / stride).

    Raises:
        ValueError: for boxes of another shape, no list, or a stride or radius that is not positive.
    """
    if not boxes:
        raise ValueError("boxes: expected one tensor (M,4) for each image, got an empty list")
    for i, b in enumerate(boxes):
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"boxes[{i}]: expected shape (M,4), got {tuple(b.shape)}")
    if stride < 1 or not radius > 0:
        raise ValueError(f"stride and radius: expected positive numbers, got {stride} and {radius}")
    if min_side is not None and not min_side >= 0:
        raise ValueError(f"min_side: expected 0 or more pixels, got {min_side}")
    image = torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor([len(b) for b in boxes]))
    height, width = (math.ceil(side / stride) for side in size)
    every = torch.cat(boxes).float()
    image = image.to(every.device, non_blocking=True)
    smallest = 2 * radius + 1 if min_side is None else min_side
    return render_targets(every, image, len(boxes), height, width, stride, radius, smallest)

"""Training targets of the keypoint branch, rendered from boxes (paper, equations 1 and 3)."""

import math

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from kg_detectron.layers import box_keypoints, render_targets

__all__ = ["box_keypoints", "jittered_boxes", "keypoint_targets"]


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


def jittered_boxes(boxes: Tensor, size: tuple[int, int], amount: float) -> Tensor:
    """Boxes that are off as decoded ones are: each edge moved at random, uniformly by up to `amount` of the box's side.

    Args:
        boxes: (M,4), xyxy continuous, input pixels.
        size: (H, W) of the image, which the result stays in.
        amount: fraction of the width (left, right) or height (top, bottom), at least 0 and below 0.5, so that edges
            never cross.

    Returns:
        (M,4); the random numbers are those of PyTorch's generator of the boxes' device.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + (2 * torch.rand_like(boxes) - 1) * amount * sides
    return clip_boxes_to_image(moved, size)

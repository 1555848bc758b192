"""Training targets of the keypoint branch, rendered from boxes (paper, equations 1 and 3)."""

import math

import torch
from torch import Tensor

from ..graph import DIRECTED_EDGES, GROUP_OFFSET_CHANNELS, NUM_KEYPOINTS, SINGLE_OFFSET_CHANNELS


def box_keypoints(boxes: Tensor) -> Tensor:
    """Keypoints of boxes: (M,4) xyxy continuous -> (M,5,2) x, y pixel indices, in the order of `graph.KEYPOINTS`."""
    x1, y1, x2, y2 = boxes[:, 0], boxes[:, 1], boxes[:, 2] - 1, boxes[:, 3] - 1
    x = torch.stack((x1, x2, x1, x2, (x1 + x2) / 2), dim=1)
    y = torch.stack((y1, y1, y2, y2, (y1 + y2) / 2), dim=1)
    return torch.stack((x, y), dim=2)


@torch.no_grad()
def keypoint_targets(
    boxes: list[Tensor], size: tuple[int, int], stride: int, radius: float = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Render heatmap, single offsets and group offsets of one scale.

    A box is a target where both its sides (last minus first pixel) exceed 2 radius + 1 at that scale. Around each
    keypoint y the disc of the given radius holds heatmap 1, single offset y - x and group offsets y_l - x. A pixel in
    several discs of one type belongs to the nearest keypoint, of equally near ones to the first box.

    Args:
        boxes: N tensors (M,4), xyxy continuous (x2 = last pixel + 1), input pixels, all on one device.
        size: (H, W), input pixels.
        stride: of the scale; pixel index i of the input lies at (i + 0.5) / stride - 0.5.
        radius: of the discs, pixels of the scale.

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
    n, (h, w), device = len(boxes), (math.ceil(side / stride) for side in size), boxes[0].device
    heatmap = torch.zeros(n, NUM_KEYPOINTS, h, w, device=device)
    single = torch.zeros(n, SINGLE_OFFSET_CHANNELS, h, w, device=device)
    group = torch.zeros(n, GROUP_OFFSET_CHANNELS, h, w, device=device)

    image = torch.repeat_interleave(torch.arange(n), torch.tensor([len(b) for b in boxes])).to(device)
    every = torch.cat(boxes).float()
    large = ((every[:, 2:] - every[:, :2] - 1) / stride > 2 * radius + 1).all(1)
    image = image[large]
    keypoints = (box_keypoints(every[large]) + 0.5) / stride - 0.5  # [M,5,2]
    if not len(keypoints):
        return heatmap, single, group

    # Every pixel of every disc: a square window around each keypoint, cut to the disc and the map.
    reach = math.ceil(radius)
    window = torch.arange(-reach, reach + 2, device=device)
    corner = keypoints.floor().long()
    x = corner[..., 0, None, None] + window
    y = corner[..., 1, None, None] + window[:, None]
    x, y = torch.broadcast_tensors(x, y)  # [M,5,S,S]
    squared = (x - keypoints[..., 0, None, None]) ** 2 + (y - keypoints[..., 1, None, None]) ** 2
    inside = (squared <= radius**2) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    box, k, _, _ = inside.nonzero().unbind(1)
    x, y, squared = x[inside], y[inside], squared[inside]
    pixel = ((image[box] * NUM_KEYPOINTS + k) * h + y) * w + x

    # The nearest keypoint owns the pixel, then the first box: two scatters, so that the order of writes is irrelevant.
    nearest = squared.new_full((heatmap.numel(),), math.inf).scatter_reduce_(0, pixel, squared, "amin")
    box_of = torch.where(squared == nearest[pixel], box, len(keypoints))
    first = box.new_full((heatmap.numel(),), len(keypoints)).scatter_reduce_(0, pixel, box_of, "amin")
    owns = box == first[pixel]
    box, k, x, y = box[owns], k[owns], x[owns], y[owns]

    i, at = image[box], torch.stack((x, y), dim=1)
    heatmap[i, k, y, x] = 1
    offset = keypoints[box, k] - at
    single[i, 2 * k, y, x], single[i, 2 * k + 1, y, x] = offset.unbind(1)
    for e, (source, target) in enumerate(DIRECTED_EDGES):
        of = k == source
        offset = keypoints[box[of], target] - at[of]
        group[i[of], 2 * e, y[of], x[of]], group[i[of], 2 * e + 1, y[of], x[of]] = offset.unbind(1)
    return heatmap, single, group

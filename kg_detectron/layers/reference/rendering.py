"""Training targets of one scale (paper, equations 1 and 3)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph import DIRECTED_EDGES, NUM_KEYPOINTS, SINGLE_OFFSET_CHANNELS
from ..checks import check_targets
from ..keypoints import box_keypoints


@torch.no_grad()
def render_targets(
    boxes: Tensor,
    image: Tensor,
    images: int,
    height: int,
    width: int,
    stride: float,
    radius: float,
    min_side: float,
    edges: Sequence[tuple[int, int]] = DIRECTED_EDGES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layers.render_targets`: boxes (M, 4) -> maps (N, 5, H, W), (N, 10, H, W) and (N, 2E, H, W)."""
    check_targets(boxes, image, images, height, width, stride, radius, edges)
    n, h, w, device = images, height, width, boxes.device
    heatmap = torch.zeros(n, NUM_KEYPOINTS, h, w, device=device)
    single = torch.zeros(n, SINGLE_OFFSET_CHANNELS, h, w, device=device)
    group = torch.zeros(n, 2 * len(edges), h, w, device=device)

    large = ((boxes[:, 2:] - boxes[:, :2] - 1) / stride > min_side).all(1)
    image = image[large]
    keypoints = (box_keypoints(boxes[large]) + 0.5) / stride - 0.5  # [M,5,2]
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

    i, place = image[box], torch.stack((x, y), dim=1)
    heatmap[i, k, y, x] = 1
    offset = keypoints[box, k] - place
    single[i, 2 * k, y, x], single[i, 2 * k + 1, y, x] = offset.unbind(1)
    for e, (source, target) in enumerate(edges):
        of_edge = k == source
        offset = keypoints[box[of_edge], target] - place[of_edge]
        group[i[of_edge], 2 * e : 2 * e + 2, y[of_edge], x[of_edge]] = offset
    return heatmap, single, group

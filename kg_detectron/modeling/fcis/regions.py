"""Position-sensitive maps, assembled for regions; and boxes as offsets from regions.

R regions, C channels, k groups to a side, h, w of a map. A region is a row (image, x1, y1, x2, y2), input pixels. It
has k x k parts; part (i, j) reads the maps of its own, number i k + j, and is sampled at 3 x 3 points, so that a region
becomes a square of S = 3 k samples to a side, whatever its size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Samples of a part to a side.
SAMPLES = 3
# Offsets are those of regions in these fractions of their sides, so that they are about as large as other outputs.
_OFFSET_SCALES = (0.1, 0.1, 0.2, 0.2)
# Sides grow at most by this factor.
_LARGEST_GROWTH = 1000 / 16


def region_rows(boxes: Sequence[Tensor]) -> Tensor:
    """The boxes of N images, tensors (R, 4), as one tensor of regions (R, 5)."""
    numbers = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat((torch.cat(numbers), torch.cat(list(boxes))), dim=1)


def assembled(maps: Tensor, regions: Tensor, stride: int, groups: int) -> Tensor:
    """What the maps say at every sample of the regions.

    Torchvision's operator takes one sample at the middle of each part. Regions moved by thirds of a part give the
    other ones.

    Args:
        maps: (N, C k k, h, w); channel c k k + i k + j belongs to part (i, j).
        regions: (R, 5).
        stride: of the maps.
        groups: k.

    Returns:
        (R, C, S, S), bilinear; 0 outside the maps.
    """
    from torchvision.ops import ps_roi_align  # torchvision takes seconds to import

    count, channels = len(regions), maps.shape[1] // groups**2
    steps = torch.arange(SAMPLES, device=regions.device) - SAMPLES // 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    part = (regions[:, 3:] - regions[:, 1:3]) / groups  # [R,2] sides of a part
    shift = torch.stack((x, y), dim=2)[:, :, None] * part / SAMPLES  # [3,3,R,2]
    moved = torch.cat((regions[:, :1].expand(SAMPLES, SAMPLES, -1, -1), regions[:, 1:] + shift.repeat(1, 1, 1, 2)), 3)
    values = ps_roi_align(maps, moved.reshape(-1, 5), groups, 1 / stride, sampling_ratio=1)
    values = values.view(SAMPLES, SAMPLES, count, channels, groups, groups).permute(2, 3, 4, 0, 5, 1)
    return values.reshape(count, channels, SAMPLES * groups, SAMPLES * groups)


def pooled(maps: Tensor, regions: Tensor, stride: int, groups: int) -> Tensor:
    """The mean of `assembled` over the samples, (R, C)."""
    from torchvision.ops import ps_roi_align

    return ps_roi_align(maps, regions, groups, 1 / stride, sampling_ratio=SAMPLES).mean((2, 3))


def box_offsets(regions: Tensor, boxes: Tensor) -> Tensor:
    """Where boxes lie, seen from regions, both (R, 4), xyxy: centres and logarithms of sides, (R, 4)."""
    sides, others = regions[:, 2:] - regions[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + others / 2 - regions[:, :2] - sides / 2) / sides
    return torch.cat((shift, (others / sides).log()), dim=1) / shift.new_tensor(_OFFSET_SCALES)


def moved_boxes(regions: Tensor, offsets: Tensor) -> Tensor:
    """The boxes (R, 4) that lie at offsets (R, 4) from regions (R, 4): the inverse of `box_offsets`."""
    sides = regions[:, 2:] - regions[:, :2]
    offsets = offsets * offsets.new_tensor(_OFFSET_SCALES)
    centres = regions[:, :2] + sides / 2 + offsets[:, :2] * sides
    half = sides * offsets[:, 2:].clamp(max=math.log(_LARGEST_GROWTH)).exp() / 2
    return torch.cat((centres - half, centres + half), dim=1)

"""The pixels of crops of different sizes, in one row."""

import torch
from torch import Tensor


def crop_pixels(sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of crops, row by row, one crop after another.

    Args:
        sizes: (R, 2) int64 on the CPU, height and width.
        device: of the results.

    Returns:
        Crop, y and x of each pixel, (P,) int64.
    """
    areas = sizes.prod(1)
    first = (areas.cumsum(0) - areas).to(device)
    crops, total = torch.arange(len(sizes), device=device), int(areas.sum())
    crop = torch.repeat_interleave(crops, areas.to(device), output_size=total)
    place = torch.arange(len(crop), device=device) - first[crop]
    width = sizes[:, 1].to(device)[crop]
    return crop, place // width, place % width

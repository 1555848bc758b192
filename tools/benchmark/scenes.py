"""Cells for the benchmarks: their boxes, and maps as a good network gives them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kg_detectron.modeling import KeypointMaps, keypoint_targets

RADIUS = 5.0
STRIDES = (1, 2, 4, 8)


def cells(count: int, size: int, seed: int) -> Tensor:
    """Boxes of cells (count,4) xyxy: sides from 14 pixels to an eighth of the image, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    side = 14 + torch.rand(count, 2, generator=generator) ** 2 * max(size / 8 - 14, 0)
    corner = torch.rand(count, 2, generator=generator) * (size - side)
    return torch.cat((corner, corner + side), dim=1).round()


def network_maps(
    count: int, batch: int, size: int, device: str, radius: float = RADIUS, strides: Sequence[int] = STRIDES
) -> list[KeypointMaps]:
    """What a good network gives for images of so many cells: the targets of all scales, and noise."""
    generator = torch.Generator().manual_seed(0)
    boxes = [cells(count, size, seed=i) for i in range(batch)]
    maps = []
    for stride in strides:
        heatmap, single, group = keypoint_targets(boxes, (size, size), stride, radius)
        noisy = (
            heatmap * 10 - 6 + torch.randn(heatmap.shape, generator=generator),
            single + torch.randn(single.shape, generator=generator),
            group + torch.randn(group.shape, generator=generator),
        )
        maps.append(KeypointMaps(*(m.to(device) for m in noisy), stride))
    return maps

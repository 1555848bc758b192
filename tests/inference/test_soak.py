"""Thousands of images decoded one after the other: memory stays flat."""

import os
from pathlib import Path

import pytest
import torch

from kg_detectron.modeling import KeypointDecoder, KeypointMaps

PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes
WARM_UP = 100  # decodes until allocators and caches have what they need


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def random_maps(generator: torch.Generator) -> list[KeypointMaps]:
    """Maps of one or two images at two scales, of random size and density of keypoints; some without any."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    images, side, offset = draw(1, 3), (16 * draw(1, 5), 16 * draw(1, 5)), float(draw(-8, 1))
    maps = []
    for stride in (1, 2):
        shape = images, side[0] // stride, side[1] // stride
        parts = [torch.randn(shape[0], c, *shape[1:], generator=generator) * 4 for c in (5, 10, 40)]
        maps.append(KeypointMaps(parts[0] + offset, parts[1], parts[2], stride))
    return maps


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which is not here")
@pytest.mark.parametrize("decodes", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(decodes: int):
    """What leaked a single map (about 50 kB) a decode would take 15 MB after 300, and 500 MB after 10,000."""
    generator = torch.Generator().manual_seed(0)
    decoder = KeypointDecoder(radius=3)
    boxes_so_far, resident = 0, 0
    for i in range(WARM_UP + decodes):
        if i == WARM_UP:
            resident = resident_bytes()
        maps = random_maps(generator)
        sizes = [tuple(side * maps[0].stride for side in maps[0].heatmap.shape[2:])] * len(maps[0].heatmap)
        with torch.no_grad():
            boxes_so_far += sum(len(boxes) for boxes, _ in decoder(maps, sizes))
    assert boxes_so_far > decodes
    assert resident_bytes() - resident < 8 * 2**20

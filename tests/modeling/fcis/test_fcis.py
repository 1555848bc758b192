"""FCIS: assembly, targets, losses and decoding against plain loops, and targets that decode to the cells."""

import math

import numpy as np
import pytest
import torch
from builders import nuclei_example
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from kg_detectron.modeling.fcis.decoding import decode_regions, vote
from kg_detectron.modeling.fcis.losses import class_logits, hardest, region_losses
from kg_detectron.modeling.fcis.regions import assembled, box_offsets, moved_boxes, pooled, region_rows
from kg_detectron.modeling.fcis.settings import (
    ProposalSettings,
    RegionDecodingSettings,
    RegionLossSettings,
)
from kg_detectron.modeling.fcis.targets import RegionTargets, region_targets

SIDE = 64


def bilinear(image: torch.Tensor, y: float, x: float) -> float:
    """The value of (h, w) at a place in pixel indices; beyond the outermost pixels that of the nearest one."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    total = 0.0
    for i, a in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
        for j, b in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
            total += a * b * float(image[i, j])
    return total


def random_regions(seed: int, count: int, side: float = SIDE) -> torch.Tensor:
    """(count, 4) boxes within a square."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * side * 0.7
    sides = 3 + torch.rand(count, 2, generator=generator) * side / 2
    return torch.cat((low, (low + sides).clamp(max=side)), dim=1)


@pytest.mark.parametrize("stride", [2, 4])
def test_assembly_is_that_of_plain_loops(stride):
    torch.manual_seed(0)
    groups, channels = 3, 2
    maps = torch.randn(2, channels * groups**2, SIDE // stride, SIDE // stride)
    regions = region_rows([random_regions(0, 2), random_regions(1, 2)])
    found = assembled(maps, regions, stride, groups)
    for (image, x1, y1, x2, y2), of_region in zip(regions.tolist(), found, strict=True):
        for c, i, j in np.ndindex(channels, 3 * groups, 3 * groups):
            y = (y1 + (i + 0.5) / (3 * groups) * (y2 - y1)) / stride - 0.5
            x = (x1 + (j + 0.5) / (3 * groups) * (x2 - x1)) / stride - 0.5
            part = (i // 3) * groups + j // 3
            expected = bilinear(maps[int(image), c * groups**2 + part], y, x)
            assert float(of_region[c, i, j]) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(pooled(maps, regions, stride, groups), found.mean((2, 3)), atol=1e-5, rtol=1e-4)
    assert assembled(maps, regions[:0], stride, groups).shape == (0, channels, 9, 9)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_offsets_lead_back_to_the_boxes(seed):
    regions, boxes = random_regions(seed, 5), random_regions(seed + 1, 5)
    torch.testing.assert_close(moved_boxes(regions, box_offsets(regions, boxes)), boxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(box_offsets(regions, regions), torch.zeros(5, 4), atol=1e-4, rtol=0)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_targets_decode_to_the_cells(seed, count):
    """Regions that lie near the cells, with their targets in place of what a network says."""
    _, target = nuclei_example(np.random.default_rng(seed), SIDE, count)
    boxes, masks = target["boxes"], target["masks"]
    large = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= 5
    boxes, masks = boxes[large], masks[large]
    noise = 2 * torch.rand(2 * len(boxes), 4, generator=torch.Generator().manual_seed(seed)) - 1
    regions = boxes.repeat(2, 1) + 0.1 * noise * (boxes[:, 2:] - boxes[:, :2]).repeat(2, 2)
    targets = region_targets([regions], [boxes], [masks], 21)
    refined = moved_boxes(regions, targets.offset).clamp(min=0, max=SIDE)
    again = region_targets([refined], [boxes], [masks], 21)
    decoding = RegionDecodingSettings(overlap_threshold=0.9, merge_overlap=0.9)
    cells = decode_regions(refined, again.cell.float(), again.mask, (SIDE, SIDE), decoding)
    found = torch.stack([*cells.masks, torch.zeros(SIDE, SIDE, dtype=torch.bool)])
    overlap = (masks[:, None] & found).sum((2, 3)) / (masks[:, None] | found).sum((2, 3))
    whole = box_iou(boxes, boxes).fill_diagonal_(0).amax(1) < 0.5  # of two in one place a region may take either
    assert (overlap.amax(1)[whole] > 0.9).all()
    if whole.all():
        assert len(cells) == len(boxes)


def test_targets_are_those_of_plain_loops():
    _, target = nuclei_example(np.random.default_rng(3), SIDE, 5)
    boxes, masks = target["boxes"], target["masks"]
    regions = torch.cat((random_regions(1, 20), boxes + torch.tensor([-1.0, 0, 1, 2])))
    targets = region_targets([regions, regions[:2]], [boxes, boxes[:0]], [masks, masks[:0]], 6)
    assert targets.image.tolist() == [0] * len(regions) + [1] * 2 and not targets.cell[-2:].any()
    assert targets.cell[:-2].any() and not targets.cell[:-2].all()
    for index, region in enumerate(regions):
        overlaps = box_iou(region[None], boxes)[0]
        best = int(overlaps.argmax())
        assert bool(targets.cell[index]) == (float(overlaps[best]) >= 0.5)
        if not targets.cell[index]:
            assert not targets.mask[index].any() and not targets.offset[index].any()
            continue
        torch.testing.assert_close(moved_boxes(region[None], targets.offset[index][None])[0], boxes[best])
        x1, y1, x2, y2 = region.tolist()
        for i, j in np.ndindex(6, 6):
            share = np.mean(
                [
                    bilinear(
                        masks[best].float(),
                        y1 + (i + a) / 6 * (y2 - y1) - 0.5,
                        x1 + (j + b) / 6 * (x2 - x1) - 0.5,
                    )
                    for a in (0.25, 0.75)
                    for b in (0.25, 0.75)
                ]
            )
            if abs(share - 0.4) > 1e-4:
                assert float(targets.mask[index, i, j]) == (share >= 0.4)


def random_case(seed: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor, RegionTargets]:
    generator = torch.Generator().manual_seed(seed)
    scores, offsets = torch.randn(count, 2, 2, 3, 3, generator=generator), torch.randn(count, 4, generator=generator)
    cell = torch.rand(count, generator=generator) > 0.4
    mask = (torch.rand(count, 3, 3, generator=generator) > 0.5).float() * cell[:, None, None]
    offset = torch.randn(count, 4, generator=generator) * cell[:, None]
    return scores, offsets, RegionTargets(cell, offset, mask, torch.arange(count) // 4)


def test_losses_are_those_of_plain_loops():
    scores, offsets, targets = random_case(0)
    weights = RegionLossSettings(hard_regions=2, mask_weight=3.0, box_weight=0.5)
    of_region = []
    for r in range(len(scores)):
        logits = [0.0, 0.0]
        mask = box = 0.0
        for i, j in np.ndindex(3, 3):
            for c in range(2):
                logits[c] += max(float(scores[r, c, 0, i, j]), float(scores[r, c, 1, i, j])) / 9
            outside, inside = (math.exp(float(scores[r, 1, side, i, j])) for side in range(2))
            mask -= math.log((inside if targets.mask[r, i, j] else outside) / (inside + outside)) / 9
        for difference in (offsets[r] - targets.offset[r]).abs().tolist():
            box += difference - 0.5 if difference > 1 else difference**2 / 2
        label = int(targets.cell[r])
        own = -math.log(math.exp(logits[label]) / (math.exp(logits[0]) + math.exp(logits[1])))
        of_region.append((own, 3 * mask * label, 0.5 * box * label))
    chosen = []
    for image in (0, 1):
        mine = [of_region[r] for r in range(len(scores)) if targets.image[r] == image]
        chosen += sorted(mine, key=sum)[-2:]
    expected = [sum(values) / len(chosen) for values in zip(*chosen, strict=True)]
    losses = region_losses(scores, offsets, targets, weights)
    assert [float(losses[name]) for name in ("loss_class", "loss_mask", "loss_box")] == pytest.approx(expected)


def test_no_region_has_no_loss():
    scores, offsets, targets = random_case(0)
    none = region_losses(scores[:0], offsets[:0], RegionTargets(*(t[:0] for t in targets)), RegionLossSettings())
    assert all(float(value) == 0 for value in none.values())
    assert hardest(torch.tensor([1.0, 3, 2, 5]), torch.tensor([0, 0, 0, 1]), 2).tolist() == [1, 2, 3]


def test_a_region_is_a_cell_where_it_is_inside_or_outside_one():
    """Both halves of a cell's box count for it, which a mean over the mask alone would not see."""
    scores = torch.zeros(1, 2, 2, 4, 4)
    scores[0, 1, 0, :, :2] = scores[0, 1, 1, :, 2:] = 5.0
    assert class_logits(scores).tolist() == [[0, 5]]


def test_regions_vote_for_the_mask():
    """Two of three regions, of two thirds of the scores, hold the right half."""
    box = torch.tensor([[10.0, 10, 20, 20]])
    masks = torch.zeros(3, 2, 2)
    masks[:2, :, 1] = 1
    masks[2, :, 0] = 1
    crop, window = vote(box.repeat(3, 1), torch.tensor([0.5, 0.5, 0.5]), masks, 0.4)
    assert window == (10, 10, 20, 20) and crop[:, 6:].all() and not crop[:, :4].any()
    cells = decode_regions(
        torch.cat((box.repeat(3, 1), torch.tensor([[40.0, 40, 50, 50], [0, 0, 0.5, 9]]))),
        torch.tensor([0.5, 0.6, 0.5, 0.9, 0.9]),
        torch.cat((masks, torch.zeros(1, 2, 2), torch.ones(1, 2, 2))),
        (60, 60),
        RegionDecodingSettings(),
    )
    # The region without a pixel and that of half a pixel are no cells; of the three one is, with its own score.
    assert cells.scores.tolist() == pytest.approx([0.6]) and cells.boxes.tolist() == [[15, 10, 20, 20]]


def test_no_region_gives_no_cell():
    cells = decode_regions(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 21, 21), (8, 9), RegionDecodingSettings())
    assert len(cells) == 0 and cells.size == (8, 9)


@pytest.mark.parametrize("sizes", [(), (8, 16), (16, 8, 32), (0, 8, 16)])
def test_anchors_that_do_not_fit_the_maps_are_named(sizes):
    with pytest.raises(ValueError, match="anchor_sizes"):
        ProposalSettings(anchor_sizes=sizes)

"""CornerNet: pooling, targets, losses and decoding against plain loops."""

import math

import numpy as np
import pytest
import torch
from builders import nuclei_example
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from kg_detectron.modeling import BackboneSettings, CornerNet, Preprocessing, TrunkSettings
from kg_detectron.modeling.cornernet.decoding import decode_corners, soft_nms
from kg_detectron.modeling.cornernet.heads import CornerMaps, running_maximum
from kg_detectron.modeling.cornernet.losses import corner_losses, focal_loss, tag_losses
from kg_detectron.modeling.cornernet.network import filled_boxes
from kg_detectron.modeling.cornernet.settings import (
    CornerDecodingSettings,
    CornerHeadSettings,
    CornerLossSettings,
    CornerNetSettings,
)
from kg_detectron.modeling.cornernet.targets import corner_targets, gaussian_radius

SIDE = 64


def maps_of_boxes(boxes: torch.Tensor, stride: int, labels: torch.Tensor | None = None, classes: int = 1) -> CornerMaps:
    """The maps that a perfect network would give; each cell has its number as its tag."""
    targets = corner_targets(
        [boxes], (SIDE, SIDE), stride, labels=None if labels is None else [labels], classes=classes
    )
    shape = targets.heatmap.shape[3:]
    tag, offset = torch.full((2, *shape), 1e3), torch.zeros(2, 2, *shape)
    tag[1] = -1e3
    for number, (place, within) in enumerate(zip(targets.place, targets.offset, strict=True)):
        for corner in range(2):
            x, y = place[corner].tolist()
            tag[corner, y, x], offset[corner, :, y, x] = float(number), within[corner]
    return CornerMaps(torch.logit(targets.heatmap[0], eps=1e-4), tag, offset)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_targets_decode_to_the_boxes(seed, count, stride):
    rng = np.random.default_rng(seed)
    low = 8 * rng.permutation(7)[:count, None] + rng.integers(0, 2, (count, 2))
    boxes = torch.from_numpy(np.hstack((low, low + rng.integers(5, 40, (count, 2))))).float().clamp(max=SIDE)
    for corners in (boxes[:, :2], boxes[:, 2:] - 1):  # corners beside each other would be one peak
        places = (corners / stride).floor()
        assume((torch.cdist(places, places) + 9 * torch.eye(count)).min() >= 2)
    decoding = CornerDecodingSettings(peak_threshold=0.9, tag_distance=0.1, overlap_sigma=1e6)
    labels = torch.from_numpy(rng.integers(1, 4, count))
    for kinds, classes in ((None, 1), (labels, 3)):
        maps = maps_of_boxes(boxes, stride, kinds, classes)
        found, scores, numbers = decode_corners(maps, stride, (SIDE, SIDE), decoding)
        assert len(found) == count
        overlap, match = box_iou(boxes, found).max(1)
        assert overlap.min() > 0.999 and (scores > 0.9).all()
        assert numbers[match].tolist() == (labels.tolist() if classes > 1 else [1] * count)


def test_corners_of_two_classes_are_no_pair():
    maps = maps_of_boxes(torch.tensor([[8.0, 8, 40, 40]]), 4, torch.tensor([2]), 3)
    decoding = CornerDecodingSettings(peak_threshold=0.5, tag_distance=0.1)
    assert decode_corners(maps, 4, (SIDE, SIDE), decoding)[2].tolist() == [2]
    maps.heatmap[1] = maps.heatmap[1].roll(1, 0)  # the bottom right corner is of the third class now
    assert not len(decode_corners(maps, 4, (SIDE, SIDE), decoding)[0])


def test_of_two_classes_at_one_place_the_better_one_stays_in_front():
    """Boxes of all classes suppress each other: a cell is of one class."""
    maps = maps_of_boxes(torch.tensor([[8.0, 8, 40, 40]]), 4, torch.tensor([2]), 3)
    maps.heatmap[:, 0] = torch.logit(0.8 * maps.heatmap[:, 1].sigmoid())
    decoding = CornerDecodingSettings(peak_threshold=0.5, tag_distance=0.1)
    boxes, scores, labels = decode_corners(maps, 4, (SIDE, SIDE), decoding)
    assert torch.equal(boxes[0], boxes[1]) and labels.tolist() == [2, 1]
    assert float(scores[1] / scores[0]) == pytest.approx(0.8 * math.exp(-1 / 0.5), rel=1e-4)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("from_end", [False, True])
def test_corner_pooling_is_that_of_plain_loops(axis, from_end):
    x = torch.randn(2, 3, 4, 5)
    result = running_maximum(x, axis, from_end)
    for n, c, i, j in np.ndindex(*x.shape):
        line, at = (x[n, c, :, j], i) if axis == 2 else (x[n, c, i], j)
        assert result[n, c, i, j] == (line[at:] if from_end else line[: at + 1]).max()


@given(st.integers(3, 40), st.integers(3, 40), st.sampled_from([0.3, 0.5, 0.7]))
def test_the_radius_keeps_the_overlap(width, height, overlap):
    radius = float(gaussian_radius(torch.tensor([[float(width), float(height)]]), overlap))
    box = torch.tensor([[0.0, 0.0, width, height]])
    worst = []
    for first, last in [(1, 1), (1, -1), (-1, 1)]:
        moved = box + radius * torch.tensor([first, first, last, last])
        if (moved[:, 2:] > moved[:, :2]).all():
            worst.append(float(box_iou(box, moved)))
    assert min(worst) == pytest.approx(overlap, abs=1e-3)


def test_heatmaps_are_those_of_plain_loops():
    boxes = [torch.tensor([[3.0, 5, 25, 30], [10, 6, 20, 40], [60, 60, 64, 64]]), torch.zeros(0, 4)]
    targets = corner_targets(boxes, (SIDE, SIDE), 4)
    expected = np.zeros((2, 2, 16, 16))
    for (x1, y1, x2, y2), place, offset in zip(boxes[0].tolist(), targets.place, targets.offset, strict=True):
        sides = torch.tensor([[math.ceil((x2 - x1) / 4), math.ceil((y2 - y1) / 4)]], dtype=torch.float)
        r = int(gaussian_radius(sides, 0.3))
        for corner, point in enumerate([(x1, y1), (x2 - 1, y2 - 1)]):
            cell = [int(v + 0.5) // 4 for v in point]
            assert place[corner].tolist() == cell
            assert offset[corner].tolist() == pytest.approx(
                [(v + 0.5) / 4 - c for v, c in zip(point, cell, strict=True)]
            )
            for y, x in np.ndindex(16, 16):
                dx, dy = abs(x - cell[0]), abs(y - cell[1])
                if max(dx, dy) <= r:
                    value = math.exp(-(dx**2 + dy**2) / (2 * ((2 * r + 1) / 6) ** 2))
                    expected[0, corner, y, x] = max(expected[0, corner, y, x], value)
    np.testing.assert_allclose(targets.heatmap[:, :, 0].numpy(), expected, atol=1e-6)
    assert not targets.unclassified.any()
    # Each class has the heatmap that its cells alone would have; those of no known class have their own.
    by_class = corner_targets(
        boxes, (SIDE, SIDE), 4, labels=[torch.tensor([2, 0, 2]), torch.zeros(0).long()], classes=3
    )
    for number, chosen in ((0, [1]), (1, []), (2, [0, 2]), (3, [])):
        alone = corner_targets([boxes[0][chosen], boxes[1]], (SIDE, SIDE), 4).heatmap[:, :, 0]
        assert torch.equal(by_class.heatmap[:, :, number - 1] if number else by_class.unclassified, alone)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_focal_loss_is_that_of_plain_loops(classes):
    torch.manual_seed(0)
    shape = (2, 2, classes, 3, 4)
    p, target = torch.rand(shape), torch.rand(shape) * 0.9
    target[0, 0, 0, 1, 1] = target[1, 0, -1, 2, 2] = target[1, 1, -1, 0, 3] = 1
    unclassified = torch.rand(2, 2, 3, 4) * 0.5
    unclassified[0, 1, 1, 2] = unclassified[1, 0, 0, 0] = 1
    weights = torch.rand(classes)
    plain = weighted = 0.0
    for corner, count in ((0, 2), (1, 1)):
        for n, c, y, x in np.ndindex(2, classes, 3, 4):
            q, t = float(p[n, corner, c, y, x]), float(target[n, corner, c, y, x])
            u = float(unclassified[n, corner, y, x])
            positive, negative = (1 - q) ** 2 * math.log(q), q**2 * math.log(1 - q)
            plain -= (positive if t == 1 else (1 - t) ** 4 * negative) / count
            weighted -= (float(weights[c]) * positive if t == 1 else (1 - max(t, u)) ** 4 * negative) / (count + 1)
            if u == 1 and q == float(p[n, corner, :, y, x].max()):
                weighted -= positive / (count + 1)
    assert float(focal_loss(p, target)) == pytest.approx(plain, rel=1e-4)
    assert float(focal_loss(p, target, unclassified, weights)) == pytest.approx(weighted, rel=1e-4)


def test_the_tag_losses_are_those_of_plain_loops():
    torch.manual_seed(0)
    tags, image = torch.randn(6, 2), torch.tensor([0, 0, 0, 1, 3, 3])
    pull = push = 0.0
    for i in range(4):
        mine = [pair for pair, n in zip(tags.tolist(), image.tolist(), strict=True) if n == i]
        means = [sum(pair) / 2 for pair in mine]
        pull += sum((tag - m) ** 2 for pair, m in zip(mine, means, strict=True) for tag in pair) / max(1, len(mine)) / 4
        pairs = [(a, b) for a in range(len(mine)) for b in range(len(mine)) if a != b]
        push += sum(max(0, 1 - abs(means[a] - means[b])) for a, b in pairs) / max(1, len(pairs)) / 4
    results = tag_losses(tags, image, 4)
    assert [float(value) for value in results] == pytest.approx([pull, push], rel=1e-5)


def test_offsets_and_tags_are_read_at_the_corners():
    boxes = torch.tensor([[4.0, 8, 20, 30], [30, 33, 50, 61]])
    maps = maps_of_boxes(boxes, 4)
    losses = corner_losses(
        CornerMaps(*(m[None] for m in maps)), corner_targets([boxes], (SIDE, SIDE), 4), CornerLossSettings()
    )
    assert float(losses["loss_offset"]) == 0 and float(losses["loss_pull"]) == 0 and float(losses["loss_push"]) == 0
    moved = maps._replace(offset=maps.offset + 0.5)
    losses = corner_losses(
        CornerMaps(*(m[None] for m in moved)),
        corner_targets([boxes], (SIDE, SIDE), 4),
        CornerLossSettings(offset_weight=2.0),
    )
    assert float(losses["loss_offset"]) == pytest.approx(2 * 4 * 0.5**2 / 2)


def test_overlapping_boxes_lower_each_other():
    boxes = torch.tensor([[8.0, 8, 40, 40], [12, 12, 44, 44]])
    decoding = CornerDecodingSettings(peak_threshold=0.5, tag_distance=0.1)
    found, scores, _ = decode_corners(maps_of_boxes(boxes, 4), 4, (SIDE, SIDE), decoding)
    overlap = float(box_iou(boxes[:1], boxes[1:]))
    assert len(found) == 2 and float(scores[1] / scores[0]) == pytest.approx(math.exp(-(overlap**2) / 0.5), rel=1e-4)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_soft_nms_is_that_of_a_slow_loop(seed, count):
    generator = torch.Generator().manual_seed(seed)
    low, scores = 20 * torch.rand(count, 2, generator=generator), torch.rand(count, generator=generator)
    boxes = torch.cat((low, low + 5 + 20 * torch.rand(count, 2, generator=generator)), dim=1)
    overlap, left = box_iou(boxes, boxes), dict(enumerate(scores.tolist()))
    expected = []
    while left and max(left.values()) >= 0.1:
        best = max(left, key=lambda i: left[i])
        expected.append((best, left.pop(best)))
        left = {i: value * math.exp(-(float(overlap[i, best]) ** 2) / 0.3) for i, value in left.items()}
    order, values = soft_nms(boxes, scores, 0.3, 0.1)
    assert order.tolist() == [i for i, _ in expected]
    assert values.tolist() == pytest.approx([value for _, value in expected], rel=1e-4)


def test_boxes_are_clipped_and_filled():
    maps = maps_of_boxes(torch.tensor([[8.0, 8, 40, 64]]), 4)
    found, *_ = decode_corners(maps, 4, (50, 30), CornerDecodingSettings(peak_threshold=0.5))
    assert found.tolist() == [[8, 8, 30, 50]]
    masks = filled_boxes(torch.tensor([[0.0, 0.0, 0.2, 5.0], [8.4, 8, 30, 50]]), (50, 30))
    assert masks.windows.tolist() == [[0, 0, 1, 5], [8, 8, 30, 50]] and all(m.all() for m in masks.crops)
    assert len(filled_boxes(torch.zeros(0, 4), (5, 5))) == 0


def test_masks_are_an_option():
    torch.manual_seed(0)
    shared = {"preprocessing": Preprocessing(size=(64, 64)), "backbone": BackboneSettings("resnet18", c0_channels=4)}
    shared |= {"trunk": TrunkSettings(widths=(4, 6, 8, 8))}
    model = CornerNet.build(CornerNetSettings(**shared, heads=CornerHeadSettings(channels=8, masks=True)))
    image, target = nuclei_example(np.random.default_rng(0), 64, 4)
    losses = model([image, image], [target, target])
    sum(losses.values()).backward()
    assert "loss_mask" in losses
    assert model.backbone.c0_conv[0].weight.grad.abs().sum() > 0
    cells = model.eval()([image.byte()])[0]
    assert len(cells) == len(cells.masks)

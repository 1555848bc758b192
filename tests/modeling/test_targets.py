"""Rendering of targets, and the way back: decoding targets gives the boxes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from kg_detectron.graph import DIRECTED_EDGES
from kg_detectron.modeling import KeypointDecoder, KeypointMaps, Peaks, jittered_boxes, keypoint_targets

seeds = st.integers(0, 2**31)


def random_boxes(seed: int, count: int, height: int, width: int, smallest: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(count, 2, generator=generator) ** 2 * torch.tensor([width, height])
    size = size.round().clamp(min=smallest)
    size = torch.minimum(size, torch.tensor([width, height]))
    corner = (torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - size)).round()
    return torch.cat((corner, corner + size), dim=1)


def loop_targets(boxes: Tensor, height: int, width: int, stride: int, radius: float):
    """Pixel by pixel, in double precision, as the design says it."""
    h, w = math.ceil(height / stride), math.ceil(width / stride)
    heatmap, single, group = torch.zeros(5, h, w), torch.zeros(10, h, w), torch.zeros(40, h, w)
    cells = []
    for x1, y1, x2, y2 in boxes.tolist():
        if min(x2 - 1 - x1, y2 - 1 - y1) / stride > 2 * radius + 1:
            x2, y2 = x2 - 1, y2 - 1
            points = [(x1, y1), (x2, y1), (x1, y2), (x2, y2), ((x1 + x2) / 2, (y1 + y2) / 2)]
            cells.append([((x + 0.5) / stride - 0.5, (y + 0.5) / stride - 0.5) for x, y in points])
    for k in range(5):
        for y in range(h):
            for x in range(w):
                near = [(c[k][0] - x) ** 2 + (c[k][1] - y) ** 2 for c in cells]
                if not near or min(near) > radius**2:
                    continue
                cell = cells[near.index(min(near))]
                heatmap[k, y, x] = 1
                single[2 * k, y, x], single[2 * k + 1, y, x] = cell[k][0] - x, cell[k][1] - y
                for e, (source, target) in enumerate(DIRECTED_EDGES):
                    if source == k:
                        group[2 * e, y, x], group[2 * e + 1, y, x] = cell[target][0] - x, cell[target][1] - y
    return heatmap, single, group


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_equal_loops(stride, seed):
    boxes = [random_boxes(seed, 12, 44, 52), random_boxes(seed + 100, 2, 44, 52), torch.zeros(0, 4)]
    targets = keypoint_targets(boxes, (44, 52), stride, radius=2)
    for i, boxes_of_image in enumerate(boxes):
        for target, expected in zip(targets, loop_targets(boxes_of_image, 44, 52, stride, 2), strict=True):
            torch.testing.assert_close(target[i], expected, atol=1e-5, rtol=0)


def targets_as_maps(boxes: list[Tensor], size: tuple[int, int], radius: float) -> list[KeypointMaps]:
    maps = []
    for stride in (1, 2, 4, 8):
        heatmap, single, group = keypoint_targets(boxes, size, stride, radius)
        maps.append(KeypointMaps((heatmap * 2 - 1) * 50, single, group, stride))  # logits of a sure network
    return maps


@settings(max_examples=30)
@given(seed=seeds)
def test_decoding_targets_gives_the_boxes_back(seed):
    """Boxes that pass the size rule at some scale come back with IoU > 0.9, those on the image's borders too."""
    size = (160, 208)
    candidates = torch.cat(
        (
            torch.tensor([[0, 0, 31, 40], [177, 129, 208, 160], [0, 100, 26, 160], [150, 0, 208, 33.0]]),
            random_boxes(seed, 12, *size, smallest=14),
        )
    )
    chosen: list[Tensor] = []
    for box in candidates:  # cells may touch, but two keypoints of a type within a disc are one to any decoder
        corners = [torch.stack((b[:2], b[2:], b[[0, 3]], b[[2, 1]], (b[:2] + b[2:]) / 2)) for b in (box, *chosen)]
        if all((corners[0] - other).norm(dim=1).min() > 12 * 2.9 for other in corners[1:]):
            chosen.append(box)
    boxes = torch.stack(chosen)
    assert len(boxes) >= 4
    (decoded, scores), (none, _) = KeypointDecoder()(targets_as_maps([boxes, boxes[:0]], size, 5.0), [size, size])
    assert len(none) == 0
    assert box_iou(boxes, decoded).amax(1).min() > 0.9
    assert (scores.diff() <= 0).all()


def test_peaks_found_in_parts_are_assembled_as_a_whole():
    """Two images as a batch, or found one by one and joined: the same boxes."""
    size, decoder = (160, 208), KeypointDecoder()
    boxes = [random_boxes(seed, 6, *size, smallest=20) for seed in (1, 2)]
    maps = targets_as_maps(boxes, size, 5.0)
    expected = decoder(maps, [size, size])
    assert sum(len(decoded) for decoded, _ in expected) > 2

    parts = [decoder.find([KeypointMaps(*(m[i : i + 1] for m in s[:3]), s.stride) for s in maps]) for i in range(2)]
    for i, part in enumerate(parts):
        part.peaks[:, 0] = part.peaks[:, 0] * 2 + i  # of one image each, the group is the scale
    group = torch.cat([part.peaks[:, 0] for part in parts])
    order = group.argsort(stable=True)
    whole = Peaks(*(torch.cat(values)[order] for values in zip(*parts, strict=True)))
    detections = decoder.assemble(whole, [size, size], [scale.stride for scale in maps])
    for detection, wanted in zip(detections, expected, strict=True):
        assert all(map(torch.equal, detection, wanted))


def test_frames_between_scales_shift_nothing():
    """A box of even edges is found exactly at every scale alone: no shift by half a stride."""
    box = torch.tensor([[104.0, 88, 232, 216]])
    for maps in targets_as_maps([box], (320, 336), 5.0):
        ((decoded, _),) = KeypointDecoder()([maps], [(320, 336)])
        assert len(decoded) == 1
        # Corners lie between pixels of the deeper scales: a peak is at most half a pixel of that scale away.
        assert (decoded - box).abs().max() <= maps.stride / 2


def test_small_cells_are_no_targets():
    """Both sides, last minus first pixel, must exceed 2 r + 1 = 11."""
    for side, count in ((12, 0), (13, 1)):
        heatmap, _, _ = keypoint_targets([torch.tensor([[10.0, 10, 10 + side, 40]])], (64, 64), stride=1)
        assert (heatmap.amax((0, 2, 3)) == count).all()


def test_smaller_cells_may_be_targets_at_the_finest_scale():
    """Cells of 8 x 9 and of 14 x 15 pixels: last minus first pixel 3.5 and 6.5 pixels of scale s2."""
    small, medium = torch.tensor([[10.0, 10, 18, 19]]), torch.tensor([[30.0, 30, 44, 45]])
    both = [torch.cat((small, medium))]
    for radius, min_side, expected in ((2.0, None, medium), (2.0, 3.0, both[0]), (2.0, 3.5, medium)):
        targets = keypoint_targets(both, (64, 64), 2, radius, min_side)
        wanted = keypoint_targets([expected], (64, 64), 2, radius, 0.0)
        assert all(map(torch.equal, targets, wanted))
    with pytest.raises(ValueError, match="min_side"):
        keypoint_targets(both, (64, 64), 2, 2.0, -1.0)


def test_input_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"boxes\[1\].*\(4,\)"):
        keypoint_targets([torch.zeros(0, 4), torch.zeros(4)], (64, 64), 1)
    with pytest.raises(ValueError, match="boxes"):
        keypoint_targets([], (64, 64), 1)
    with pytest.raises(ValueError, match="radius"):
        keypoint_targets([torch.zeros(0, 4)], (64, 64), 1, radius=0)


@given(seed=seeds, amount=st.floats(0, 0.49))
def test_jittered_boxes_stay_in_the_image_and_near_their_cells(seed, amount):
    """No edge moves further than the amount, none crosses the other, so every box keeps the centre of its cell."""
    size = (60, 90)
    boxes = random_boxes(seed, 40, *size, smallest=2)
    torch.manual_seed(seed)
    jittered = jittered_boxes(boxes, size, amount)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    assert ((jittered - boxes).abs() <= amount * sides + 1e-4).all()
    assert (jittered >= 0).all() and (jittered <= torch.tensor([90, 60, 90, 60])).all()
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (jittered[:, :2] < centre).all() and (jittered[:, 2:] > centre).all()


def test_jitter_uses_the_whole_amount_each_edge_on_its_own():
    boxes = torch.tensor([[100.0, 100, 200, 140]]).repeat(4000, 1)
    torch.manual_seed(0)
    moves = (jittered_boxes(boxes, (300, 300), 0.2) - boxes) / torch.tensor([100, 40, 100, 40])
    assert (moves.amin(0) < -0.19).all() and (moves.amax(0) > 0.19).all()
    assert (torch.corrcoef(moves.T) - torch.eye(4)).abs().max() < 0.1
    torch.testing.assert_close(jittered_boxes(boxes, (300, 300), 0.0), boxes)

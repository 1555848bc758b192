"""Ranking of cells by their masks and overlaps, against plain loops."""

import math

import numpy as np
import pytest
import torch
from builders import tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kg_detectron.cells import MaskCrops
from kg_detectron.layers import overlaps
from kg_detectron.metrics import box_iou
from kg_detectron.metrics.iou import box_intersection
from kg_detectron.modeling import CellRanking, RankingSettings, outline_blur
from kg_detectron.modeling.ranking import soft_suppression


def cells(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, MaskCrops]:
    """Boxes that overlap, falling scores of which some are equal, and masks, in an image of 20 x 20 pixels."""
    low = rng.integers(0, 10, (count, 2))
    windows = np.concatenate((low, low + rng.integers(1, 10, (count, 2))), axis=1)
    crops = [torch.from_numpy(rng.random((y2 - y1, x2 - x1), np.float32)) for x1, y1, x2, y2 in windows]
    scores = torch.from_numpy(np.sort(rng.integers(1, 6, count))[::-1] / 10).float()
    windows = torch.from_numpy(windows)
    return windows.float(), scores, MaskCrops(crops, windows, (20, 20))


def ranked_by(weight: float, sigma: float, part: float = 0.0) -> CellRanking:
    return CellRanking(RankingSettings(weight, sigma, part))


def by_loops(
    boxes: Tensor, scores: Tensor, blur: list[float], weight: float, sigma: float, part: float
) -> tuple[list, list]:
    """The requirement: order and scores."""
    iou, shared = box_iou(boxes.numpy(), boxes.numpy()), box_intersection(boxes.numpy(), boxes.numpy())
    area = np.diag(shared)
    given = [score * math.exp(-weight * b) for score, b in zip(scores.tolist(), blur, strict=True)]
    left = sorted(range(len(given)), key=lambda i: -given[i])
    lowered, order = list(given), []
    while left:
        best = max(left, key=lambda i: lowered[i])  # the first of equal ones, by what they came with, then in order
        left.remove(best)
        order.append(best)
        for i in left:
            exponent = iou[i, best] ** 2 / sigma if sigma else 0.0
            exponent += (shared[i, best] / area[i]) ** 2 / part if part else 0.0
            lowered[i] = min(lowered[i], given[i] * math.exp(-exponent))
    return order, [lowered[i] for i in order]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_scores_and_order_are_those_of_plain_loops(count, seed, weight, sigma, part):
    boxes, scores, masks = cells(np.random.default_rng(seed), count)
    blur = [
        sum(1 - abs(2 * p - 1) for p in crop.flatten().tolist()) / (crop.shape[0] + crop.shape[1])
        for crop in masks.crops
    ]
    torch.testing.assert_close(outline_blur(masks), torch.tensor(blur), rtol=1e-4, atol=1e-6)
    _, expected = by_loops(boxes, scores, blur, weight, sigma, part)
    order, ranked = ranked_by(weight, sigma, part)(boxes, scores, masks)
    assert sorted(order.tolist()) == list(range(count)) and order.dtype == torch.int64
    torch.testing.assert_close(ranked, torch.tensor(expected), rtol=1e-4, atol=1e-7)
    assert (ranked.diff() <= 0).all()


def test_the_paper_keeps_its_scores_and_their_order():
    boxes, scores, masks = cells(np.random.default_rng(0), 12)
    assert len(scores.unique()) < len(scores)
    order, ranked = CellRanking()(boxes, scores, masks)
    assert torch.equal(order, torch.arange(12)) and torch.equal(ranked, scores)


def test_many_cells_are_compared_in_parts(monkeypatch):
    boxes, scores, masks = cells(np.random.default_rng(1), 23)
    whole = ranked_by(0.0, 0.1)(boxes, scores, masks)
    monkeypatch.setattr(overlaps, "_AT_ONCE", 50)
    parts = ranked_by(0.0, 0.1)(boxes, scores, masks)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    assert not torch.equal(whole[1], scores)


def disc(radius: float, softness: float) -> MaskCrops:
    """A cell whose probability falls from 1 to 0 over about 4 x softness pixels."""
    side = int(2 * radius + 8 * softness + 2)
    place = torch.arange(side) - (side - 1) / 2
    probability = torch.sigmoid((radius - torch.hypot(place[:, None], place)) / max(softness, 1e-6))
    return MaskCrops([probability], torch.tensor([[0, 0, side, side]]), (side, side))


def test_blur_tells_how_soft_an_outline_is_whatever_the_size_of_the_cell():
    assert outline_blur(disc(10.25, 0.0)) < 1e-3
    small, large = outline_blur(disc(10, 1.0)), outline_blur(disc(60, 1.0))
    assert 0.7 < small / large < 1.4
    assert outline_blur(disc(10, 2.0)) > 1.5 * small


def test_a_second_box_on_a_cell_comes_after_the_box_of_another_cell():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 15], [40, 40, 50, 50]]).float()
    order, scores = ranked_by(0.0, 0.1).rank(boxes, torch.tensor([0.9, 0.8, 0.2]), torch.zeros(3))
    assert order.tolist() == [0, 2, 1]
    assert scores[0] == torch.tensor(0.9) and scores[1] == torch.tensor(0.2)


def test_a_box_that_is_suppressed_suppresses_little():
    # The second box, which the first suppresses, lies on the third, which has little in common with the first.
    boxes = torch.tensor([[0, 0, 20, 10], [4, 0, 24, 10], [12, 0, 32, 10]]).float()
    scores = soft_suppression(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.1)
    iou = box_iou(boxes.numpy(), boxes.numpy())
    torch.testing.assert_close(scores[2], torch.tensor(0.7 * math.exp(-(iou[0, 2] ** 2) / 0.1)).float())


def test_a_box_of_a_cell_suppresses_boxes_of_its_parts():
    boxes = torch.tensor([[0, 0, 40, 40], [0, 0, 10, 10], [39, 39, 49, 49]]).float()
    scores = torch.tensor([0.9, 0.8, 0.8])
    torch.testing.assert_close(soft_suppression(boxes, scores, 0.1)[1], scores[1], atol=0.05, rtol=0)
    part, neighbour = soft_suppression(boxes, scores, 0.1, part_sigma=1.0)[1:]
    assert part < 0.4 * scores[1] and neighbour > 0.99 * scores[2]


def test_boxes_far_from_each_other_keep_their_scores():
    boxes = torch.tensor([[0, 0, 10, 10], [10, 0, 20, 10], [40, 40, 40, 50]]).float()
    scores = torch.tensor([0.1, 0.3, 0.2])
    assert torch.equal(soft_suppression(boxes, scores, 0.1, 0.1), scores)
    assert soft_suppression(boxes[:0], scores[:0], 0.1).shape == (0,)


def test_rows_of_a_prediction_stay_together():
    image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0)) * 255
    changes = {"nms_threshold": 0.6, "radius": 5.0, "smooth_sigma": 2.0}
    ranked, plain = (
        tiny_network(**changes, **ranking).eval() for ranking in ({"blur_weight": 3.0, "overlap_sigma": 0.05}, {})
    )
    (cells,), (unranked,) = ranked.detect([image]), plain.detect([image])
    order, scores = ranked_by(3.0, 0.05)(unranked.boxes, unranked.scores, unranked.masks)
    assert len(order) > 5 and order.tolist() != sorted(order.tolist())
    assert torch.equal(cells.boxes, unranked.boxes[order]) and torch.equal(cells.scores, scores)
    for i, row in enumerate(order.tolist()):
        assert torch.equal(cells.masks[i], unranked.masks[row])


@pytest.mark.parametrize("name", ["blur_weight", "overlap_sigma", "part_sigma", "vote_exponent"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        RankingSettings(**{name: value})

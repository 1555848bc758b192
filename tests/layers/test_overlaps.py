"""Pairs of boxes that overlap, and non-maximum suppression of very many boxes by them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kg_detectron.layers import nms, overlaps
from kg_detectron.layers.nms import nms_of_many
from kg_detectron.layers.overlaps import overlapping_pairs


def some_boxes(count: int, seed: int, side: float, digits: int) -> Tensor:
    """Boxes of very different sizes, some without area, some equal, some that only touch."""
    generator = np.random.default_rng(seed)
    first = generator.uniform(-side / 2, side / 2, (count, 2))
    sides = np.exp(generator.uniform(0, 4, (count, 2))) * (generator.random((count, 1)) > 0.1)
    return torch.from_numpy(np.concatenate((first, first + sides), axis=1).round(digits)).float()


def pairs_of(boxes: Tensor) -> list[tuple[int, int]]:
    return sorted(tuple(sorted(pair)) for part, _ in overlapping_pairs(boxes) for pair in part.T.tolist())


@given(st.integers(0, 60), st.integers(0, 2**31), st.sampled_from([5.0, 100.0, 3000.0]), st.sampled_from([0, 3]))
def test_pairs_are_those_of_plain_loops(count, seed, side, digits):
    boxes = some_boxes(count, seed, side, digits)
    expected = []
    for i, (a1, b1, a2, b2) in enumerate(boxes.tolist()):
        for j, (c1, d1, c2, d2) in list(enumerate(boxes.tolist()))[i + 1 :]:
            if min(a2, c2) > max(a1, c1) and min(b2, d2) > max(b1, d1):
                expected.append((i, j))
    assert pairs_of(boxes) == expected


def test_pairs_come_in_parts_of_bounded_size(monkeypatch):
    boxes = some_boxes(200, 0, 100.0, 3)
    whole = pairs_of(boxes)
    monkeypatch.setattr(overlaps, "_AT_ONCE", 300)
    parts = list(overlapping_pairs(boxes))
    assert len(parts) > 5 and max(part.shape[1] for part, _ in parts) <= 300
    assert pairs_of(boxes) == whole


@given(
    st.integers(0, 80),
    st.integers(0, 2**31),
    st.sampled_from([5.0, 60.0, 3000.0]),
    st.sampled_from([0.0, 0.3, 0.7]),
    st.booleans(),
)
def test_suppression_of_many_is_that_of_torchvision(count, seed, side, threshold, ties):
    boxes = some_boxes(count, seed, side, 1)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed % 2**31))
    if ties:
        scores = (scores * 4).round() / 4
    assert torch.equal(nms_of_many(boxes, scores, threshold), torch.ops.torchvision.nms(boxes, scores, threshold))


def test_the_operator_suppresses_very_many_boxes():
    """As many as a slide has in a corner: beyond those that are compared all with all."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(20_000, 2, generator=generator) * 1500
    boxes = torch.cat((first, first + 8 + 24 * torch.rand(20_000, 2, generator=generator)), dim=1)
    scores = torch.rand(20_000, generator=generator)
    kept = nms(boxes, scores, 0.5)
    assert torch.equal(kept, torch.ops.torchvision.nms(boxes, scores, 0.5)) and 2000 < len(kept) < 18_000

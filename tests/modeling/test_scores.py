"""Scores become probabilities and keep their order, but for what the sizes of cells add."""

import math

import pytest
import torch
from builders import tiny_network
from hypothesis import given
from hypothesis import strategies as st

from kg_detectron.modeling import Scores

fractions = st.floats(0, 1, width=32)


@st.composite
def calibrations(draw) -> Scores:
    """Piecewise linear functions of 2 to 8 knots."""
    count = draw(st.integers(2, 8))
    raw, probability = (
        sorted(n / 1000 for n in draw(st.sets(st.integers(0, 1000), min_size=count, max_size=count))) for _ in "xy"
    )
    return Scores(tuple(raw), tuple(probability))


@given(calibrations(), st.lists(fractions, max_size=30))
def test_order_stays(scores, values):
    """Falling scores stay falling; probabilities lie between the first and the last knot."""
    values = torch.tensor(values).sort(descending=True).values
    calibrated = scores(values)
    assert calibrated.dtype == values.dtype and calibrated.shape == values.shape
    assert (calibrated.diff() <= 0).all()
    low, high = (torch.tensor(scores.probability[i]) for i in (0, -1))
    assert ((calibrated >= low) & (calibrated <= high)).all()


@given(calibrations())
def test_knots_are_met(scores):
    torch.testing.assert_close(scores(torch.tensor(scores.raw)), torch.tensor(scores.probability))


def test_values_between_the_knots_are_interpolated():
    scores = Scores(raw=(0.1, 0.3), probability=(0.2, 0.8))
    torch.testing.assert_close(scores(torch.tensor([0.0, 0.2, 0.9])), torch.tensor([0.2, 0.5, 0.8]))


def test_without_knots_scores_stay():
    values = torch.tensor([0.9, 0.5, 0.1])
    assert torch.equal(Scores()(values), values)


def test_a_model_gives_probabilities_in_the_same_order():
    model, image = tiny_network().eval(), torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    (raw,) = model.detect([image])
    model.scores = Scores((0.0, 1.0), (0.3, 0.9), threshold=0.4)
    (cells,) = model.detect([image])
    assert len(cells) > 0 and model.threshold == 0.4
    assert torch.equal(cells.boxes, raw.boxes) and cells.masks.rle() == raw.masks.rle()
    torch.testing.assert_close(cells.scores, 0.3 + 0.6 * raw.scores)


SIZED = Scores((0.0, 1.0), (0.2, 0.8), 0.6, side=(10.0, 40.0), log_odds=(-1.0, 0.5), plain_threshold=0.5)


def boxes_of(*sides: float) -> torch.Tensor:
    """Boxes of these areas' square roots, twice as wide as high."""
    side = torch.tensor(sides)
    return torch.stack((side, side, side * (1 + math.sqrt(2)), side * (1 + math.sqrt(0.5))), dim=1)


def test_sizes_add_to_the_log_odds():
    """At the knots, half of the way between them by their logarithms, and beyond them."""
    boxes = boxes_of(10, 40, 20, 3, 0, 400)
    probability = SIZED(torch.full((6,), 0.5), boxes)
    added = torch.tensor([-1.0, 0.5, -0.25, -1.0, -1.0, 0.5])
    torch.testing.assert_close(probability, torch.sigmoid(added))  # log odds of 0.5 are 0
    assert torch.equal(SIZED.plain(torch.full((6,), 0.5), boxes), torch.full((6,), 0.5))
    assert SIZED.plain.threshold == 0.5 and SIZED.plain.plain == SIZED.plain and Scores().plain == Scores()


@given(st.lists(st.tuples(fractions, st.floats(0, 500, width=32)), max_size=30))
def test_no_size_makes_a_score_more_probable_than_the_bound(detections):
    values, sides = torch.tensor(detections).reshape(-1, 2).unbind(1)
    assert (SIZED(values, boxes_of(*sides.tolist())) <= SIZED.at_most(values)).all()
    assert torch.equal(SIZED.plain.at_most(values), SIZED.plain(values))


def test_certain_and_impossible_cells_stay():
    scores = Scores(side=(10.0, 40.0), log_odds=(-1.0, 0.5))
    assert scores(torch.tensor([0.0, 1.0]), boxes_of(10, 10)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side": (10.0,)}, "log_odds: expected 1 numbers"),
        ({"side": (10.0,), "log_odds": (0.0,)}, "side: expected no number, or two and more"),
        ({"side": (10.0, 10.0), "log_odds": (0.0, 1.0)}, "side: expected rising numbers above 0"),
        ({"side": (0.0, 10.0), "log_odds": (0.0, 1.0)}, "side: expected rising numbers above 0"),
        ({"side": (1.0, 10.0), "log_odds": (1.0, 0.0)}, "log_odds: expected rising numbers"),
        ({"plain_threshold": 1.5}, "plain_threshold: expected a number of 0..1"),
    ],
)
def test_sizes_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Scores(**values)
    with pytest.raises(ValueError, match="boxes: expected those of the scores"):
        SIZED(torch.ones(1))


def test_a_model_orders_cells_by_their_probability():
    """Which the size of a cell changes after its score: no cell is lost, and each keeps its mask."""
    model, image = tiny_network().eval(), torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    (raw,) = model.detect([image])
    model.scores = Scores(side=(8.0, 60.0), log_odds=(-4.0, 4.0))
    (cells,) = model.detect([image])
    assert (cells.scores.diff() <= 0).all() and not torch.equal(cells.boxes, raw.boxes)
    expected = model.scores(raw.scores, raw.boxes)
    order = expected.argsort(descending=True, stable=True)
    assert torch.equal(cells.scores, expected[order]) and cells.masks.rle() == raw.masks[order].rle()

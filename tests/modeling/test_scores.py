"""Scores become probabilities and keep their order."""

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

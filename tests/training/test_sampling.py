"""Which image comes when."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kg_detectron.training import EndlessSampler, Sample, balanced_weights
from kg_detectron.training.seeds import weighted_order_of_epoch


def first(sampler: EndlessSampler, number: int) -> list[Sample]:
    return list(islice(sampler, number))


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 30), st.booleans())
def test_a_sampler_goes_on_where_it_stopped(size: int, seed: int, start: int, weighted: bool) -> None:
    weights = np.arange(1, size + 1) if weighted else None
    whole = first(EndlessSampler(size, seed, weights=weights), start + 20)
    assert whole[start:] == first(EndlessSampler(size, seed, start=start, weights=weights), 20)


@given(st.integers(1, 9), st.integers(1, 4))
def test_processes_share_the_samples(size: int, processes: int) -> None:
    alone = first(EndlessSampler(size, 3), 6 * processes)
    parts = [first(EndlessSampler(size, 3, rank=r, world_size=processes), 6) for r in range(processes)]
    assert [part[i] for i in range(6) for part in parts] == alone


def test_every_epoch_has_all_images_in_another_order() -> None:
    indices = [sample.index for sample in first(EndlessSampler(20, 1), 60)]
    epochs = [indices[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.integers(0, 5))
def test_images_appear_in_proportion_to_their_weights(weights: list[float], epoch: int) -> None:
    weights = np.array(weights)
    expected = weights / weights.sum() * len(weights)
    counts = np.bincount(weighted_order_of_epoch(7, epoch, weights), minlength=len(weights))
    assert counts.sum() == len(weights)
    assert (np.abs(counts - expected) < 1 + 1e-6).all()


def test_weights_raise_rare_groups() -> None:
    weights = balanced_weights(["often"] * 16 + ["rare"] * 4, power=0.5)
    assert weights.mean() == pytest.approx(1)
    assert weights[:16].sum() / weights[16:].sum() == pytest.approx(2)  # 4 : 2 instead of 16 : 4


@pytest.mark.parametrize(("size", "seed", "weights"), [(0, 0, None), (3, -1, None), (3, 0, [1, 1]), (2, 0, [1, 0])])
def test_wrong_arguments(size: int, seed: int, weights: list[float] | None) -> None:
    with pytest.raises(ValueError):
        EndlessSampler(size, seed, weights=weights)

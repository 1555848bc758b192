"""The samples of a training depend on the seed and their place alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kg_detectron.training.sampler import EndlessSampler, Sample, SampleDataset
from kg_detectron.training.seeds import seed_iteration

SEEDS = st.integers(0, 2**31)


def first(sampler: EndlessSampler, number: int) -> list[Sample]:
    return list(itertools.islice(sampler, number))


@given(st.integers(1, 9), SEEDS, st.integers(0, 40), st.integers(1, 3))
def test_every_epoch_is_a_permutation(size, seed, start, epochs):
    samples = first(EndlessSampler(size, seed, start=start), (epochs + 1) * size)
    assert [sample.position for sample in samples] == list(range(start, start + len(samples)))
    whole = samples[-start % size :][: epochs * size]
    for epoch in range(epochs):
        assert sorted(sample.index for sample in whole[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(1, 9), SEEDS, st.integers(0, 60))
def test_going_on_is_not_starting_again(size, seed, start):
    assert first(EndlessSampler(size, seed), start + 20)[start:] == first(EndlessSampler(size, seed, start=start), 20)


@given(st.integers(1, 9), SEEDS, st.integers(1, 4), st.integers(0, 20))
def test_processes_share_the_samples_of_one(size, seed, processes, start):
    alone = first(EndlessSampler(size, seed, start=start), 6 * processes)
    shares = [
        first(EndlessSampler(size, seed, rank=rank, world_size=processes, start=start), 6) for rank in range(processes)
    ]
    assert [sample for together in zip(*shares, strict=True) for sample in together] == alone


def test_orders_differ_between_epochs_and_seeds():
    orders = [[s.index for s in first(EndlessSampler(50, seed), 100)] for seed in (0, 1)]
    assert len({tuple(order[part : part + 50]) for order in orders for part in (0, 50)}) == 4


@pytest.mark.parametrize("size, seed, message", [(0, 1, "no image"), (3, -1, "seed.*-1")])
def test_bad_arguments(size, seed, message):
    with pytest.raises(ValueError, match=message):
        EndlessSampler(size, seed)


def test_a_sample_draws_the_same_whatever_was_drawn_before():
    dataset = SampleDataset([{}, {}], lambda record: np.random.rand())
    draws = [dataset[Sample(index, 5, position)] for index, position in [(0, 0), (1, 1), (0, 2)]]
    assert len(set(draws)) == 3
    np.random.seed(1)
    expected = np.random.rand(2)
    np.random.seed(1)
    before = np.random.rand()
    assert dataset[Sample(0, 5, 2)] == draws[2] and dataset[Sample(0, 6, 2)] != draws[2]
    assert [before, np.random.rand()] == expected.tolist()  # the generator is left as it was


def test_iterations_and_processes_have_random_numbers_of_their_own():
    def draws(*place: int) -> tuple:
        seed_iteration(*place)
        return random.random(), np.random.rand(), torch.rand(()).item()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draws(*place) for place in places]
    assert all(len(set(column)) == len(places) for column in zip(*drawn, strict=True))
    assert [draws(*place) for place in places] == drawn

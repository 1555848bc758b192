"""Random numbers that depend on the run's seed and the place in the run alone.

Nothing random is carried from one sample or iteration to the next, so a resumed run needs no generator's state, and
worker processes, their number and evaluations in between change nothing.
"""

import contextlib
import random
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for. Each purpose has its own, and the values must stay: they are part of every run."""

    ORDER = 0  # of the samples of an epoch
    SAMPLE = 1  # augmentation of one sample
    ITERATION = 2  # of one process: sampling of proposals, dropout


def _words(seed: int, purpose: Purpose, place: tuple[int, ...], number: int) -> np.ndarray:
    """(number,) uint32; ``SeedSequence`` mixes, so that neighbouring places have unrelated ones."""
    return np.random.SeedSequence((seed, purpose, *place)).generate_state(number)


def order_of_epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    """(size,) int: a permutation of 0..size - 1."""
    # RandomState, whose numbers NumPy promises never to change; those of its newer generators may.
    return np.random.RandomState(_words(seed, Purpose.ORDER, (epoch,), 4)).permutation(size)


@contextlib.contextmanager
def sample_seeded(seed: int, position: int) -> Iterator[None]:
    """NumPy's global generator as it is for the sample at ``position`` in the run; afterwards as it was."""
    state = np.random.get_state()
    np.random.seed(_words(seed, Purpose.SAMPLE, (position,), 4))
    try:
        yield
    finally:
        np.random.set_state(state)


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch for one iteration in the process ``rank``."""
    words = _words(seed, Purpose.ITERATION, (iteration, rank), 8)
    np.random.seed(words[:4])
    random.seed(words[4:6].tobytes())
    torch.manual_seed(int.from_bytes(words[6:].tobytes(), "little"))


def generator_of_sample(seed: int, position: int) -> np.random.Generator:
    """The generator for the augmentation of the sample at a position of the run."""
    return np.random.default_rng(_words(seed, Purpose.SAMPLE, (position,), 4))


def weighted_order_of_epoch(seed: int, epoch: int, weights: np.ndarray) -> np.ndarray:
    """Draw an epoch in which images appear in proportion to their weights.

    The number of times that an image appears is its expected number, rounded up or down at random.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        weights: (n,) one positive number for each image.

    Returns:
        (n,) int: indices of images in random order.
    """
    random = np.random.RandomState(_words(seed, Purpose.ORDER, (epoch,), 4))
    size = len(weights)
    # Systematic resampling: equidistant points on the cumulated weights, in a random order of the images.
    shuffled = random.permutation(size)
    edges = np.cumsum(weights[shuffled] / np.sum(weights)) * size
    points = np.arange(size) + random.uniform()
    drawn = shuffled[np.searchsorted(edges[:-1], points, side="right")]
    return random.permutation(drawn)

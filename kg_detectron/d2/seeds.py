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

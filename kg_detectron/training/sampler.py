"""The order of the samples of a training run."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from kg_detectron.training.seeds import order_of_epoch, sample_seeded, weighted_order_of_epoch


class Sample(NamedTuple):
    """One sample of a run."""

    index: int  # type: ignore[assignment]  # of the image; it hides tuple.index, of which a sample has no need
    seed: int  # of the run
    position: int  # in the run, counted over all processes


class EndlessSampler(Sampler[Sample]):
    """Samples from a start position on, without end. Each epoch has its own random order.

    The sampler has no state except its attributes. A run that stopped after `start` samples continues with the next
    one. With several processes each takes every `world_size`-th sample, so their batches together are those of one
    process.

    Args:
        size: number of images.
        seed: of the run, 0 or more.
        rank, world_size: number of this process and of all processes.
        start: number of samples, over all processes, to skip at the beginning.
        weights: one positive number for each image; images appear in proportion. None: each image once an epoch.

    Raises:
        ValueError: no image, a negative seed, or weights that do not fit.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        if size < 1:
            raise ValueError("the training set has no image")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        if self.weights is not None and (self.weights.shape != (size,) or not (self.weights > 0).all()):
            raise ValueError(f"weights: expected {size} positive numbers, got shape {self.weights.shape}")
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[Sample]:
        order: np.ndarray = np.zeros(0, np.int64)
        epoch_of_order: int | None = None
        for position in itertools.count(self.start + self.rank, self.world_size):
            epoch, place = divmod(position, self.size)
            if epoch != epoch_of_order:
                order, epoch_of_order = self._order(epoch), epoch
            yield Sample(int(order[place]), self.seed, position)

    def _order(self, epoch: int) -> np.ndarray:
        if self.weights is None:
            return order_of_epoch(self.seed, epoch, self.size)
        return weighted_order_of_epoch(self.seed, epoch, self.weights)


def balanced_weights(groups: Sequence[str], power: float = 0.5) -> np.ndarray:
    """Weights that raise the share of rare groups of images.

    A group of n images gets a share proportional to ``n ** power``: 1 keeps the shares, 0 makes them equal.

    Args:
        groups: the name of the group of each image.
        power: 0 to 1.

    Returns:
        (n,) float64, with mean 1.
    """
    names, group_of_image, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    weights = (counts ** (power - 1.0))[group_of_image] if len(names) else np.ones(0)
    return weights / weights.mean()


class SampleDataset(Dataset):
    """Maps the record of a `Sample`, with NumPy's global generator seeded for it alone."""

    def __init__(self, records: Sequence[dict[str, Any]], mapper: Callable[[dict[str, Any]], Any]) -> None:
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: Sample) -> Any:
        with sample_seeded(sample.seed, sample.position):
            return self.mapper(self.records[sample.index])

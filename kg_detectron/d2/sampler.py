"""The samples of a training: which image comes when, and with which randomness."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Sampler

from kg_detectron.d2.seeds import order_of_epoch, sample_seeded


class Sample(NamedTuple):
    """A place in the run: ``index`` of the image, ``position`` counted over all processes from the run's beginning."""

    index: int
    seed: int
    position: int


class EndlessSampler(Sampler[Sample]):
    """The samples from position ``start`` on, without end: epoch after epoch, each in an order of its own.

    It has no state but its attributes: a run that stopped after ``start`` samples goes on with the next. Of several
    processes each takes every ``world_size``-th sample, so that their batches together are those of one process.

    Args:
        size: number of images.
        seed: the run's, 0 or more.
        rank, world_size: number of this process and of all.
        start: samples, over all processes, that are left out at the beginning.

    Raises:
        ValueError: there is no image, or a negative seed.
    """

    def __init__(self, size: int, seed: int, *, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        if size < 1:
            raise ValueError("the training set has no image")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[Sample]:
        order, order_epoch = None, None
        for position in itertools.count(self.start + self.rank, self.world_size):
            epoch, place = divmod(position, self.size)
            if epoch != order_epoch:
                order, order_epoch = order_of_epoch(self.seed, epoch, self.size), epoch
            yield Sample(int(order[place]), self.seed, position)


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

"""Losses of a training that several processes share: they equal those of one process with the whole batch.

Distributed training averages the gradients of its processes. An average of means is the mean of all only where every
process has as many pixels or cells as the others. So losses divide their sums by `loss_divisor`, and draw random
numbers for each image by `generators_of_images`. Both are those of one process, except inside `shared_losses`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, distributed

_SHARED: ContextVar[bool] = ContextVar("shared losses", default=False)


@contextmanager
def shared_losses() -> Iterator[None]:
    """Inside the context losses are those of all processes together. All processes must then compute them at once.

    Without a process group, or with one process, nothing changes.
    """
    token = _SHARED.set(distributed.is_available() and distributed.is_initialized())
    try:
        yield
    finally:
        _SHARED.reset(token)


def loss_divisor(count: Tensor) -> Tensor:
    """What the sums in the losses of this process are divided by, instead of how much this process has.

    Args:
        count: (K,) numbers of pixels or cells of this process, of any type; called once, for K sums.

    Returns:
        (K,) float64, the mean of the counts over all processes, where the total is at least 1. The mean over processes
        of sum / divisor is the total sum divided by the total count, and 0 where the total count is 0.
    """
    total = count.detach().double()
    if not _SHARED.get():
        return total.clamp(min=1)
    total = total.clone()
    distributed.all_reduce(total)
    return total.clamp(min=1) / distributed.get_world_size()


def generators_of_images(number: int) -> list[torch.Generator]:
    """A random generator for each image of this process's batch, on the CPU, seeded by PyTorch's global one.

    Inside `shared_losses` an image gets the generator that it has in the batch of one process, image i of process r
    being image i * processes + r there (see `EndlessSampler`).
    """
    rank, processes = 0, 1
    seed = torch.randint(2**62, ())
    if _SHARED.get():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        seed = seed.to(device)
        distributed.broadcast(seed, 0)
    return [torch.Generator().manual_seed(int(seed) + i * processes + rank) for i in range(number)]

"""Time and memory of a call."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Time of one call, on the device too."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that one call's tensors hold at once, beyond what was there before.

    On a GPU PyTorch's allocator knows. On the CPU it is the highest sum of PyTorch's allocations and releases, as its
    profiler records them: exact and repeatable, unlike the size of the process; what libraries allocate for themselves
    is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

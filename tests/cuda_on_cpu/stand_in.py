"""The CUDA kernels on the CPU, in place of the compiled operators."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cuda_sources import FaultyCopy, build

from kg_detectron.layers import ops

# One fault for each of the machine's checks.
FAULTS = (
    FaultyCopy(
        "group_peaks",
        "without_barrier",  # the next start is looked for while other warps still read this one
        (("have left the queue.\n        __syncthreads();", "have left the queue."),),
    ),
    FaultyCopy(
        "group_peaks",
        "without_syncwarp",  # a peak leaves the queue while other lanes still look at it
        (
            ("int64_t p) const {\n        __syncwarp();", "int64_t p) const {"),
            ("__syncwarp();\n        for (int distance", "for (int distance"),
        ),
    ),
    FaultyCopy(
        "group_peaks",
        "with_divergent_barrier",  # half of the threads end without it
        (
            (
                "{\n            break;",
                "{\n            if (threadIdx.x % 2) __syncthreads();\n            break;",
            ),
        ),
    ),
    FaultyCopy(
        "group_peaks",
        "with_divergent_warp",
        (
            (
                "        for (int distance = kWarp / 2; distance",
                "        for (int distance = kWarp / (threadIdx.x % 2 + 1) / 2; distance",
            ),
        ),
    ),
    FaultyCopy(
        "group_peaks",
        "with_unwritten_shared_memory",  # the first start is nowhere
        (
            (
                "if (leads) {\n                start = found;",
                "if (leads && found < 0) {\n                start = found;",
            ),
        ),
    ),
    FaultyCopy(
        "hough_vote",
        "without_atomic",
        (
            (
                "atomicAdd(votes + (plane * h + row) * w + column, static_cast<Bits>(units))",
                "votes[(plane * h + row) * w + column] += static_cast<Bits>(units)",
            ),
        ),
    ),
    FaultyCopy("find_peaks", "reading_beyond", (("x < w - 1 &&", "x < w &&"), ("y < h - 1 &&", "y < h &&"))),
    FaultyCopy(
        "hough_vote", "writing_beyond", (("        out[i] = static_cast<T>", "        out[i + 1] = static_cast<T>"),)
    ),
    FaultyCopy(
        "smooth_votes",
        "without_barrier",  # values are blended before others have read them into the tile
        (
            (
                "            tile[i] = in[plane + y * w + x];\n        }\n        __syncthreads();",
                "            tile[i] = in[plane + y * w + x];\n        }",
            ),
        ),
    ),
    FaultyCopy(
        "smooth_votes",
        "with_too_little_shared_memory",
        (("(side * side + kTile * side) * sizeof", "(side * side + kTile * side - 1) * sizeof"),),
    ),
)
# Found by AddressSanitizer (bounds.py), the others by the machine.
BOUNDS_FAULTS = tuple(fault for fault in FAULTS if fault.fault.endswith("_beyond"))


@dataclass(frozen=True)
class Count:
    """What one kernel did: bytes of memory by loads and stores, atomics, the most of them on one address, and the most
    accesses of one thread to memory."""

    launches: int
    threads: int
    read: int
    written: int
    atomics: int
    most_atomics: int
    most_accesses: int


class ConvolveResized(torch.autograd.Function):
    """The operator with its gradient, as the one that it stands in for has it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        ops._save_for_backward(ctx, arguments, None)
        return torch.ops.kg_cuda_on_cpu.convolve_resized(*arguments)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return ops._backward(ctx, gradient)


class StandIn:
    """The library of the kernels, loaded, and the machine that runs them."""

    def __init__(self, kind: str = "races", copies: Sequence[FaultyCopy] = FAULTS) -> None:
        library: Path = build(kind, copies)
        torch.ops.load_library(library)
        self._machine = ctypes.CDLL(str(library))
        self._machine.cuda_on_cpu_take_counts.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """The order of blocks and threads from now on."""
        self._machine.cuda_on_cpu_set_seed(ctypes.c_uint64(seed))

    def detect_races(self, detects: bool) -> None:
        """Counting alone is quicker."""
        self._machine.cuda_on_cpu_set_detection(ctypes.c_bool(detects))

    def take_counts(self) -> dict[str, Count]:
        """What each kernel did since the last call."""
        lines = self._machine.cuda_on_cpu_take_counts().decode().splitlines()
        fields = [line.rsplit(" ", 7) for line in lines]
        return {name: Count(*map(int, numbers)) for name, *numbers in fields}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the operators, called on CPU tensors, run the CUDA kernels."""
        kernels = {name: getattr(torch.ops.kg_cuda_on_cpu, name) for name in ops.OPERATORS}
        kernels["convolve_resized"] = ConvolveResized.apply
        with mock.patch.multiple(torch.ops.kg_detectron, create=True, **kernels):
            yield

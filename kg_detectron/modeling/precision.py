"""The floating-point type in which the network's convolutions run."""

import contextlib

import torch
from torch import Tensor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(precision: str) -> str:
    """The name itself.

    Raises:
        ValueError: for one that is not in `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """`torch.autocast` to a precision; for float32 nothing, so that a caller's own autocast stays in force."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """No autocast inside: decoding runs in float32 whatever the network runs in."""
    return torch.autocast(device.type, enabled=False)


def for_losses(values: Tensor) -> Tensor:
    """Values in float32, or in float64 where they have it: losses are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

"""Checkpoints of training runs. A file is complete before it takes its name."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. Until it is complete, a previous file of that name stays.

    Args:
        path: the file.
        state: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        FloatingPointError: weights under "model" are not finite; nothing is written.
        OSError: the file cannot be written.
    """
    path = Path(path)
    broken = [k for k, v in state.get("model", {}).items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise FloatingPointError(f"{path} was not written: not all weights are finite: {', '.join(broken[:3])}")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as data only: a file cannot run code."""
    return torch.load(path, map_location="cpu", weights_only=True)

"""Checkpoints of training runs. A file is complete before it takes its name."""

from pathlib import Path
from typing import Any

import torch

from kg_detectron.io.atomic import replacing


def save_checkpoint(path: str | Path, state: dict[str, Any], *, temporary: str | None = None) -> None:
    """Write a checkpoint. Until it is complete and on the disk, a previous file of that name stays.

    Args:
        path: the file.
        state: tensors, numbers, strings, and lists and dicts of them.
        temporary: see `replacing`.

    Raises:
        FloatingPointError: weights under "model" are not finite; nothing is written.
        OSError: the file cannot be written.
    """
    broken = [k for k, v in state.get("model", {}).items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise FloatingPointError(f"{path} was not written: the weights {', '.join(broken[:3])}{more} are not finite")
    with replacing(path, durable=True, temporary=temporary) as unfinished, open(unfinished, "wb") as stream:
        torch.save(state, stream)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as data only: a file cannot run code."""
    return torch.load(path, map_location="cpu", weights_only=True)

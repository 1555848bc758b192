"""Checkpoints of PyTorch, read as data: no file makes this run code, or take memory beyond its own size."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path) -> Any:
    """What `torch.save` wrote to a file: tensors and plain values, on the CPU.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds more than tensors and plain values, is compressed (PyTorch's own files never are: a small
            one may unpack to any size), or is corrupt. The message names the file.
    """
    path = Path(path)
    with path.open("rb"):  # what PyTorch makes of a missing file depends on its version
        pass
    length = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > length:
                raise ValueError(f"it has {length} bytes and says that it unpacks to {unpacked}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The cause alone: PyTorch's text around it advises to run the code that is in the file.
        cause = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} was refused: it is corrupt, or holds more than weights, and loading it could run code"
            + (f" ({cause[1]})" if cause else "")
        ) from None
    # Whatever PyTorch makes of broken bytes (RuntimeError, KeyError, struct.error, ...), the user needs the file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error

"""Checksums that tell whether a file or an array is the same one."""

import hashlib
import os
from pathlib import Path

import numpy as np


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits. Raises OSError where it cannot be read.

    Of a folder, such as a Zarr, that of the names and checksums of all files in it, less those in a folder ``labels``,
    where results may lie.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for place, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if name != "labels")
            for name in sorted(files):
                file_path = Path(place, name)
                digest.update(f"{file_path.relative_to(path).as_posix()} {file_sha256(file_path)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of the type, shape and values of an array, as 64 hexadecimal digits."""
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()

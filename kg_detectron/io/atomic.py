"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, durable: bool = False, temporary: str | None = None) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    The folder of `path` is made where absent. After an error the temporary file is removed and `path` is as it was. The
    name is always the same: what a killed process left behind is written over by the next one.

    Args:
        path: the file, or a folder, of which an older one must be gone when the block ends.
        durable: bring the file down to the disk before it takes its name, and then the name: a crash of the machine
            leaves the former file or the new one.
        temporary: the name; by default that of `path`, hidden, with ``.tmp``.

    Raises:
        OSError: the folder cannot be made, or the file not be written; `path` is a folder, and what was written a file.
    """
    path = Path(path)
    if not path.name:  # such as "."
        raise _is_a_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(temporary or f".{path.name}.tmp")
    try:
        yield unfinished
        if durable:
            with open(unfinished, "r+b") as stream:
                os.fsync(stream.fileno())
        if path.is_dir() and not unfinished.is_dir():
            raise _is_a_folder(path)
        os.replace(unfinished, path)
        if durable and os.name == "posix":  # elsewhere folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def _is_a_folder(path: Path) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, "it is a folder, expected a file", str(path))

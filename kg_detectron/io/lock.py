"""One command at a time in a folder of results."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".kg-detectron.lock"


class FolderInUse(ValueError):
    """Another process writes into a folder."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder, made where absent, against other processes; the operating system frees it when a process dies.

    Raises:
        FolderInUse: another process holds it. Nothing was changed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUse(
            f"{folder}: another command is writing into this folder; wait until it has ended, or choose another folder"
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps open files
            (folder / LOCK_FILE).unlink()
        lock.release()

"""How a process of this program gets its memory from the system. Only a program may decide that, not a library."""

import ctypes
import os
import sys

_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # of mallopt in <malloc.h>
_LARGE, _FREE = 2**22, 2**23  # bytes: maps that go back at once, and free memory that is kept for smaller ones


def give_back_maps() -> None:
    """Let large maps go back to the system as soon as they are released, where the C library is glibc.

    By default glibc keeps blocks of up to 32 MiB for itself after the first of that size, and what is between them is
    lost. And take their memory in pages of 2 MiB, as a map of 4 KiB pages costs more time than what is computed on it;
    PyTorch reads that setting when it is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux") or os.environ.keys() & _OPTIONS.keys():
        return
    for (name, option), value in zip(_OPTIONS.items(), (_FREE, _LARGE), strict=True):
        os.environ[name] = str(value)  # for processes that this one starts
        try:
            ctypes.CDLL(None).mallopt(option, value)
        except (OSError, AttributeError):  # another C library
            return

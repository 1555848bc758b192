"""How a process of this program gets its memory from the system. Only a program may decide that, not a library."""

import ctypes
import os
import sys

_MMAP_THRESHOLD = -3  # of mallopt in <malloc.h>
_LARGE = 2**22  # bytes


def give_back_maps() -> None:
    """Let large maps go back to the system as soon as they are released, where the C library is glibc.

    By default glibc keeps blocks of up to 32 MiB for itself after the first of that size, and what is between them is
    lost. And take their memory in pages of 2 MiB, as a map of 4 KiB pages costs more time than what is computed on it;
    PyTorch reads that setting when it is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(_LARGE)  # of processes that this one starts
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    except (OSError, AttributeError):  # another C library
        return

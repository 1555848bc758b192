"""Worker processes of Dask on this machine."""

import logging
import signal
import threading
from contextlib import ExitStack
from importlib import import_module
from multiprocessing import resource_tracker
from typing import Any

_LOOK_EVERY = 2.0  # seconds between two looks for workers that are gone for good
_NEVER = "1000 days"

# How often a file may fail is counted elsewhere. Images are no data of Dask's, which it could spill to a disk, so a
# worker is paused never, and started anew when it is about to take the machine's memory. And a worker that is started
# anew may take any time: on a busy machine, loading PyTorch alone takes longer than Dask's limit for a lost worker.
_OPTIONS: dict[str, Any] = {
    "distributed.scheduler.allowed-failures": 0,
    "distributed.deploy.lost-worker-timeout": _NEVER,
    **{f"distributed.worker.memory.{limit}": False for limit in ("target", "spill", "pause")},
}


class LocalWorkers:
    """A number of worker processes, to be used in a ``with`` statement, with a scheduler of their own.

    One that dies is started anew by Dask, but for one that dies while it starts, which is replaced here. They do not
    see the Ctrl-C of a terminal, which is for the command that started them.

    Args:
        count: of them.
        memory: bytes for all of them; by default what this machine lets the process use.

    Attributes:
        address: of the scheduler.
    """

    def __init__(self, count: int, memory: int | None = None) -> None:
        self.count = count
        self.memory = import_module("distributed.system").MEMORY_LIMIT if memory is None else memory
        self._stack = ExitStack()
        self._is_over = threading.Event()

    def __enter__(self) -> "LocalWorkers":
        self._stack.enter_context(import_module("dask").config.set(_OPTIONS))
        self._cluster = import_module("distributed").LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            memory_limit=self.memory // self.count,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        )
        self.address: str = self._cluster.scheduler_address
        if hasattr(signal, "pthread_sigmask"):
            # Processes have the mask of the thread that starts them. Python's tracker of resources, which is started
            # with the first of them, would undo it.
            resource_tracker.ensure_running()
            self._cluster.sync(_block_interrupts)
        self._cluster.scale(self.count)
        self._thread = threading.Thread(target=self._replace_lost, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._cluster.close(timeout=10)
        self._stack.close()

    def _replace_lost(self) -> None:
        status = import_module("distributed.core").Status
        while not self._is_over.wait(_LOOK_EVERY):
            over = (status.closed, status.failed)
            lost = [name for name, nanny in self._cluster.workers.copy().items() if nanny.status in over]
            for name in lost:
                self._cluster.workers.pop(name, None)
            if lost:
                self._cluster.scale(self.count)


async def _block_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

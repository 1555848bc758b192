"""Prediction by many processes, on this machine or a cluster, by Dask: a file is a task.

A worker loads the model once, reads the image where it lies, and writes the results into a hidden folder beside the
run's; the process that gave the command moves them to their place and writes run.json. So a worker that dies leaves
nothing of a file, and a task that was computed twice appears once. Only as many tasks are handed out as keep the
workers busy: memory does not depend on the number of files.
"""

import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kg_detectron.inference.file_prediction import FilePredictor
from kg_detectron.inference.manifest import FileRecord, versions
from kg_detectron.inference.model_names import kept_models
from kg_detectron.inference.run_settings import SettingError, Settings, Workers
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.finding import Input

STAGING = ".kg-detectron-tasks-"  # folders in the output folder begin with it

_AHEAD = 2  # tasks handed out for each thread of a worker
_COUNT_EVERY = 5.0  # seconds between two looks at how many workers there are
_PATIENCE = 60.0  # seconds without any worker after which the user is told
_RECONNECT = 600.0  # seconds for which a scheduler that is gone is waited for
_LOST = 20  # times that a task is handed out again because the scheduler forgot it


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common.

    Attributes:
        model: the file.
        model_sha256: of it.
        settings: of the prediction.
        device: None leaves it to the worker.
        output: folder of the results.
        staging: folder in it where workers write.
        threads: of PyTorch on a worker; None leaves it to the worker's environment.
    """

    model: Path
    model_sha256: str
    settings: Settings
    device: str | None
    output: Path
    staging: Path
    threads: int | None


class Task(NamedTuple):
    """A file to predict; the fields are arguments of `FilePredictor`."""

    item: Input
    known: FileRecord | None
    taken: tuple[str, ...]


class Outcome(NamedTuple):
    """What became of a task.

    Attributes:
        record: as `FilePredictor` returns it.
        is_known: it is the record of an earlier run.
        folder: where its results lie; None where there are none.
    """

    record: FileRecord
    is_known: bool
    folder: Path | None


class WorkerUnfit(ValueError):
    """A worker has another model than the run, or does not see its folders."""


# What happens on a worker

_predictors: dict[tuple[str, str, str | None], FilePredictor] = {}
_one_at_a_time = threading.Lock()  # more threads of a worker would each take an image's memory


def _predictor(job: Job) -> FilePredictor:
    """The model of a job, loaded once in each process.

    Raises:
        WorkerUnfit: this machine has no such model.
    """
    key = job.model_sha256, repr(job.settings), job.device
    if key not in _predictors:
        # A kept model may lie elsewhere on this machine.
        places = [job.model, *(path for name, path in kept_models().items() if name == job.model.stem)]
        fitting = [path for path in places if path.is_file() and file_sha256(path) == job.model_sha256]
        if not fitting:
            raise WorkerUnfit(
                f"the worker on {socket.gethostname()} has no model of SHA-256 {job.model_sha256} at {job.model}"
            )
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        _predictors.clear()  # of one model at a time, for memory's sake
        _predictors[key] = FilePredictor(fitting[0], job.settings, job.device)
    return _predictors[key]


def describe_worker(job: Job) -> tuple[str, dict[str, str]]:
    """The device and versions of a worker, once it is seen to be fit.

    Raises:
        WorkerUnfit: it has no such model, or does not see the folder of the results.
    """
    if not job.staging.is_dir():
        raise WorkerUnfit(
            f"the worker on {socket.gethostname()} does not see {job.output}: images and results must lie in folders "
            "that all machines have under the same names"
        )
    with _one_at_a_time:
        return _predictor(job).device, versions()


def predict_task(job: Job, task: Task) -> Outcome:
    """Predict a file on a worker."""
    folder = job.staging / uuid.uuid4().hex
    with _one_at_a_time:
        predictor = _predictor(job)
        folder.mkdir(parents=True)
        record = predictor(task.item, folder, known=task.known, output=job.output, taken=task.taken)
    if record.error is not None:
        record.outputs = []
    if record is task.known or record.error is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(record, record is task.known, None)
    return Outcome(record, False, folder)


# What happens where the command was given


class Cluster:
    """Workers of Dask, to be used in a ``with`` statement.

    Args:
        workers: how many on this machine, or the scheduler of a cluster that exists.
        say: gets a line on what a user should know.

    Raises:
        SettingError: Dask is not installed, or there is no scheduler at the address.
    """

    def __init__(self, workers: Workers, say: Callable[[str], None]) -> None:
        self.workers, self.say = workers, say
        self._idle_since: float | None = None
        self._is_told = False
        try:
            self.dask = import_module("distributed")
        except ImportError:
            raise SettingError(
                "workers" if workers.scheduler is None else "scheduler",
                "Dask is not installed; pip install 'kg_detectron[dask]'",
            ) from None

    @property
    def threads(self) -> int | None:
        """Threads of PyTorch on a worker of this machine; None on a cluster."""
        if self.workers.count is None:
            return None
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cpus // self.workers.count)

    def __enter__(self) -> "Cluster":
        self._local = None
        address = self.workers.scheduler
        if address is None:
            # How often a file may fail is counted here. Images are no data of Dask's, which it could spill to a disk,
            # so a worker is paused never, and started anew when it is about to take the machine's memory.
            options: dict[str, Any] = {"distributed.scheduler.allowed-failures": 0}
            options |= {f"distributed.worker.memory.{limit}": False for limit in ("target", "spill", "pause")}
            with import_module("dask").config.set(options):
                self._local = self.dask.LocalCluster(
                    n_workers=self.workers.count,
                    threads_per_worker=1,
                    memory_limit=import_module("distributed.system").MEMORY_LIMIT // (self.workers.count or 1),
                    dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                )
            address = self._local.scheduler_address
        self.address = address
        try:
            self.client = self._connect()
        except OSError as error:
            raise SettingError("scheduler", f"no scheduler answers at {address}: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self.client.close(timeout=5)
        if self._local is not None:
            self._local.close(timeout=10)

    def describe(self, job: Job) -> tuple[str, dict[str, str]]:
        """The device and the versions of the first worker that answers; see `describe_worker`, also for errors."""
        future = self.client.submit(describe_worker, job, pure=False)
        while not future.done():
            self._wait([future])
            self._threads_of_workers()  # tells where there are none
        try:
            return future.result()
        except self.dask.KilledWorker:
            raise WorkerUnfit("the first worker died while it loaded the model: is its memory large enough?") from None
        except self.dask.CancelledError:
            raise ConnectionError(f"the scheduler at {self.address} is gone") from None

    def outcomes(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Predict files, in whatever order they are finished.

        A task whose worker dies is handed out again, the last time alone, so that its file is known to be the reason.
        After `Workers.tries` deaths its outcome is a record that says so.

        Raises:
            ConnectionError: the scheduler is gone for too long.
        """
        waiting = iter(tasks)
        again: deque[Task] = deque()
        suspects: deque[Task] = deque()
        deaths: Counter[str] = Counter()
        losses: Counter[str] = Counter()
        running: dict[Any, Task] = {}
        counted, window, is_alone = float("-inf"), _AHEAD, False

        def hand_out(task: Task) -> None:
            running[self.client.submit(predict_task, job, task, pure=False, retries=0)] = task

        while True:
            if time.monotonic() - counted > _COUNT_EVERY:
                counted, window = time.monotonic(), max(_AHEAD, _AHEAD * self._threads_of_workers())
            while len(running) < window and not is_alone:
                task = again.popleft() if again else next(waiting, None)
                if task is None:
                    break
                hand_out(task)
            if not running:
                if not suspects:
                    return
                hand_out(suspects.popleft())
                is_alone = True
            self._wait(list(running))
            for future in [future for future in running if future.status != "pending"]:
                task, is_alone = running.pop(future), False
                name = task.item.name
                outcome, died = self._outcome(future)
                if outcome is not None:
                    yield task, outcome
                    continue
                (deaths if died else losses)[name] += 1
                if deaths[name] >= self.workers.tries:
                    yield (
                        task,
                        _failure(
                            task,
                            f"its worker died {deaths[name]} times, at last with no other file at hand: out of memory, "
                            "or a crash while reading it",
                        ),
                    )
                elif losses[name] >= _LOST:
                    yield task, _failure(task, f"the scheduler lost it {losses[name]} times")
                elif died and deaths[name] + 1 == self.workers.tries:
                    suspects.append(task)
                else:
                    again.append(task)
            if self.client.status == "closed":
                self._reconnect()

    def _outcome(self, future: Any) -> tuple[Outcome | None, bool]:
        """The outcome of a future that is no longer pending; or None, and whether its worker died.

        Raises:
            WorkerUnfit: a worker joined that cannot do this job.
        """
        try:
            return future.result(timeout=60), False
        except self.dask.KilledWorker:
            return None, True
        except Exception:
            if future.status == "error":  # of the task itself
                raise
            return None, False  # cancelled or lost with the scheduler
        finally:
            with suppress(Exception):
                future.release()

    def _wait(self, futures: list[Any]) -> None:
        """Wait until one of the futures is done, a second at most."""
        with suppress(TimeoutError, self.dask.CancelledError, OSError), self.client.as_current():
            self.dask.wait(futures, timeout=1.0, return_when="FIRST_COMPLETED")
        if self.client.status != "running":  # where that ends at once
            time.sleep(0.1)

    def _threads_of_workers(self) -> int:
        with suppress(Exception):
            count = sum(self.client.nthreads().values())
            if count:
                self._idle_since, self._is_told = None, False
            elif self._idle_since is None:
                self._idle_since = time.monotonic()
            elif not self._is_told and time.monotonic() - self._idle_since > _PATIENCE:
                self._is_told = True
                self.say(f"no worker is connected to {self.address}; waiting for one")
            return count
        return 1

    def _connect(self) -> Any:
        return self.dask.Client(self.address, timeout=30, set_as_default=False)

    def _reconnect(self) -> None:
        self.say(f"the scheduler at {self.address} is gone; waiting for it")
        start = time.monotonic()
        while time.monotonic() - start < _RECONNECT:
            try:
                self.client = self._connect()
                return
            except OSError:
                time.sleep(1)
        raise ConnectionError(
            f"the scheduler at {self.address} is gone; give the same command again, when it is back, to go on"
        )


def _failure(task: Task, text: str) -> Outcome:
    return Outcome(FileRecord(str(task.item.path), task.item.name, error=text), False, None)


def remove_staging(output: Path) -> None:
    """Delete what workers of this and earlier runs left in a folder of results, which must be locked."""
    for folder in output.glob(STAGING + "*"):
        shutil.rmtree(folder, ignore_errors=True)

"""Prediction by many processes, on this machine or a cluster, by Dask: a file is a task, or a tile of a large image.

A worker loads the model once, reads the image where it lies, and writes the results into a hidden folder beside the
run's; the process that gave the command moves them to their place and writes run.json. So a worker that dies leaves
nothing of a file, and a task that was computed twice appears once. Only as many tasks are handed out as keep the
workers busy: memory does not depend on the number of files.
"""

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
from kg_detectron.inference.local_workers import LocalWorkers
from kg_detectron.inference.manifest import FileRecord
from kg_detectron.inference.model_names import kept_models
from kg_detectron.inference.run_settings import Settings, Workers
from kg_detectron.inference.tasks import Task
from kg_detectron.inference.tile_store import TILES
from kg_detectron.inference.tiling import TiledDetection
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.finding import Input
from kg_detectron.io.setting import SettingError

_AHEAD = 2  # tasks handed out for each thread of a worker
_COUNT_EVERY = 5.0  # seconds between two looks at how many workers there are
_PATIENCE = 60.0  # seconds without any worker after which the user is told
_RECONNECT = 600.0  # seconds for which a scheduler that is gone is waited for
_LARGE = 2**22  # bytes of a file below which nobody asks whether its tiles can be shared
_DONE, _DIED, _LOST_BY_SCHEDULER = "done", "worker died", "lost"
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


class Step(NamedTuple):
    """What a worker does at a time: a whole file, or a part of a large image.

    Attributes:
        task: the file.
        kind: "file", or of a large image "peaks" or "masks" of a tile, or "boxes" of all; at last "join".
        sha256: of the file, but for "file".
        page, tile: indices, where they are of interest.
    """

    task: Task
    kind: str = "file"
    sha256: str = ""
    page: int = 0
    tile: int = 0

    @property
    def name(self) -> str:
        """Different for all steps of a run."""
        return f"{self.task.item.name} {self.kind} {self.page} {self.tile}"


class Plan(NamedTuple):
    """A file that is large enough to be shared: its SHA-256, and the number of tiles of each page."""

    sha256: str
    tiles: list[int]

    def stages(self, task: Task) -> list[list[Step]]:
        """The steps, each list of which must be done before the next one begins."""
        pages = list(enumerate(self.tiles))
        of_tiles = {
            kind: [Step(task, kind, self.sha256, page, tile) for page, count in pages for tile in range(count)]
            for kind in ("peaks", "masks")
        }
        boxes = [Step(task, "boxes", self.sha256, page) for page, _ in pages]
        return [of_tiles["peaks"], boxes, of_tiles["masks"], [Step(task, "join", self.sha256)]]


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
        predictor = _predictor(job)
        return predictor.device, predictor.versions


_opened: dict[tuple[str, str, str], list[TiledDetection]] = {}  # the large image that was looked at last


def run_step(job: Job, step: Step) -> "Outcome | Plan | None":
    """Do a step on a worker.

    Returns:
        Of a file its outcome, or the plan by which it is shared; of other steps nothing: their results are in a folder.
    """
    task = step.task
    with _one_at_a_time:
        predictor = _predictor(job)
        if step.kind in ("file", "join"):
            plan = _plan(predictor, job, task) if step.kind == "file" else None
            return plan or _predict(predictor, job, task)
        key = job.model_sha256, repr(job.settings), step.sha256
        if key not in _opened:
            _opened.clear()
            _opened[key] = predictor.steps(task.item, step.sha256, job.output / TILES)
        tiled = _opened[key][step.page]
        with torch.no_grad():
            if step.kind == "peaks":
                tiled.peaks(step.tile)
            else:
                boxes, _, _ = tiled.boxes()
                if step.kind == "masks":
                    tiled.masks(step.tile, boxes)
    return None


def _plan(predictor: FilePredictor, job: Job, task: Task) -> Plan | None:
    """How a file is shared, if it is; what is wrong with it is found out when it is predicted."""
    with suppress(Exception):
        if not task.item.path.is_dir() and task.item.path.stat().st_size < _LARGE:
            return None
        sha256 = file_sha256(task.item.path)
        if task.known is None or not task.known.is_done(job.output, task.item.path, sha256):
            tiles = [len(page.tiles) for page in predictor.steps(task.item, sha256, job.output / TILES)]
            return Plan(sha256, tiles) if sum(tiles) > 1 else None
    return None


def _predict(predictor: FilePredictor, job: Job, task: Task) -> Outcome:
    folder = job.staging / uuid.uuid4().hex
    folder.mkdir(parents=True)
    record = predictor(task, folder, job.output)
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
        return max(1, torch.get_num_threads() // self.workers.count)

    def __enter__(self) -> "Cluster":
        self._local: LocalWorkers | None = None
        address = self.workers.scheduler
        if address is None:
            assert self.workers.count is not None
            self._local = LocalWorkers(self.workers.count)
            self._local.__enter__()
            address = self._local.address
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
            self._local.__exit__(None, None, None)

    def describe(self, job: Job) -> tuple[str, dict[str, str]]:
        """The device and the versions of the first worker that answers; see `describe_worker`, also for errors."""
        for _ in range(self.workers.tries):
            future = self.client.submit(describe_worker, job, pure=False)
            while not future.done():
                self._wait([future])
                self._threads_of_workers()  # tells where there are none
            description, end = self._result(future)
            if end == _DONE and isinstance(description, Exception):
                raise WorkerUnfit(f"a worker cannot begin: {type(description).__name__}: {description}")
            if end == _DONE:
                return description
            if self.client.status == "closed":
                self._reconnect()
        raise WorkerUnfit(
            f"{self.workers.tries} workers died while they loaded the model, or lost their scheduler: is their memory "
            "large enough?"
        )

    def outcomes(
        self, job: Job, tasks: Iterable[Task], progress: Callable[[Input, int, int], None] | None = None
    ) -> Iterator[tuple[Task, Outcome]]:
        """Predict files, in whatever order they are finished.

        A step whose worker dies is handed out again, the last time alone, so that its file is known to be the reason.
        After `Workers.tries` deaths its outcome is a record that says so.

        Args:
            job: what all tasks have in common.
            tasks: the files.
            progress: called after each step of a large image with the number of steps done and of all.

        Raises:
            ConnectionError: the scheduler is gone for too long.
            WorkerUnfit: a worker joined that cannot do this job.
        """
        waiting = (Step(task) for task in tasks)
        queue = _Queue()
        deaths: Counter[str] = Counter()
        losses: Counter[str] = Counter()
        suspects: deque[Step] = deque()
        running: dict[Any, Step] = {}
        counted, window, is_alone = float("-inf"), _AHEAD, False

        def hand_out(step: Step) -> None:
            running[self.client.submit(run_step, job, step, pure=False, retries=0)] = step

        while True:
            if time.monotonic() - counted > _COUNT_EVERY:
                counted, window = time.monotonic(), max(_AHEAD, _AHEAD * self._threads_of_workers())
            while len(running) < window and not is_alone:
                step = queue.pop() or next(waiting, None)
                if step is None:
                    break
                hand_out(step)
            if not running:
                if not suspects:
                    return
                hand_out(suspects.popleft())
                is_alone = True
            self._wait(list(running))
            for future in [future for future in running if future.status != "pending"]:
                step, is_alone = running.pop(future), False
                result, end = self._result(future)
                if end == _DONE:
                    outcome = queue.finish(step, result)
                    done, count = queue.steps(step)
                    if progress is not None and count:
                        progress(step.task.item, done, count)
                    if outcome is not None:
                        yield step.task, outcome
                    continue
                (deaths if end == _DIED else losses)[step.name] += 1
                if deaths[step.name] >= self.workers.tries:
                    yield (
                        step.task,
                        queue.give_up(
                            step,
                            f"its worker died {deaths[step.name]} times, at last with no other file at hand: out of "
                            "memory, or a crash while reading it",
                        ),
                    )
                elif losses[step.name] >= _LOST:
                    yield step.task, queue.give_up(step, f"the scheduler lost it {losses[step.name]} times")
                elif end == _DIED and deaths[step.name] + 1 == self.workers.tries:
                    suspects.append(step)
                else:
                    queue.again(step)
            suspects = deque(step for step in suspects if not queue.is_given_up(step))
            if self.client.status == "closed":
                self._reconnect()

    def _result(self, future: Any) -> tuple[Any, str]:
        """The result of a future that is no longer pending, if there is one, and how it ended.

        Raises:
            WorkerUnfit: a worker joined that cannot do this job.
        """
        try:
            return future.result(timeout=60), _DONE
        except self.dask.KilledWorker:
            return None, _DIED
        except WorkerUnfit:
            raise
        except Exception as error:
            if future.status == "error":  # of the step itself
                return error, _DONE
            return None, _LOST_BY_SCHEDULER
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


class _Queue:
    """Steps that are to be handed out before any new file, and the stages of large images that follow."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque()
        self._stages: dict[str, list[list[Step]]] = {}  # of each large image those to come
        self._left: Counter[str] = Counter()  # of each large image, steps of its present stage that are not done
        self._given_up: set[str] = set()
        self._done: Counter[str] = Counter()  # of each large image, steps
        self._all: Counter[str] = Counter()

    def pop(self) -> Step | None:
        """The next step; None where there is none."""
        while self._steps:
            step = self._steps.popleft()
            if not self.is_given_up(step):
                return step
        return None

    def again(self, step: Step) -> None:
        """Take a step that was not done."""
        self._steps.append(step)

    def steps(self, step: Step) -> tuple[int, int]:
        """Of the large image of a step the number of steps done and of all; 0 of 0 of other files."""
        name = step.task.item.name
        return self._done[name], self._all[name]

    def is_given_up(self, step: Step) -> bool:
        """Whether the file of a step was given up."""
        return step.task.item.name in self._given_up

    def give_up(self, step: Step, text: str) -> Outcome:
        """Do no more for a file; its outcome."""
        self._given_up.add(step.task.item.name)
        return Outcome(FileRecord(str(step.task.item.path), step.task.item.name, error=text), False, None)

    def finish(self, step: Step, result: Any) -> Outcome | None:
        """Take the result of a step, and queue what follows; the outcome of its file once that is known."""
        name = step.task.item.name
        if self.is_given_up(step):
            return None
        self._done[name] += name in self._stages
        if isinstance(result, Outcome):
            return result
        if isinstance(result, Plan):
            self._stages[name] = result.stages(step.task)
            self._all[name] = sum(map(len, self._stages[name]))
        elif isinstance(result, Exception):
            if step.kind in ("file", "join"):
                return self.give_up(step, f"{type(result).__name__}: {result}")
            # The last step, which does all that is missing, meets the same fault, and reports it as of any file.
            self._steps = deque(s for s in self._steps if s.task.item.name != name or s.kind == "join")
            if self._stages[name]:
                self._stages[name], self._left[name] = self._stages[name][-1:], 0
        else:
            self._left[name] -= 1
        while self._left[name] <= 0 and self._stages.get(name):
            stage = self._stages[name].pop(0)
            self._left[name] = len(stage)
            self._steps.extend(stage)
        return None

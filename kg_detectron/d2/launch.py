"""Start the processes of a training or an evaluation.

On CPUs they talk over gloo and are started here; on GPUs Detectron2 starts them; torchrun may start either.
"""

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import connection, set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch import distributed, multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

TIMEOUT = timedelta(minutes=30)  # of a process that waits for the others; the check of the data is one such wait
# After a process has failed the others have so many seconds to end by themselves; then as many after SIGTERM.
GRACE_SECONDS = 5.0
AUTO = "auto"
# What torchrun sets in the environment of each process that it starts.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


class ProcessError(RuntimeError):
    """The processes could not be started, or one of them failed, and all have ended.

    Attributes:
        status: exit status for the program.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def launch(
    function: Callable[..., object],
    device: str,
    *,
    processes: int = 1,
    machines: int = 1,
    machine_rank: int = 0,
    url: str = AUTO,
    args: Sequence[Any] = (),
) -> None:
    """Run a function in all processes of this machine, joined in one process group, and wait for their end.

    Started by torchrun, this process is one of them, and torchrun decides their number. Signals that this process gets
    are passed on to those that it started. Where a process fails, the others are ended.

    Args:
        function: a function of a module, for it is pickled.
        device: ``MODEL.DEVICE``: "cpu", "cuda", ...
        processes: of this machine.
        machines: how many run this launcher; machine_rank: number of this one, from 0.
        url: address of the first machine, ``tcp://HOST:PORT``; "auto" for one machine.
        args: of the function.

    Raises:
        ProcessError: numbers that make no sense together, or a process failed; the message says how.
        SystemExit: all processes ended with that status.
    """
    cpu = device.startswith("cpu")
    if processes < 1 or not 0 <= machine_rank < machines:
        raise ProcessError(
            "--num-gpus, --num-machines, --machine-rank: expected 1 or more processes, and a rank below the number of "
            f"machines, got {processes}, {machines}, {machine_rank}",
            2,
        )
    if all(name in os.environ for name in _TORCHRUN):
        if processes * machines > 1:
            message = "--num-gpus, --num-machines: torchrun decides how many processes there are; leave them out"
            raise ProcessError(message, 2)
        rank, size, local_rank, local_size, *_ = (int(os.environ[name]) for name in _TORCHRUN[:4])
        _join("env://", rank, size, local_rank, local_size, cpu)
        _run(function, args)
    elif processes * machines == 1:
        function(*args)
    elif machines > 1 and url == AUTO:
        message = "--dist-url: several machines need the address of the first one, such as tcp://HOST:29500"
        raise ProcessError(message, 2)
    elif not cpu:
        try:
            launch_on_gpus(function, processes, machines, machine_rank, url, tuple(args), TIMEOUT)
        except ProcessExitedException as error:
            raise ProcessError(str(error), _status(error.exit_code)) from None
        except ProcessRaisedException as error:
            raise ProcessError(str(error), 1) from None
    elif processes == 1:
        _join(url, machine_rank, machines, 0, 1, cpu)
        _run(function, args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            address = Path(folder, "processes").as_uri() if url == AUTO else url
            place = address, machine_rank * processes, machines * processes, processes
            _start_and_wait(processes, (place, function, tuple(args)))


def _join(url: str, rank: int, size: int, local_rank: int, local_size: int, cpu: bool) -> None:
    """Join the process group, and Detectron2's group of the processes of this machine."""
    distributed.init_process_group("gloo" if cpu else "nccl", url, TIMEOUT, size, rank)
    if not cpu:
        torch.cuda.set_device(local_rank)
    comm.create_local_process_group(local_size)
    comm.synchronize()


def _run(function: Callable[..., object], args: Sequence[Any]) -> None:
    try:
        function(*args)
    except KeyboardInterrupt:
        sys.exit(_status(-signal.SIGINT))
    comm.synchronize()  # gloo has aborted a process whose peer was gone before it
    distributed.destroy_process_group()


def _process(
    number: int, place: tuple[str, int, int, int], function: Callable[..., object], args: Sequence[Any]
) -> None:
    """One of the processes that are started here."""
    multiprocessing.set_start_method(None, force=True)  # workers of loaders start as those of a single process do
    url, first_rank, size, local_size = place
    if "OMP_NUM_THREADS" not in os.environ:  # else each would take all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    _join(url, first_rank + number, size, number, local_size, cpu=True)
    _run(function, args)


def _start_and_wait(count: int, args: tuple[Any, ...]) -> None:
    """Run `_process` in so many processes."""
    method = "spawn"
    if sys.platform == "linux":  # the imports, which take seconds, are then done once for all
        method = "forkserver"
        set_forkserver_preload(["kg_detectron.d2.trainer"])
    context: Any = multiprocessing.start_processes(_process, args, count, join=False, start_method=method)
    running, files = list(context.processes), [Path(file) for file in context.error_files]
    try:
        with _signals_passed_on(running):
            while alive := [process for process in running if process.is_alive()]:
                connection.wait([process.sentinel for process in alive])
                if any(process.exitcode for process in running):  # neither None nor 0
                    break
            _wait(running, GRACE_SECONDS)
            codes = [process.exitcode for process in running]
            _end(running)
        _raise_failure(codes, files)
    finally:
        _end(running)
        for file in files:
            file.unlink(missing_ok=True)


def _wait(processes: Sequence[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _end(processes: Sequence[Any]) -> None:
    """End the processes that still run."""
    for end in ("terminate", "kill"):
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            getattr(process, end)()
        _wait(alive, GRACE_SECONDS)


@contextlib.contextmanager
def _signals_passed_on(processes: Sequence[Any]) -> Iterator[None]:
    """A signal to this process reaches those that it started, whose statuses then decide about its own."""

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_failure(codes: Sequence[int | None], files: Sequence[Path]) -> None:
    """Raise what the exit codes of all processes (None: still running, 0: success) and files of tracebacks tell."""
    failed = {number: code for number, code in enumerate(codes) if code}
    if not failed:
        return
    statuses = set(failed.values())
    if len(failed) == len(codes) and len(statuses) == 1 and min(statuses) > 1:
        raise SystemExit(statuses.pop())  # each has said why: a mistake of the user's, or a signal
    end = "the other processes were ended"
    # The first that failed: later ones may have failed for lack of it.
    for number, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name + (", as when memory runs out" if code == -signal.SIGKILL else "")
            raise ProcessError(f"process {number} of {len(codes)} was ended by {name}; {end}", _status(code))
    raised = [number for number in failed if files[number].exists()]
    if raised:
        first = min(raised, key=lambda number: files[number].stat().st_mtime_ns)
        raise ProcessError(f"process {first} of {len(codes)} failed; {end}\n{_traceback(files[first])}", 1)
    number, code = next(iter(failed.items()))
    raise ProcessError(f"process {number} of {len(codes)} ended with status {code}; {end}", code)


def _traceback(file: Path) -> str:
    return pickle.loads(file.read_bytes())  # which PyTorch wrote in a process of ours


def _status(code: int) -> int:
    """Exit status of a process that ended with that code, as shells have it."""
    return 128 - code if code < 0 else code

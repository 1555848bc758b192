"""What Dask itself costs: files that take no time, among processes of this machine, and the memory of the command."""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

from kg_detectron.inference import cluster
from kg_detectron.inference.manifest import FileRecord
from kg_detectron.inference.run_settings import Settings, Workers
from kg_detectron.io.finding import Input


def no_work(job: cluster.Job, step: cluster.Step) -> cluster.Outcome:
    """A step that is done at once, in place of `cluster.run_step`."""
    return cluster.Outcome(FileRecord(str(step.task.item.path), step.task.item.name, "0" * 64), False, None)


def benchmark_tasks(arguments: argparse.Namespace, device: str) -> None:
    """Milliseconds a task, and the largest memory of this process after a tenth of them and after all."""
    cluster.run_step = no_work  # type: ignore[assignment]
    names = (f"plate07/well{number:06d}" for number in range(arguments.count))
    tasks = (cluster.Task(Input(Path(f"/data/{name}.tif"), name), None, ()) for name in names)
    job = cluster.Job(Path("model"), "0" * 64, Settings(), device, Path("out"), Path("out"), None)
    with cluster.Cluster(Workers(count=arguments.workers), print) as workers:
        start, peak = time.perf_counter(), {}
        for done, _ in enumerate(workers.outcomes(job, tasks), 1):
            if done in (arguments.count // 10, arguments.count):
                peak[done] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        seconds = time.perf_counter() - start
    memory = ", ".join(f"{value:.0f} MiB after {done}" for done, value in peak.items())
    each = 1000 * seconds / arguments.count
    print(f"{arguments.count} tasks, {arguments.workers} workers: {each:.2f} ms a task; {memory}")


def add_command(commands: Any) -> None:
    """Add ``tasks`` to the commands of tools/benchmark.py."""
    command = commands.add_parser("tasks", help="what sharing files among processes costs", description=__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of no importance here")
    command.add_argument("--count", type=int, default=10_000, help="tasks (%(default)s)")
    command.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    command.set_defaults(benchmark=benchmark_tasks)

"""What a training notes about itself: lines of JSON, and TensorBoard where it is installed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kg_detectron.io.atomic import replacing

METRICS_FILE = "metrics.jsonl"


class ScalarLog:
    """Losses and figures of a run, in its folder: ``metrics.jsonl``, and TensorBoard's files if it is installed.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: Any = None

    @property
    def file(self) -> Path:
        """The lines of JSON."""
        return self.folder / METRICS_FILE

    def start(self, iteration: int) -> None:
        """The run begins, or goes on, at an iteration: lines about that one and later ones go."""
        drop_iterations(self.file, iteration)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add a line, and show its values."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self.show(iteration, values)

    def show(self, iteration: int, values: Mapping[str, float]) -> None:
        """Give values to TensorBoard alone. The first ones hide what an earlier run showed of that iteration and on."""
        if self._writer is None:
            self._writer = summary_writer(self.folder, iteration) or _Nobody()
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Bring everything to the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Nobody:
    """Stands for TensorBoard where it is not installed."""

    def add_scalar(self, name: str, value: float, iteration: int) -> None: ...

    def close(self) -> None: ...


def summary_writer(folder: Path, iteration: int) -> Any:
    """TensorBoard's writer for a run that goes on at an iteration; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=iteration)


def drop_iterations(metrics: Path, first: int) -> None:
    """Take the lines of iteration ``first`` and later, and half a line of a killed run, out of a file of JSON lines."""
    if not metrics.is_file():
        return

    def stays(line: str) -> bool:
        try:
            return json.loads(line)["iteration"] < first
        except (json.JSONDecodeError, KeyError, TypeError):
            return False

    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    with replacing(metrics) as kept:
        kept.write_text("".join(line for line in lines if stays(line)), encoding="utf-8")

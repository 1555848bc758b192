"""What a training writes about itself: the terminal, metrics.json and TensorBoard."""

import json
from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from kg_detectron.io.atomic import replacing


def build_writers(output_dir: str | Path, first_iteration: int, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers, for a run that begins, or goes on, at ``first_iteration``.

    What an earlier run in the folder wrote about that iteration and later ones, which will now be done again, is taken
    out of metrics.json, and hidden in TensorBoard. A new run in the folder thus starts both anew.
    """
    metrics = Path(output_dir, "metrics.json")
    drop_iterations(metrics, first_iteration)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(metrics)),
        TensorboardXWriter(str(output_dir), purge_step=first_iteration),
    ]


def drop_iterations(metrics: Path, first: int) -> None:
    """Take the lines of iteration ``first`` and later, and half a line of a killed run, out of a metrics.json."""
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

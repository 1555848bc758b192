"""What a training writes about itself: the terminal, metrics.json and TensorBoard."""

from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from kg_detectron.training.scalars import drop_iterations


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

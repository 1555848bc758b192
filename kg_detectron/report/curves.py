"""The charts of the page: what is said of the models over the whole dataset."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kg_detectron.metrics import average_precision
from kg_detectron.report.charts import Axis, Chart, count_axis, unit_axis
from kg_detectron.report.comparison import IOUS, Pooled

_CURVE_POINTS = 300
_BINS = 24
_CLASSES = 7


def precision_recall_chart(
    models: Sequence[Pooled], threshold: int, iou: float, scores: Sequence[float | None]
) -> Chart:
    """Precision against recall at one IoU; a mark where the instances of the pictures end (`scores`)."""
    chart = Chart(
        f"Precision and recall at IoU {iou:g}",
        unit_axis("recall"),
        unit_axis("precision"),
        note="The mark is the score from which on instances are shown and counted below.",
    )
    for style, (model, score) in enumerate(zip(models, scores, strict=True)):
        if model.scores is None:
            found = int(model.hits[threshold].sum())
            share, right = found / max(model.positives, 1), found / max(len(model.hits[threshold]), 1)
            chart.add_line(f"{model.name} (no scores)", style, [share], [right], marks=[0])
            continue
        recall, precision, at = model.precision_recall(threshold)
        if not len(at):
            chart.add_line(f"{model.name} (nothing found)", style, [], [])
            continue
        shown = np.unique(np.linspace(0, len(at) - 1, _CURVE_POINTS).round().astype(int))
        mark = int(np.searchsorted(-at, -(score or 0.0), side="right")) - 1
        shown = np.union1d(shown, [max(mark, 0)])
        marks = [int(np.searchsorted(shown, mark))] if mark >= 0 else []
        chart.add_line(model.name, style, recall[shown], precision[shown], marks)
    return chart


def ap_chart(models: Sequence[Pooled]) -> Chart:
    """AP of masks against the IoU from which an instance counts as found, at `IOUS`."""
    ticks = [(iou, f"{iou:g}") for iou in (0.5, 0.6, 0.7, 0.8, 0.9)]
    chart = Chart("AP against IoU", Axis("IoU of masks", 0.48, 0.97, ticks), unit_axis("AP"))
    for style, model in enumerate(models):
        if model.scores is None:
            chart.note = "AP needs scores; a model without them is left out."
            continue
        values = [average_precision(model.scores, hits, model.positives) for hits in model.hits[: len(IOUS)]]
        if model.positives:
            chart.add_line(model.name, style, IOUS, values, marks=range(len(IOUS)))
    return chart


def stratum_chart(
    title: str,
    label: str,
    values: NDArray,
    names: Sequence[str],
    found: Sequence[NDArray[np.bool_]],
    iou: float,
    *,
    digits: int = 1,
) -> Chart:
    """Share of the cells that each model found, in classes of a quantity with about as many cells each.

    Args:
        title: what the classes are of.
        label: of the quantity, with its unit.
        values: (M,) of all cells.
        names: of the models.
        found: (M,) bool for each model.
        iou: from which on a cell is found.
        digits: to which values are rounded; equal ones are in one class.
    """
    values = np.asarray(values, dtype=np.float64).round(digits)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _CLASSES + 1)).round(digits)) if len(values) else [0.0]
    if len(edges) < 2:
        edges = np.array([edges[0], edges[0] + 1])
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(place, minlength=len(edges) - 1)
    places = np.arange(len(count)) + 0.5
    ticks = [(position, f"{edge:g}") for position, edge in enumerate(edges)]
    chart = Chart(
        f"Cells found by {title}, IoU {iou:g}",
        Axis(label, 0, len(count), ticks),
        unit_axis("recall"),
        note=f"Classes of {min(count)} to {max(count)} cells each.",
    )
    for style, (name, of) in enumerate(zip(names, found, strict=True)):
        recall = np.bincount(place, weights=of, minlength=len(count)) / np.maximum(count, 1)
        chart.add_line(name, style, places, recall, marks=range(len(places)))
    return chart


def score_chart(model: Pooled, threshold: int, iou: float, score: float | None) -> Chart | None:
    """How many instances have which score: those that found a cell, and on top of them the false ones."""
    if model.scores is None or not len(model.scores):
        return None
    high = max(float(model.scores.max()), 1e-6)
    x_axis = count_axis("score", high)
    edges = np.linspace(0, x_axis.high, _BINS + 1)
    hits = model.hits[threshold]
    found, false = (np.histogram(model.scores[of], edges)[0] for of in (hits, ~hits))
    chart = Chart(
        f"Scores of {model.name}",
        x_axis,
        count_axis("instances", float((found + false).max())),
        note=f"Found at IoU {iou:g}, or false. The upright line: shown and counted below from this score on.",
    )
    chart.add_bars("found", edges[:-1], edges[1:], np.zeros(_BINS), found)
    chart.add_bars("false", edges[:-1], edges[1:], found, found + false)
    if score is not None:
        chart.set_rule(min(score, x_axis.high))
    return chart

"""Segmenting the planes of a layer: what runs while the widget waits, and what it gets. Without Qt.

A prediction keeps cells of low scores too, so that a threshold can be moved without predicting again.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn

from kg_detectron.cells import Cells
from kg_detectron.cells.separation import separate_cells
from kg_detectron.export.measurements import measure
from kg_detectron.inference.explanation import Explanation, explain
from kg_detectron.inference.predictor import predict
from kg_detectron.inference.run_settings import Settings
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.napari.planes import Place
from kg_detectron.napari.shown_cells import LOWEST_SCORE

TILE = Settings.tile  # largest side, pixels of the network's input, of an image that is predicted and explained at once


class Cancelled(Exception):
    """The user has cancelled."""


@dataclass(frozen=True)
class SegmentedPlane:
    """The cells of one plane.

    Attributes:
        place: of the plane in its layer.
        cells: by falling score, separated: no pixel in two cells, each cell one piece.
        first_id: of the first cell; the others count on, and so do the planes.
        explanation: of the plane, where it was asked for.
        graph_scores: (B,) the scores of the boxes of the explanation, by their numbers.
    """

    place: Place
    cells: Cells
    first_id: int
    explanation: Explanation | None = None
    graph_scores: np.ndarray | None = None

    @property
    def ids(self) -> range:
        """The ids of the cells."""
        return range(self.first_id, self.first_id + len(self.cells))


@dataclass(frozen=True)
class Segmentation:
    """The cells of some planes of a layer.

    Attributes:
        shape: (..., H, W) of the layer.
        planes: that were segmented.
        features: columns (R,), one row for each id 1..R: those of `kg_detectron.export.measurements.measure`, ``index``
            in place of ``id``, ``axis0``, ... for each axis before Y and X, counted from 0, and with several classes
            ``class``, its name.
        threshold: that belongs to the model.
        colours: (red, green, blue) of each class, 0..255; () where there is one.
        notes: what a user should know, a sentence each.
    """

    shape: tuple[int, ...]
    planes: tuple[SegmentedPlane, ...]
    features: dict[str, np.ndarray]
    threshold: float
    notes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()

    @property
    def classes(self) -> np.ndarray:
        """(R,) int64, the class of the ids 1..R, from 1."""
        return np.concatenate([plane.cells.labels.cpu().numpy() for plane in self.planes])

    @property
    def scores(self) -> np.ndarray:
        """(R,) of the ids 1..R."""
        return self.features["score"]


def segment(
    model: InstanceNet,
    planes: Sequence[tuple[Place, np.ndarray]],
    shape: tuple[int, ...],
    *,
    diameter: float | None = None,
    pixel_size: float | None = None,
    graphs: bool = False,
    progress: Callable[[int, int], None] = lambda done, steps: None,
    stop: threading.Event | None = None,
) -> Segmentation:
    """Find and measure the cells of planes.

    Args:
        model: in evaluation mode.
        planes: place and pixels of each, (H, W) or (H, W, 3) BGR.
        shape: (..., H, W) of their layer.
        diameter: of a typical cell, pixels; None lets the model estimate the scale.
        pixel_size: micrometres, for the measurements, and for the scale where the model knows its own.
        graphs: explain each plane too, so that its keypoint graphs can be drawn.
        progress: called with the number of steps done and of all.
        stop: when it is set, the work ends soon.

    Raises:
        Cancelled: `stop` was set.
        ValueError: as `predict` does.
    """
    stop = stop or threading.Event()
    scale_by_pixel_size = diameter is None and model.preprocessing.pixel_size is not None
    segmented: list[SegmentedPlane] = []
    tables: list[dict[str, np.ndarray]] = []
    notes: dict[str, None] = {}
    first = 1
    with _interruptible(model, stop):
        for number, (place, pixels) in enumerate(planes):

            def step(done: int, steps: int, number: int = number) -> None:
                _check(stop)
                progress(number * steps + done, len(planes) * steps)

            found = predict(
                model,
                pixels,
                diameter=diameter,
                pixel_size=pixel_size if scale_by_pixel_size else None,
                min_score=LOWEST_SCORE,
                progress=step,
            )
            kept = separate_cells(found)
            explanation, graph_scores = None, None
            if graphs and (reason := _no_graphs(model, found)):
                notes[reason] = None
            elif graphs:
                explanation = explain(model, pixels, scale=found.scale[0], view=found.view)
                graph_scores = found.scores.cpu().numpy()
            table = measure(
                kept.masks, kept.boxes.cpu().numpy(), kept.scores.cpu().numpy(), np.asarray(pixels), pixel_size
            )
            table = {"index": table.pop("id") + first - 1} | table
            table |= {f"axis{axis}": np.full(len(kept), index) for axis, index in enumerate(place)}
            if len(model.classes) > 1:
                names = np.array(model.classes.names, object)
                table["class"] = names[kept.labels.cpu().numpy() - 1]
            tables.append(table)
            segmented.append(SegmentedPlane(place, kept, first, explanation, graph_scores))
            notes |= dict.fromkeys((f"scale {found.scale[0]:.3g}, {found.scale_source}", *found.notes))
            first += len(kept)
            _check(stop)
    features = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    colours = model.classes.shown_colours() if len(model.classes) > 1 else ()
    return Segmentation(shape, tuple(segmented), features, model.threshold, tuple(notes), colours)


def _no_graphs(model: InstanceNet, cells: Cells) -> str | None:
    """Why the graphs of an image cannot be drawn, or None."""
    if not isinstance(model, KeypointGraphNet):
        return f"models of the method {model.method} have no keypoint graphs"
    if max(side * scale for side, scale in zip(cells.size, cells.scale, strict=True)) > TILE:
        return f"keypoint graphs are drawn for images of up to {TILE} pixels of the network's input"
    return None


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled


@contextmanager
def _interruptible(model: nn.Module, stop: threading.Event) -> Iterator[None]:
    """Let the network end before its next layer when `stop` is set: an image of one tile has no steps between."""
    hooks = [module.register_forward_pre_hook(lambda *_: _check(stop)) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

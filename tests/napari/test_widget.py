"""The widget in a real napari: segment, filter, click, cancel, correct, train."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from builders import drawn_image, tiny_network

from kg_detectron import load_model, predict
from kg_detectron.cells.separation import separate_cells
from kg_detectron.inference.model_file import save_model
from kg_detectron.modeling import Scores

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from kg_detectron.napari.widget import SegmentCells

IMAGE = drawn_image(64, 96)


@pytest.fixture
def widget(viewer: "Viewer", model_file: Path, tmp_path: Path) -> "SegmentCells":
    from kg_detectron.napari.widget import FROM_FILE, SegmentCells

    viewer.add_image(IMAGE[..., ::-1], name="cells of a plate", rgb=True)
    segment_cells = SegmentCells(viewer)
    viewer.window.add_dock_widget(segment_cells, name="Segment cells")
    segment_cells.model.value = FROM_FILE
    segment_cells.model_file.value = model_file
    segment_cells.diameter.value = load_model(model_file).preprocessing.diameter  # a scale of 1
    segment_cells.fine_tune.folder.value = tmp_path / "corrected"
    return segment_cells


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Let Qt work until something is the case."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        QApplication.processEvents()
        time.sleep(0.005)


def segmented(widget: "SegmentCells") -> None:
    assert widget.segment() is not None
    assert not widget.segment_button.enabled and widget.cancel_button.enabled
    wait_for(lambda: widget.segment_button.enabled)
    assert widget.shown_cells is not None, widget.status.value


def expected(model_file: Path, threshold: float) -> np.ndarray:
    model = load_model(model_file)
    cells = predict(model, IMAGE, diameter=model.preprocessing.diameter)
    return separate_cells(cells.above(threshold)).masks.label_image()


def test_labels_are_those_of_a_prediction_at_every_threshold(widget: "SegmentCells", model_file: Path) -> None:
    segmented(widget)
    layer = widget.labels_layer
    assert layer is not None and layer.name == "cells of a plate cells"
    scores = np.sort(widget.shown_cells.segmentation.scores)
    assert len(scores) > 10 and widget.threshold.value == pytest.approx(0.6)
    assert np.array_equal(layer.data, expected(model_file, 0.6))
    for threshold in (scores[1], scores[-1], scores[len(scores) // 2], scores[0]):
        widget.threshold.value = float(threshold) - 1e-6
        assert np.array_equal(layer.data, expected(model_file, widget.threshold.value))
        assert widget.status.value.startswith(f"{len(np.unique(layer.data)) - 1} cells")


def test_a_click_on_a_cell_shows_its_numbers(widget: "SegmentCells") -> None:
    segmented(widget)
    widget.threshold.value = 0.05
    layer = widget.labels_layer
    y, x = np.argwhere(layer.data > 0)[0]
    id_ = int(layer.data[y, x])
    assert f"score: {layer.features.score[id_ - 1]:.3g}"[:9] in str(layer.get_status((y, x), world=True))
    event = type("Event", (), {"position": (y, x), "view_direction": None})()
    layer.mouse_drag_callbacks[-1](layer, event)
    shown = dict(zip(widget.numbers.row_headers, (row[0] for row in widget.numbers.data), strict=True))
    assert int(shown["index"]) == id_
    assert int(shown["area_px"]) == np.count_nonzero(layer.data == id_)


def test_classes_have_colours_and_a_column(widget: "SegmentCells", tmp_path: Path) -> None:
    """The class of each cell is that of the prediction, in the model's colours, or in colours of its own."""
    segmented(widget)
    assert "class" not in widget.labels_layer.features and not widget.shown_cells.segmentation.colours
    model = tiny_network(names=("round", "dark", "long"), colours=("#ff0000", "#00ff00", "#0000ff")).eval()
    model.scores = Scores((0.0016, 0.00171), (0.0, 0.95), threshold=0.6)
    save_model(model, tmp_path / "classes.safetensors")
    widget.model_file.value = tmp_path / "classes.safetensors"
    segmented(widget)
    widget.threshold.value = 0.05
    layer = widget.labels_layer
    cells = separate_cells(predict(model, IMAGE, diameter=model.preprocessing.diameter).above(0.05))
    names = [model.classes.names[label - 1] for label in cells.labels]
    assert len(set(names)) > 1 and layer.features["class"].tolist() == names
    colours = {"round": (1, 0, 0, 1), "dark": (0, 1, 0, 1), "long": (0, 0, 1, 1)}
    for id_, name in enumerate(names, start=1):
        assert tuple(layer.get_color(id_)) == colours[name]
    assert tuple(layer.get_color(len(names) + 1)) == (1, 1, 1, 1)  # drawn by hand
    assert all(f"{name}: {names.count(name)}" in widget.status.value for name in set(names))
    widget.show_numbers(1)
    shown = dict(zip(widget.numbers.row_headers, (row[0] for row in widget.numbers.data), strict=True))
    assert shown["class"] == names[0]
    widget.class_colours.value = False
    own = {tuple(np.round(layer.get_color(id_), 3)) for id_ in range(1, len(names) + 1)}
    assert len(own) > 3


def test_the_threshold_keeps_corrections_of_cells_that_stay(widget: "SegmentCells") -> None:
    segmented(widget)
    ranked = np.sort(widget.shown_cells.segmentation.scores)[::-1]
    layer = widget.labels_layer
    widget.threshold.value = float(ranked[0])
    assert set(np.unique(layer.data)) == {0, 1}
    # The user extends cell 1, and draws a new cell, which napari gives the next number: that of a hidden cell.
    empty = np.argwhere(layer.data == 0)
    layer.data[tuple(empty[0])] = 1
    layer.data[tuple(empty[1])] = 2
    widget.threshold.value = 0.05
    assert layer.data[tuple(empty[0])] == 1
    assert layer.data[tuple(empty[1])] > len(ranked), "it would count to the second cell of the prediction"
    assert np.count_nonzero(layer.data == 2) > 1
    assert widget.shown_cells.is_corrected()
    segmented(widget)
    assert layer in widget.viewer.layers, "a corrected layer is not replaced"


def test_every_plane_of_a_stack(widget: "SegmentCells", viewer: "Viewer") -> None:
    viewer.add_image(np.stack([IMAGE[..., 1], IMAGE[::-1, :, 1]]), name="stack", units=("pixel", "um", "um"))
    widget.image.value = viewer.layers["stack"]
    assert list(widget.channel.choices) == ["grey"]
    viewer.dims.set_current_step(0, 1)
    segmented(widget)
    labels = widget.labels_layer.data
    assert labels.shape == (2, 64, 96) and labels[1].any() and not labels[0].any(), "only the plane that is shown"
    widget.all_planes.value = True
    segmented(widget)
    widget.threshold.value = 0.05
    labels, features = widget.labels_layer.data, widget.labels_layer.features
    assert not set(np.unique(labels[0])) & set(np.unique(labels[1])) - {0}
    of_second = features["index"][features["axis0"] == 1]
    assert set(np.unique(labels[1])) - {0} == set(of_second)
    assert np.allclose(features["area_um2"], features["area_px"])


def test_graphs_follow_the_threshold(widget: "SegmentCells", viewer: "Viewer") -> None:
    widget.graphs.value = True
    segmented(widget)
    points, links = viewer.layers["keypoints"], viewer.layers["links"]
    widget.threshold.value = 0.05
    many = len(points.data), len(links.data)
    assert many[0] > many[1] > 0
    assert set(points.features["keypoint"]) <= {"tl", "tr", "bl", "br", "centre"}
    # Every link ends at a keypoint.
    ends = (links.data[:, 0] + links.data[:, 1])[:, None]
    assert np.abs(ends - points.data[None]).sum(-1).min(1).max() < 1e-3
    widget.threshold.value = 1.0
    assert (len(points.data), len(links.data)) < many


def test_cancel_ends_a_prediction_of_one_tile(widget: "SegmentCells", viewer: "Viewer") -> None:
    model = widget._load_network(str(widget.model_file.value))  # the one that the widget keeps
    reached = threading.Event()
    # The network waits in its first layer, until the user has cancelled.
    hook = next(model.children()).register_forward_pre_hook(lambda *_: (reached.set(), widget._stop.wait(30)) and None)
    worker = widget.segment()
    wait_for(reached.is_set)
    widget.cancel()
    wait_for(lambda: widget.segment_button.enabled)
    hook.remove()
    assert worker is not None
    assert widget.status.value == "cancelled" and widget.shown_cells is None and len(viewer.layers) == 1
    assert not any(module._forward_pre_hooks for module in model.modules()), "a hook stays in the model"


def test_a_failure_is_shown(widget: "SegmentCells", tmp_path: Path) -> None:
    widget.model_file.value = tmp_path / "absent.safetensors"
    widget.segment()
    wait_for(lambda: widget.segment_button.enabled)
    assert "absent.safetensors" in widget.status.value and widget.shown_cells is None


@pytest.mark.timeout(240)
def test_corrected_labels_are_trained_on(widget: "SegmentCells", viewer: "Viewer") -> None:
    segmented(widget)
    widget.threshold.value = 0.05
    tune = widget.fine_tune
    assert tune.corrected.value is widget.labels_layer
    tune.train()
    assert "no corrected images" in tune.status.value
    labels = np.zeros((64, 96), np.int32)
    labels[8:30, 8:30], labels[34:60, 40:80] = 3, 7
    tune.corrected.value.data = labels
    tune.add()
    written = tifffile.imread(Path(tune.folder.value) / "images" / "cells_of_a_plate.tif")
    assert np.array_equal(written, IMAGE[..., ::-1])
    assert np.array_equal(tifffile.imread(Path(tune.folder.value) / "masks" / "cells_of_a_plate.tif"), labels)
    tune.minutes.min = 0.01
    tune.minutes.value = 0.01
    tune.train()
    assert tune.is_training and tune.stop_button.enabled
    wait_for(lambda: not tune.is_training, 200)
    assert "trained" in tune.status.value, tune._output
    assert widget.model_file.value == Path(tune.folder.value) / "run1" / "model.safetensors"
    assert tune.progress.value == 100
    segmented(widget)


def test_a_training_can_be_stopped(widget: "SegmentCells") -> None:
    segmented(widget)
    tune = widget.fine_tune
    labels = np.zeros((64, 96), np.int32)
    labels[8:30, 8:30] = 1
    tune.corrected.value.data = labels
    tune.add()
    tune.train()
    wait_for(lambda: bool(tune._process.processId()))
    tune.stop()
    wait_for(lambda: not tune.is_training)
    assert tune.status.value == "stopped" and tune.train_button.enabled

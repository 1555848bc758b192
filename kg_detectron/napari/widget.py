"""The widget "Segment cells": a prediction of the chosen layer, and a training on its corrected labels."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.widgets import (
    CheckBox,
    ComboBox,
    Container,
    FileEdit,
    FloatSlider,
    FloatSpinBox,
    Label,
    ProgressBar,
    PushButton,
    Table,
)
from napari.layers import Image, Labels, Layer
from napari.qt.threading import create_worker
from napari.utils.notifications import show_error, show_info
from superqt.utils import ensure_main_thread

from kg_detectron.inference.model_names import DEFAULT_MODEL, kept_models, model_path
from kg_detectron.napari.fine_tuning import FineTune, layer_choice
from kg_detectron.napari.planes import (
    all_places,
    channel_choices,
    layer_shape,
    pixel_size,
    read_plane,
    shown_place,
)
from kg_detectron.napari.shown_cells import LOWEST_SCORE, ShownCells

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from kg_detectron.modeling import InstanceNet
    from kg_detectron.napari.segmentation import Segmentation

    # What the thread hands over; nothing where it was cancelled.
    Outcome = tuple[Segmentation | None, Exception | None]

FROM_FILE = "from a file"


class SegmentCells(Container):
    """Segments the cells of an image layer into a labels layer, whose features are the measurements.

    The threshold filters the result at once. A click on a cell shows its numbers.

    Args:
        napari_viewer: that the widget belongs to.
    """

    def __init__(self, napari_viewer: "Viewer") -> None:
        self.viewer = napari_viewer
        self.image = layer_choice(napari_viewer, Image, "image")
        self.model = ComboBox(name="model", choices=[*kept_models(), FROM_FILE], value=DEFAULT_MODEL)
        self.model_file = FileEdit(name="model_file", filter="Models (*.safetensors *.pth)", visible=False)
        self.channel = ComboBox(name="channel", choices=lambda _: channel_choices(self.image.value))
        self.all_planes = CheckBox(name="all_planes", text="All planes of the stack")
        self.diameter = FloatSpinBox(
            name="diameter", min=0, max=10000, step=1, tooltip="of a typical cell, pixels; 0: the model estimates it"
        )
        self.graphs = CheckBox(name="graphs", text="Keypoint graph", tooltip="as layers of points and links")
        self.segment_button = PushButton(name="segment", text="Segment")
        self.cancel_button = PushButton(name="cancel", text="Cancel", enabled=False)
        self.progress = ProgressBar(name="progress", value=0, visible=False)
        self.threshold = FloatSlider(
            name="threshold", min=LOWEST_SCORE, max=1, step=0.01, value=0.5, tracking=True, enabled=False
        )
        self.class_colours = CheckBox(
            name="class_colours", text="Colours of classes", value=True, visible=False, tooltip="instead of one a cell"
        )
        self.status = Label(name="status", label=" ", value="")
        self.numbers = Table(name="numbers", label="cell", value={"value": []})
        self.fine_tune = FineTune(napari_viewer, self._planes_with_labels, self._model_name, self._use_model)
        buttons = Container(widgets=[self.segment_button, self.cancel_button], layout="horizontal", labels=False)
        super().__init__(
            widgets=[
                self.image,
                self.model,
                self.model_file,
                self.channel,
                self.all_planes,
                self.diameter,
                self.graphs,
                buttons,
                self.progress,
                self.threshold,
                self.class_colours,
                self.status,
                self.numbers,
                self.fine_tune,
            ]
        )
        self.shown_cells: ShownCells | None = None
        self.labels_layer: Labels | None = None
        self.graph_layers: list[Layer] = []
        self._models: dict[tuple[str, int], InstanceNet] = {}
        self._stop = threading.Event()
        self._pending: tuple[Image, bool] | None = None
        self.image.changed.connect(self._image_changed)
        self.model.changed.connect(self._model_changed)
        self.segment_button.changed.connect(self.segment)
        self.cancel_button.changed.connect(self.cancel)
        self.threshold.changed.connect(self._threshold_changed)
        self.class_colours.changed.connect(self._colour)
        self.viewer.layers.events.inserted.connect(self._layers_changed)
        self.viewer.layers.events.removed.connect(self._layers_changed)
        self._image_changed()
        self.native.destroyed.connect(self._closed)

    def _closed(self) -> None:
        """Let go of the viewer, which may stay open without the widget."""
        self._stop.set()
        for event in (self.viewer.layers.events.inserted, self.viewer.layers.events.removed):
            event.disconnect(self._layers_changed)

    # What is chosen.

    def _layers_changed(self) -> None:
        self.image.reset_choices()
        self.fine_tune.corrected.reset_choices()
        self._image_changed()

    def _image_changed(self) -> None:
        layer = self.image.value
        self.channel.reset_choices()
        self.all_planes.visible = layer is not None and len(layer_shape(layer)) > 2

    def _model_changed(self) -> None:
        self.model_file.visible = self.model.value == FROM_FILE

    def _model_name(self) -> str:
        """A kept model's name, or the path of a file."""
        return str(self.model_file.value) if self.model.value == FROM_FILE else str(self.model.value)

    def _use_model(self, path: Path) -> None:
        self.model.value = FROM_FILE
        self.model_file.value = path

    # The prediction.

    def segment(self) -> Any:
        """Segment the chosen layer in a thread; the worker is returned, None where there is nothing to do."""
        layer = self.image.value
        if layer is None:
            show_info("Open an image first, and choose its layer.")
            return None
        if layer.ndim < 2 or not self.segment_button.enabled:
            return None
        places = list(all_places(layer)) if self.all_planes.value and self.all_planes.visible else None
        places = places or [shown_place(layer, self.viewer.dims.current_step)]
        self._stop = threading.Event()
        self._pending = layer, self.graphs.value
        self._set_busy(True)
        worker = create_worker(
            self._work,
            layer,
            places,
            self.channel.value,
            self._model_name(),
            self.diameter.value or None,
            self.graphs.value,
            self._stop,
        )
        worker.returned.connect(self._segmented)
        worker.finished.connect(lambda: self._set_busy(False))
        worker.start()
        return worker

    def cancel(self) -> None:
        """End the prediction before the next layer of the network."""
        self._stop.set()
        self.status.value = "cancelling ..."

    def _work(
        self,
        layer: Image,
        places: list[tuple[int, ...]],
        channel: str,
        model: str,
        diameter: float | None,
        graphs: bool,
        stop: threading.Event,
    ) -> "Outcome":
        """What runs in the thread. PyTorch takes seconds to import: only here."""
        from kg_detectron.napari.segmentation import Cancelled, segment

        try:
            found = segment(
                self._load_network(model),
                [(place, read_plane(layer, place, channel)) for place in places],
                layer_shape(layer),
                diameter=diameter,
                pixel_size=pixel_size(layer),
                graphs=graphs,
                progress=self._show_progress,
                stop=stop,
            )
        except Cancelled:
            return None, None
        except Exception as error:  # whatever it is, the user should see it, and the widget stays usable
            return None, error
        return found, None

    def _load_network(self, model: str) -> "InstanceNet":
        """A model, kept in memory as long as its file is the same."""
        import torch

        from kg_detectron.inference.model_file import load_model

        path = model_path(model)
        key = str(path), path.stat().st_mtime_ns
        if key not in self._models:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._models = {key: load_model(path, device)}
        return self._models[key]

    @ensure_main_thread
    def _show_progress(self, done: int, steps: int) -> None:
        self.progress.min, self.progress.max, self.progress.value = 0, steps, done

    def _set_busy(self, busy: bool) -> None:
        self.segment_button.enabled = not busy
        self.cancel_button.enabled = busy
        self.progress.visible = busy
        if busy:
            # Without an end as long as no step is done.
            self.progress.min = self.progress.max = 0
            self.status.value = "segmenting ..."

    def _segmented(self, outcome: "Outcome") -> None:
        segmentation, error = outcome
        if error is not None:
            self.status.value = f"failed: {error}"
            show_error(str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}")
            return
        if segmentation is None:
            self.status.value = "cancelled"
            return
        assert self._pending is not None
        layer, graphs = self._pending
        # Layers of the former result go, but for labels that somebody has corrected.
        former = [*self.graph_layers]
        if self.shown_cells is not None and self.labels_layer is not None and not self.shown_cells.is_corrected():
            former.append(self.labels_layer)
        for old in former:
            if old in self.viewer.layers and old.metadata.get("image") == layer.name:
                self.viewer.layers.remove(old)
        self.shown_cells = None
        threshold = max(segmentation.threshold, LOWEST_SCORE)
        self.threshold.value = threshold
        self.shown_cells = ShownCells(segmentation, threshold)
        place = {name: getattr(layer, name) for name in ("scale", "translate", "rotate", "shear", "affine", "units")}
        place["metadata"] = {"image": layer.name}
        features = segmentation.features
        self.labels_layer = self.viewer.add_labels(
            self.shown_cells.labels, name=f"{layer.name} cells", features=features, **place
        )
        self.labels_layer.mouse_drag_callbacks.append(self._clicked)
        self.class_colours.visible = bool(segmentation.colours)
        self._colour()
        self.graph_layers = []
        if graphs:
            from kg_detectron.napari.graph_layers import graph_layers

            for data, options, kind in graph_layers(segmentation, threshold):
                add = self.viewer.add_points if kind == "points" else self.viewer.add_vectors
                self.graph_layers.append(add(data, ndim=len(segmentation.shape), **options, **place))
            self.viewer.layers.selection.active = self.labels_layer
        self.threshold.enabled = True
        self.fine_tune.corrected.value = self.labels_layer
        self._show_count()

    # The result.

    def _threshold_changed(self, threshold: float) -> None:
        if self.shown_cells is None or self.labels_layer is None:
            return
        self.shown_cells.move(threshold)
        self.labels_layer.refresh()
        if self.graph_layers:
            self._filter_graphs(threshold)
        self._show_count()

    def _colour(self) -> None:
        """Give the labels the colours of their classes, or one for each cell."""
        if self.shown_cells is None or self.labels_layer is None or not self.shown_cells.segmentation.colours:
            return
        from napari.utils.colormaps import label_colormap

        from kg_detectron.napari.class_colours import class_colormap

        segmentation = self.shown_cells.segmentation
        self.labels_layer.colormap = (
            class_colormap(segmentation.features["index"], segmentation.classes, segmentation.colours)
            if self.class_colours.value
            else label_colormap()
        )

    def _filter_graphs(self, threshold: float) -> None:
        from kg_detectron.napari.graph_layers import graph_layers

        assert self.shown_cells is not None
        for layer, (data, options, _) in zip(
            self.graph_layers, graph_layers(self.shown_cells.segmentation, threshold), strict=True
        ):
            layer.data = data
            if "features" in options:
                layer.features, layer.face_color = options["features"], options["face_color"]

    def _show_count(self) -> None:
        assert self.shown_cells is not None
        segmentation = self.shown_cells.segmentation
        count = f"{len(self.shown_cells)} cells of a score from {self.shown_cells.threshold:.2f}"
        lines = [count, *self.shown_cells.class_counts(), *segmentation.notes]
        self.status.value = "\n".join(lines)

    def _clicked(self, layer: Labels, event: Any) -> None:
        """Show the numbers of the cell under the mouse."""
        value = layer.get_value(event.position, view_direction=event.view_direction, world=True)
        self.show_numbers(int(value or 0))

    def show_numbers(self, id_: int) -> None:
        """Show the features of a cell; none for the background and for cells that were drawn by hand."""
        features = self.shown_cells.segmentation.features if self.shown_cells is not None else {}
        rows = np.flatnonzero(features["index"] == id_) if features else np.zeros(0, int)
        if not len(rows):
            self.numbers.value = {"value": []}
            return
        cell = [column[rows[0]] for column in features.values()]
        values = [[value if isinstance(value, str) else f"{float(value):.6g}"] for value in cell]
        self.numbers.value = {"data": values, "index": list(features), "columns": ["value"]}

    def _planes_with_labels(self, labels: Labels) -> tuple[str, list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]]:
        """Name, and place, pixels and labels of all planes of the chosen image.

        Raises:
            ValueError: there is no image, or it has another shape than the labels.
        """
        layer = self.image.value
        if layer is None:
            raise ValueError("image: expected the layer that the labels belong to")
        data = np.asarray(labels.data)
        if data.shape != layer_shape(layer):
            raise ValueError(f"labels: expected the shape of the image {layer_shape(layer)}, got {data.shape}")
        channel = self.channel.value
        planes = [(place, read_plane(layer, place, channel), data[place]) for place in all_places(layer)]
        return layer.name, planes

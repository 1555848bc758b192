"""The part of the widget that collects corrected labels and adapts a model to them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.widgets import ComboBox, Container, FileEdit, FloatSpinBox, Label, ProgressBar, PushButton
from napari.layers import Labels, Layer
from napari.utils.notifications import show_error
from qtpy.QtCore import QProcess, QProcessEnvironment

from kg_detectron.napari.planes import Place

if TYPE_CHECKING:
    from napari.viewer import Viewer

Planes = list[tuple[Place, np.ndarray, np.ndarray]]


def layer_choice(viewer: "Viewer", kind: type[Layer], label: str) -> ComboBox:
    """A choice among the viewer's layers of a kind. ``reset_choices`` looks at them again."""

    def layers(_: Any) -> list[Layer]:
        return [layer for layer in viewer.layers if isinstance(layer, kind)]

    return ComboBox(choices=layers, label=label)


class FineTune(Container):
    """Writes the image and its corrected labels into a folder, and runs ``kg-detectron train`` on it.

    Args:
        viewer: with the layers to choose from.
        planes: of a labels layer the name of its image, and place, pixels and labels of each plane.
        model: the name or file of the model to start from.
        trained: is called with the file of the new model.
    """

    def __init__(
        self,
        viewer: "Viewer",
        planes: Callable[[Labels], tuple[str, Planes]],
        model: Callable[[], str],
        trained: Callable[[Path], None],
    ) -> None:
        self._planes, self._model, self._trained = planes, model, trained
        self.corrected = layer_choice(viewer, Labels, "corrected labels")
        self.folder = FileEdit(
            name="folder", label="folder", mode="d", value=Path.home() / "kg_detectron", tooltip="of corrected images"
        )
        self.add_button = PushButton(name="add", text="Add image and labels")
        self.minutes = FloatSpinBox(name="minutes", min=0.1, max=10000, value=20, step=1)
        self.train_button = PushButton(name="train", text="Fine-tune")
        self.stop_button = PushButton(name="stop", text="Stop", enabled=False)
        self.progress = ProgressBar(name="training_progress", min=0, max=100, visible=False)
        self.status = Label(name="training_status", label=" ", value="")
        buttons = Container(widgets=[self.train_button, self.stop_button], layout="horizontal", labels=False)
        super().__init__(
            widgets=[
                Label(value="<b>Correct and fine-tune</b>"),
                self.corrected,
                self.folder,
                self.add_button,
                self.minutes,
                buttons,
                self.progress,
                self.status,
            ]
        )
        self._process: QProcess | None = None
        self._run = Path()
        self._output = ""
        self.add_button.changed.connect(self.add)
        self.train_button.changed.connect(self.train)
        self.stop_button.changed.connect(self.stop)
        self.native.destroyed.connect(self.stop)

    @property
    def is_training(self) -> bool:
        """Whether a training runs."""
        return self._process is not None

    def add(self) -> None:
        """Write the image and the chosen labels into the folder."""
        from kg_detectron.napari.corrections import corrected_images, save_corrections

        if self.corrected.value is None:
            self._fail("choose a labels layer first")
            return
        try:
            count = save_corrections(self.folder.value, *self._planes(self.corrected.value))
        except (OSError, ValueError) as error:
            self._fail(str(error))
            return
        self.status.value = f"{count} planes written; {corrected_images(self.folder.value)} images in the folder"

    def train(self) -> None:
        """Start a training on the folder, in a process of its own."""
        from kg_detectron.napari.corrections import corrected_images, next_run, training_command

        if self.is_training:
            return
        if not corrected_images(self.folder.value):
            self._fail("the folder has no corrected images: add some first")
            return
        self._run, self._output = next_run(self.folder.value), ""
        program, *arguments = training_command(self.folder.value, self._model(), self._run, self.minutes.value)
        self._process = process = QProcess()
        environment = QProcessEnvironment.systemEnvironment()
        environment.insert("PYTHONPATH", os.pathsep.join(filter(None, [_source(), os.environ.get("PYTHONPATH")])))
        process.setProcessEnvironment(environment)
        process.setProcessChannelMode(QProcess.ProcessChannelMode.MergedChannels)
        process.readyReadStandardOutput.connect(self._read)
        process.finished.connect(self._finished)
        process.errorOccurred.connect(lambda error: self._finished(-1) if process.processId() == 0 else None)
        self._set_busy(True)
        self.status.value = "starting ..."
        process.start(program, arguments)

    def stop(self, *_: Any) -> None:
        """Stop the training, which saves a checkpoint where the system has such signals."""
        if self._process is not None:
            # Not QProcess.terminate, which on Windows closes windows, and the process has none.
            if os.name == "posix" and self._process.processId():
                os.kill(int(self._process.processId()), signal.SIGTERM)
            else:
                self._process.kill()

    def _read(self) -> None:
        from kg_detectron.napari.corrections import training_progress

        assert self._process is not None
        self._output += bytes(self._process.readAllStandardOutput()).decode(errors="replace")
        percent = training_progress(self._output)
        if percent is not None:
            self.progress.max, self.progress.value = 100, min(int(percent), 100)  # the last iteration may pass the end
        if line := _last_line(self._output):
            self.status.value = line

    def _finished(self, status: int, *_: Any) -> None:
        from kg_detectron.napari.corrections import model_of

        self._process = None
        self._set_busy(False)
        if status == 0:
            self.status.value = f"trained: {model_of(self._run)}, the model that is chosen now"
            self._trained(model_of(self._run))
        elif status in (130, -signal.SIGTERM, signal.SIGTERM):
            self.status.value = "stopped"
        else:
            self._fail(_last_line(self._output) or f"the training ended with status {status}")

    def _set_busy(self, busy: bool) -> None:
        self.train_button.enabled, self.stop_button.enabled = not busy, busy
        self.progress.visible = busy
        if busy:
            self.progress.max = self.progress.value = 0

    def _fail(self, text: str) -> None:
        self.status.value = text
        show_error(text)


def _source() -> str:
    """The folder that this kg_detectron is imported from, for the process that trains."""
    return str(Path(__file__).parents[2])


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""

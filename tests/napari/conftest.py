"""A viewer without a screen, and a model that needs no training."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import tiny_network

from kg_detectron.inference.model_file import save_model
from kg_detectron.modeling import Scores

if TYPE_CHECKING:
    from napari.viewer import Viewer

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")


@pytest.fixture
def viewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Viewer"]:
    """A napari viewer that nobody sees, with settings of its own."""
    monkeypatch.setenv("NAPARI_CONFIG", str(tmp_path / "napari_settings.yaml"))
    import napari

    opened = napari.Viewer(show=False)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny keypoint graph with random weights, which finds something in any image."""
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    model = tiny_network().eval()
    # Its scores lie close together, and are spread over the range of probabilities.
    model.scores = Scores((0.0016, 0.00171), (0.0, 0.95), threshold=0.6)
    save_model(model, path)
    return path

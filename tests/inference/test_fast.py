"""`make_fast`: 16 bits only where they are faster and find the same cells."""

import numpy as np
import pytest
from builders import tiny_network

import kg_detectron.inference.fast as fast
from kg_detectron.cells import Cells
from kg_detectron.inference import load_model, make_fast, predict
from kg_detectron.modeling import InstanceNet


@pytest.mark.parametrize(
    ("gain", "cells_of_half", "precision", "says"),
    [
        (2.0, "same", "bfloat16", "bfloat16: 2 times as fast here"),
        (1.04, "same", "float32", "bfloat16 is 1 times as fast"),
        (2.0, "none", "float32", "F1 0 with"),
        (2.0, "error", "float32", "bfloat16 does not run here (no such kernel)"),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, gain: float, cells_of_half: str, precision: str, says: str):
    def run(model: InstanceNet, image: np.ndarray) -> tuple[float, Cells]:
        if model.precision == "float32":
            return gain, cells
        if cells_of_half == "error":
            raise RuntimeError("no such kernel\nand a trace")
        return 1.0, cells if cells_of_half == "same" else cells[[]]

    model = load_model("nuclei")
    image, _ = fast.nuclei_image(np.random.default_rng(0), 128, 128, 6)
    cells = predict(model, image, scale=1.0).above(model.threshold)
    assert len(cells)
    monkeypatch.setattr(fast, "_run", run)
    said = make_fast(model)
    assert model.precision == precision and says in said


def test_measured_here():
    """Whatever this machine can do, the model works afterwards and says what it does."""
    model = tiny_network().eval()
    said = make_fast(model)
    assert said.startswith(f"{model.precision}: ")
    assert isinstance(predict(model, np.zeros((40, 40, 3), np.uint8), scale=1.0), Cells)

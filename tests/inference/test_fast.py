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


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        ({"onnxruntime": 1.0, "bfloat16": 1.5}, "float32: onnxruntime, 2 times as fast here, the same cells"),
        ({"onnxruntime": 1.5, "bfloat16": 1.0}, "bfloat16: 2 times as fast here, the same cells"),
        ({"onnxruntime": 1.9, "bfloat16": 3.0}, "float32: bfloat16 is 0.67 times as fast here, and its cells have F1"),
    ],
)
def test_the_fastest_of_several_ways(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], says: str):
    pytest.importorskip("onnxruntime")

    def run(model: InstanceNet, image: np.ndarray) -> tuple[float, Cells]:
        way = "onnxruntime" if "maps" in vars(model) else model.precision
        return seconds.get(way, 2.0), cells

    model = tiny_network().eval()
    image = np.zeros((40, 40, 3), np.uint8)
    cells = predict(model, image, scale=1.0)[[]]
    monkeypatch.setattr(fast, "_run", run)
    for _ in range(2):  # the second time it begins anew
        assert make_fast(model).startswith(says)
        assert ("maps" in vars(model)) == ("onnxruntime," in says) and model.precision == says.partition(":")[0]
        assert isinstance(predict(model, image, scale=1.0), Cells)
        model.precision = "float32"


def test_measured_here(monkeypatch: pytest.MonkeyPatch):
    """Whatever this machine can do, the model works afterwards and says what it does."""
    for name, value in (("_REPEATS", 1), ("_SIZE", 96), ("_CELLS", 4)):
        monkeypatch.setattr(fast, name, value)
    model = tiny_network().eval()
    said = make_fast(model)
    assert said.startswith(f"{model.precision}: ")
    assert isinstance(predict(model, np.zeros((40, 40, 3), np.uint8), scale=1.0), Cells)

"""Packages of bioimage.io: bioimageio.core validates and runs them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_network

from kg_detectron.cli.main import main
from kg_detectron.inference import save_model
from kg_detectron.inference.bioimage_package import preprocessed, save_bioimage_package


def model(normalisation: str = "percentile"):
    return tiny_network(trunk="lite", heads="lite", scales=(2,), radius=2.0, normalisation=normalisation).eval()


def test_bioimageio_core_runs_the_package(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    test_model = pytest.importorskip("bioimageio.core").test_model
    file, package = tmp_path / "model.safetensors", tmp_path / "new" / "package.zip"
    save_model(model(), file)
    assert main(["export", str(file), "-o", str(package)]) == 0
    assert "a package of bioimage.io" in capsys.readouterr().out
    summary = test_model(package)  # the format, the test tensors, other sizes and batches
    assert summary.status == "passed", summary.format()


def test_levels_are_those_of_the_model():
    """Where no level lies beyond the percentiles' pixels, both ways to the network's input agree."""
    network = model()
    image = np.random.default_rng(0).integers(0, 4096, (1, 3, 64, 96)).astype(np.uint16)
    raw = np.ascontiguousarray(image[0].transpose(1, 2, 0))
    levels = torch.from_numpy(network.preprocessing.levels(raw)(raw)).permute(2, 0, 1)
    (expected,) = network.preprocessing.batch([levels], network.divisor)
    np.testing.assert_allclose(preprocessed(network, image)[0], expected, atol=0.02)


def test_models_without_words_in_bioimageio_are_refused(tmp_path: Path):
    pytest.importorskip("bioimageio.spec")
    with pytest.raises(ValueError, match="model: expected percentile normalisation, got 'fixed'"):
        save_bioimage_package(model("fixed"), tmp_path / "model.zip", "a name")
    assert not list(tmp_path.iterdir())

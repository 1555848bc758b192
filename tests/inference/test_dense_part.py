"""The dense part in ONNX and as an exported program: the same maps at any size, and the same cells."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import tifffile
import torch
from builders import drawn_image, tiny_network
from toy_method import ToyNet

from kg_detectron.cli.main import main
from kg_detectron.inference import predict, save_model
from kg_detectron.inference.dense_part import (
    OPSET,
    DensePart,
    output_names,
    run_by_onnxruntime,
    save_onnx,
    save_program,
    with_onnx,
)
from kg_detectron.inference.file_prediction import FilePredictor
from kg_detectron.inference.run_settings import RUNTIMES, Settings
from kg_detectron.io.images import write_png
from kg_detectron.io.setting import SettingError


@pytest.fixture(scope="module")
def model():
    return tiny_network(trunk="lite", heads="lite", scales=(2,), radius=2.0, normalisation="percentile").eval()


def assert_same_maps(model, call) -> None:
    """At two sizes, and for several images at once."""
    for shape in ((1, 3, 64, 96), (3, 3, 112, 48)):
        batch = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5
        with torch.no_grad():
            expected = DensePart(model)(batch)
        found = call(batch)
        assert len(found) == len(expected) == len(output_names(model))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), other, atol=1e-4, rtol=0)


def test_onnx_gives_the_same_maps_and_cells(model, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_model(model, tmp_path / "model.safetensors")
    file = tmp_path / "new" / "model.onnx"
    assert main(["export", str(tmp_path / "model.safetensors"), "-o", str(file), "--format", "onnx"]) == 0
    assert f"ONNX, opset {OPSET}" in capsys.readouterr().out
    content = onnx.load(file)
    onnx.checker.check_model(content, full_check=True)
    assert [entry.version for entry in content.opset_import if entry.domain == ""] == [OPSET]
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [part.name for part in session.get_outputs()] == output_names(model)
    assert output_names(model)[:3] == ["heatmap_s2", "single_offset_s2", "group_offset_s2"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["kg_detectron"]) == model.description()
    assert_same_maps(model, lambda batch: session.run(None, {"image": batch.numpy()}))

    other = with_onnx(model, file)
    for image in (drawn_image(64, 96), drawn_image(50, 70, seed=1)):
        cells, found = predict(model, image), predict(other, image)
        assert len(found) == len(cells) >= 3
        torch.testing.assert_close(found.boxes, cells.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, cells.scores, atol=1e-4, rtol=0)
        differing = (found.masks.label_image() > 0) != (cells.masks.label_image() > 0)
        assert np.count_nonzero(differing) <= 2
    with pytest.raises(ValueError, match="model.onnx is not the dense part of this model"):
        with_onnx(tiny_network(), file)
    (tmp_path / "no.onnx").write_text("nothing")
    with pytest.raises(ValueError, match="no.onnx cannot be read as ONNX"):
        with_onnx(model, tmp_path / "no.onnx")


def test_onnxruntime_runs_the_dense_part_until_weights_change(model):
    pytest.importorskip("onnxruntime")
    own, model, image = model, copy.deepcopy(model), drawn_image(50, 70)
    weights = own.state_dict()

    def maps_of(batch):
        maps, crop_maps = model.maps(batch)
        kinds = ("heatmap", "single_offset", "group_offset")
        return [part.numpy() for part in (*(getattr(scale, kind) for scale in maps for kind in kinds), *crop_maps)]

    for _ in range(2):  # the second time it traces the network again, not the library in its place
        run_by_onnxruntime(model)
        assert_same_maps(own, maps_of)
    cells, found = predict(own, image), predict(model, image)
    assert len(found) == len(cells) >= 3
    torch.testing.assert_close(found.boxes, cells.boxes, atol=1e-3, rtol=0)
    assert "maps" in vars(model.eval())
    model.load_state_dict({name: torch.zeros_like(value) for name, value in weights.items()})
    (scale,), _ = model.maps(torch.ones(1, 3, 32, 32))
    assert not scale.heatmap.any()
    model.load_state_dict(weights)
    run_by_onnxruntime(model)
    model.train()
    assert "maps" not in vars(model)
    with pytest.raises(ValueError, match="expected a keypoint graph, got the method 'toy'"):
        run_by_onnxruntime(ToyNet.build())


def test_predict_by_onnxruntime_gives_the_same_cells(model, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    save_model(model, tmp_path / "model.safetensors")
    write_png(tmp_path / "a.png", drawn_image(64, 96))
    options = [
        str(tmp_path / "a.png"),
        "-m",
        str(tmp_path / "model.safetensors"),
        "--device",
        "cpu",
        "--min-score",
        "0",
    ]
    for runtime in RUNTIMES:
        assert main(["predict", *options, "-o", str(tmp_path / runtime), "--save", "labels", "--runtime", runtime]) == 0
    labels = [tifffile.imread(tmp_path / runtime / "a_labels.tif") for runtime in RUNTIMES]
    assert labels[0].max() == labels[1].max() >= 3 and np.count_nonzero((labels[0] > 0) != (labels[1] > 0)) <= 2
    runs = [json.loads((tmp_path / runtime / "run.json").read_text()) for runtime in RUNTIMES]
    assert [run["settings"]["runtime"] for run in runs] == list(RUNTIMES)
    assert ["onnxruntime" in run["versions"] for run in runs] == [False, True]
    predictor = FilePredictor(tmp_path / "model.safetensors", Settings(runtime="onnxruntime"), "cpu")
    with torch.no_grad():
        (scale,), _ = predictor.network.maps(torch.zeros(1, 3, 32, 32))
    assert scale.heatmap.shape == (1, 5, 16, 16) and "maps" in vars(predictor.network)


def test_a_runtime_that_cannot_be_had_is_answered(monkeypatch, tmp_path):
    with pytest.raises(SettingError, match="runtime: expected pytorch or onnxruntime, got 'openvino'"):
        Settings(runtime="openvino")
    with pytest.raises(SettingError, match="runtime, fast: onnxruntime has no 16-bit numbers"):
        Settings(runtime="onnxruntime", fast=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="onnxruntime is not installed: pip install"):
        Settings(runtime="onnxruntime")
    monkeypatch.undo()
    save_model(tiny_network(), tmp_path / "model.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(SettingError, match="runtime: onnxruntime runs on the CPU here, not on meta; add --device cpu"):
        FilePredictor(tmp_path / "model.safetensors", Settings(runtime="onnxruntime"), "meta")


def test_an_exported_program_gives_the_same_maps(model, tmp_path):
    save_program(model, tmp_path / "model.pt2")
    extra = {"kg_detectron": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["kg_detectron"]) == model.description()
    assert_same_maps(model, program.module())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-o a.onnx --format torch-export", "--output: expected a name that ends in .pt2, got a.onnx"),
        ("-o a.h5", "--output: expected a name that ends in .safetensors, .pt, .pth, .onnx, .pt2, .zip, got a.h5"),
        ("-o a.onnx --half", "--half, --format: onnx holds weights of 32 bits"),
        ("-o a.pt2 --half", "--half, --format: torch-export holds weights of 32 bits"),
    ],
)
def test_options_that_do_not_fit_are_answered(options, message, capsys):
    assert main(["export", "nuclei", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("kg_detectron.cli.export.find_spec", lambda name: None)
    assert main(["export", "nuclei", "-o", "a.onnx"]) == 2
    assert "onnx needs onnx and onnxscript: pip install 'kg_detectron[onnx]'" in capsys.readouterr().err


def test_other_methods_are_refused(tmp_path):
    toy = ToyNet.build(ToyNet.Settings())
    for save in (save_onnx, save_program):
        with pytest.raises(ValueError, match="expected a keypoint graph, got the method 'toy'"):
            save(toy, tmp_path / "a")

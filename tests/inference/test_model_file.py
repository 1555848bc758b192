"""``kg-detectron export``: a training run becomes one file with the same predictions."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from builders import drawn_image, tiny_network

from kg_detectron.cli.main import main
from kg_detectron.inference import export_run, kept_models, load_model, predict, save_model
from kg_detectron.io.coco import encode_mask
from kg_detectron.metrics import mask_iou
from kg_detectron.modeling import KeypointGraphNet
from kg_detectron.synthetic import nuclei_image

IMAGE = drawn_image(50, 70)
PIXELS = {"pixel_mean": (100.0, 110.0, 120.0), "pixel_std": (50.0, 60.0, 70.0)}


def network(seed: int = 0, **changes) -> KeypointGraphNet:
    return tiny_network(seed, **{"cut_from": "s1", **PIXELS, **changes}).eval()


def write_checkpoint(path: Path, model: KeypointGraphNet) -> None:
    """As training leaves it: the network inside another model, the optimiser, tensors that are not contiguous."""
    weights = model.to(memory_format=torch.channels_last).state_dict()
    optimiser = {"state": {0: {"exp_avg": torch.zeros(1000)}}}
    content = {"model": {f"network.{name}": value for name, value in weights.items()}, "optimizer": optimiser}
    torch.save(content | {"kg_detectron": model.description()}, path)


def assert_same_predictions(model: KeypointGraphNet, other: KeypointGraphNet) -> None:
    expected, cells = predict(model, IMAGE), predict(other, IMAGE)
    assert len(expected) > 0 and torch.equal(cells.boxes, expected.boxes)
    assert torch.equal(cells.scores, expected.scores) and cells.masks.rle() == expected.masks.rle()


@pytest.mark.parametrize(("ending", "cut_from"), [(".safetensors", "features"), (".pt", "s1")])
def test_the_exported_model_predicts_the_same(tmp_path, capsys, ending, cut_from):
    model = network(cut_from=cut_from)
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run / "model_best.pth", model)
    write_checkpoint(run / "model_final.pth", network(1, cut_from=cut_from))
    output = tmp_path / "models" / f"nuclei{ending}"
    assert main(["export", str(run), "-o", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "model_best.pth" in shown and f"SHA-256 {hashlib.sha256(output.read_bytes()).hexdigest()}" in shown
    other = load_model(output)
    assert_same_predictions(load_model(run / "model_best.pth"), other)
    assert other.settings == model.settings and other.preprocessing.pixel_mean == PIXELS["pixel_mean"]
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode == (run / "model_best.pth").stat().st_mode  # readable for others too
    content = output.read_bytes()
    assert main(["export", str(run), "-o", str(output)]) == 0 and output.read_bytes() == content


def test_without_a_best_model_the_final_one_is_taken_and_a_checkpoint_may_be_named(tmp_path):
    write_checkpoint(tmp_path / "model_final.pth", network(1))
    assert export_run(tmp_path, tmp_path / "a.safetensors") == tmp_path / "model_final.pth"
    write_checkpoint(tmp_path / "model_0000007.pth", network(2))
    export_run(tmp_path / "model_0000007.pth", tmp_path / "b.pt")
    assert_same_predictions(network(1), load_model(tmp_path / "a.safetensors", channels_last=False))
    assert_same_predictions(network(2), load_model(tmp_path / "b.pt", channels_last=False))


def test_the_description_stands_in_the_metadata(tmp_path):
    save_model(network(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        description = json.loads(file.metadata()["kg_detectron"])
    assert description == json.loads(json.dumps(network().description()))
    preprocessing = description["settings"]["preprocessing"]
    assert preprocessing["pixel_mean"] == [100.0, 110.0, 120.0] and preprocessing["size"] == [64, 96]


def test_half_the_size(tmp_path):
    model = network()
    for ending in (".safetensors", ".pt"):
        save_model(model, tmp_path / f"full{ending}")
        save_model(model, tmp_path / f"half{ending}", half=True)
        sizes = [(tmp_path / f"{name}{ending}").stat().st_size for name in ("half", "full")]
        assert sizes[0] < 0.6 * sizes[1]
        state = load_model(tmp_path / f"half{ending}").state_dict()
        for name, value in model.state_dict().items():
            assert state[name].dtype == value.dtype
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-6)
    model.backbone.state_dict()[next(name for name in model.backbone.state_dict() if "running_var" in name)][0] = 1e6
    with pytest.raises(ValueError, match="running_var.*16 bits"):
        save_model(model, tmp_path / "lost.pt", half=True)
    assert not (tmp_path / "lost.pt").exists()


def test_bad_input_is_named(tmp_path, capsys):
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "a.pt")]) == 2
    assert "neither model_best.pth nor model_final.pth" in capsys.readouterr().err
    write_checkpoint(tmp_path / "model_final.pth", network())
    with pytest.raises(ValueError, match="output.*model.onnx"):
        export_run(tmp_path, tmp_path / "model.onnx")
    torch.save({"model": {"roi_heads.box_head.fc1.weight": torch.zeros(1)}}, tmp_path / "model_best.pth")
    with pytest.raises(ValueError, match=r"model_best\.pth does not describe"):
        export_run(tmp_path, tmp_path / "a.pt")
    for content in (b"", b"no model", b"\xff" * 100):
        (tmp_path / "broken.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.safetensors (is no model file|cannot be read)"):
            load_model(tmp_path / "broken.safetensors")
    save_model(network(), tmp_path / "whole.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read"):
        load_model(tmp_path / "broken.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not describe"):
        load_model(tmp_path / "other.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "json.safetensors", {"kg_detectron": "{"})
    with pytest.raises(ValueError, match=r"json\.safetensors cannot be read"):
        load_model(tmp_path / "json.safetensors")


# Files of version 0.1


def format_1(model: KeypointGraphNet, **arguments) -> dict:
    """The content of a file of version 0.1 with the weights of a model of today."""
    names = {"segmentation.project.": "mask_head.starts.", "segmentation.": "mask_head."}
    names |= {"keypoint_branch.trunk.steps.": "keypoint_branch.steps."}
    weights = {}
    for name, value in model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(prefix, "") + name.removeprefix(prefix)] = value
    network = {"depth": 18, "norm": "BN", "c0_channels": 4, "widths": [4, 6, 8, 8], "head_kernel": 3, "radius": 3.0}
    network |= {"peak_threshold": 0.0, "input_size": [64, 96]} | arguments
    return {"model": weights, "kg_detectron": {"model": network}}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ({"branch": "paper", "segmentation": "branch"}, {"cut_from": "features"}),
        ({"segmentation": "s1", "scales": [1, 2], "hops": 2}, {"cut_from": "s1", "scales": (1, 2), "hops": 2}),
        (
            {"branch": "lite", "nms_threshold": 0.7, "overlap_sigma": 0.05, "blur_weight": 1.0},
            {"trunk": "lite", "heads": "lite", "nms_threshold": 0.7, "overlap_sigma": 0.05, "blur_weight": 1.0},
        ),
        (
            {"mask_margin": 2.0, "pixels_in_flight": 5000, "normalisation": "percentile", "percentiles": [2.0, 99.0]},
            {"mask_margin": 2.0, "chunk_pixels": 5000, "normalisation": "percentile", "percentiles": (2.0, 99.0)}
            | {"box_jitter": 0.2},
        ),
    ],
)
def test_files_of_version_0_1_are_read(tmp_path, arguments, changes, trained):
    """Model files, and the checkpoints of trainings, which had the names of Detectron2's modules."""
    model = tiny_network(**changes).eval()
    content = format_1(model, **arguments)
    if trained:
        parts = {"keypoint_branch.": "proposal_generator.branch.", "mask_head.": "roi_heads.mask_head."}
        for old, new in parts.items():
            content["model"] = {
                new + name.removeprefix(old) if name.startswith(old) else name: value
                for name, value in content["model"].items()
            }
    torch.save(content, tmp_path / "old.pth")
    other = load_model(tmp_path / "old.pth", channels_last=False)
    assert other.settings == model.settings
    assert_same_predictions(model, other)


def test_the_kept_models_are_read():
    """All of them, by name and by path, calibrated, of a size that is known; they find drawn nuclei."""
    assert {"nuclei", "cells"} <= kept_models().keys()
    for name, path in kept_models().items():
        model = load_model(name)
        assert not model.training and model.description() == load_model(path).description()
        assert 0.2 < model.threshold < 0.8 and len(model.preprocessing.diameters) == 5
        assert path.stat().st_size < 20e6
    model = load_model("nuclei")
    image, masks = nuclei_image(np.random.default_rng(0), 256, 256, 20)
    overlap = mask_iou(predict(model, image).masks.rle(), [encode_mask(mask) for mask in masks])
    assert (overlap.max(axis=0) > 0.7).mean() > 0.8


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device: expected cpu, cuda, cuda:1 or mps, got 'gpu'"),
        ("CPU", "device: expected cpu, cuda, cuda:1 or mps, got 'CPU'"),
        (None, "device: expected cpu, cuda, cuda:1 or mps, got None"),
        ("mps", "device: mps cannot be used: "),
        ("cuda:99", "device: cuda:99 cannot be used: "),
    ],
)
def test_a_device_that_is_not_there_is_named(device: str | None, message: str):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"^{message}"):
        load_model("nuclei", device)


def test_commands_name_a_wrong_device_as_it_was_typed(tmp_path, capsys):
    for command in (["train", "images", "masks"], ["rerun", str(tmp_path)]):
        assert main([*command, "-o", str(tmp_path / "out"), "--device", "gpu"]) == 2
        assert capsys.readouterr().err.endswith("--device: expected cpu, cuda, cuda:1 or mps, got 'gpu'\n")

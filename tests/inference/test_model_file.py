"""``kg-detectron export``: a training run becomes one file with the same predictions."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from kg_detectron.cli.main import main
from kg_detectron.inference import export_run, load_model, predict, save_model
from kg_detectron.modeling import KeypointGraphNet

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def network(seed: int = 0, segmentation: str = "s1") -> KeypointGraphNet:
    torch.manual_seed(seed)
    arguments = {"depth": 18, "norm": "BN", "c0_channels": 4, "widths": (4, 6, 8, 8), "head_kernel": 3}
    pixels = {"pixel_mean": (100.0, 110.0, 120.0), "pixel_std": (50.0, 60.0, 70.0)}
    return KeypointGraphNet(
        **arguments, **pixels, segmentation=segmentation, peak_threshold=0.0, input_size=(64, 96)
    ).eval()


def write_checkpoint(path: Path, model: KeypointGraphNet) -> None:
    """As training leaves it: Detectron2's names, the optimiser, tensors that are not contiguous."""
    names = {"keypoint_branch.": "proposal_generator.branch.", "mask_head.": "roi_heads.mask_head."}
    state = {}
    for name, value in model.to(memory_format=torch.channels_last).state_dict().items():
        for own, theirs in names.items():
            name = theirs + name.removeprefix(own) if name.startswith(own) else name
        state[name] = value
    optimiser = {"state": {0: {"exp_avg": torch.zeros(1000)}}}
    torch.save({"model": state, "optimizer": optimiser, "kg_detectron": {"model": model.arguments}}, path)


def assert_same_predictions(model: KeypointGraphNet, other: KeypointGraphNet) -> None:
    expected, found = predict(model, IMAGE), predict(other, IMAGE)
    assert len(expected["boxes"]) > 0 and torch.equal(found["boxes"], expected["boxes"])
    assert torch.equal(found["scores"], expected["scores"]) and found["masks"].rle() == expected["masks"].rle()


@pytest.mark.parametrize(("ending", "segmentation"), [(".safetensors", "branch"), (".pt", "s1")])
def test_the_exported_model_predicts_the_same(tmp_path, capsys, ending, segmentation):
    model = network(segmentation=segmentation)
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run / "model_best.pth", model)
    write_checkpoint(run / "model_final.pth", network(1, segmentation))
    output = tmp_path / "models" / f"nuclei{ending}"
    assert main(["export", str(run), "-o", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "model_best.pth" in shown and f"SHA-256 {hashlib.sha256(output.read_bytes()).hexdigest()}" in shown
    other = load_model(output)
    assert_same_predictions(load_model(run / "model_best.pth"), other)
    assert torch.equal(other.pixel_mean, model.pixel_mean) and torch.equal(other.pixel_std, model.pixel_std)
    assert other.input_size == (64, 96)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode == (run / "model_best.pth").stat().st_mode  # readable for others too
    before = output.read_bytes()
    assert main(["export", str(run), "-o", str(output)]) == 0 and output.read_bytes() == before


def test_without_a_best_model_the_final_one_is_taken_and_a_checkpoint_may_be_named(tmp_path):
    write_checkpoint(tmp_path / "model_final.pth", network(1))
    assert export_run(tmp_path, tmp_path / "a.safetensors") == tmp_path / "model_final.pth"
    write_checkpoint(tmp_path / "model_0000007.pth", network(2))
    export_run(tmp_path / "model_0000007.pth", tmp_path / "b.pt")
    assert_same_predictions(network(1), load_model(tmp_path / "a.safetensors"))
    assert_same_predictions(network(2), load_model(tmp_path / "b.pt"))


def test_the_description_stands_in_the_metadata(tmp_path):
    save_model(network(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        description = json.loads(file.metadata()["kg_detectron"])["model"]
    assert description["pixel_mean"] == [100.0, 110.0, 120.0] and description["input_size"] == [64, 96]


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
        with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read"):
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

"""Model files and prediction with the core alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.io.images import read_image
from kg_detectron.metrics import mask_iou
from kg_detectron.modeling import KeypointGraphNet

ROOT = Path(__file__).parents[2]


def network() -> KeypointGraphNet:
    torch.manual_seed(0)
    arguments = {"depth": 18, "norm": "GN", "c0_channels": 4, "widths": (4, 6, 8, 8), "head_kernel": 3}
    return KeypointGraphNet(**arguments, segmentation="s1", peak_threshold=0.0, input_size=(32, 48)).eval()


IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def test_a_saved_model_predicts_the_same(tmp_path):
    model = network()
    save_model(model, tmp_path / "model.pth")
    other = load_model(tmp_path / "model.pth")
    assert other.arguments == model.arguments and not other.training
    expected, found = predict(model, IMAGE), predict(other, IMAGE)
    assert len(found["boxes"]) > 0
    assert torch.equal(found["boxes"], expected["boxes"]) and found["masks"].rle() == expected["masks"].rle()
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_a_model_keeps_its_normalisation(tmp_path):
    """Files from before there was a choice have the fixed one."""
    model = network()
    save_model(model, tmp_path / "fixed.pth")
    content = torch.load(tmp_path / "fixed.pth", weights_only=True)
    content["kg_detectron"]["model"] |= {"normalisation": "percentile", "percentiles": [5.0, 95.0]}
    torch.save(content, tmp_path / "percentile.pth")
    for name in ("normalisation", "percentiles"):
        del content["kg_detectron"]["model"][name]
    torch.save(content, tmp_path / "old.pth")
    fixed, old, percentile = (load_model(tmp_path / f"{name}.pth") for name in ("fixed", "old", "percentile"))
    assert (old.normalisation, percentile.percentiles) == ("fixed", (5.0, 95.0))
    expected = predict(percentile, IMAGE)
    assert torch.equal(predict(old, IMAGE)["scores"], predict(fixed, IMAGE)["scores"])
    assert not torch.equal(expected["scores"], predict(fixed, IMAGE)["scores"])
    other_range = predict(percentile, (IMAGE.astype(np.float32) - 1000) * 8)
    assert torch.equal(other_range["scores"], expected["scores"])


def test_a_model_is_loaded_in_the_mode_that_was_asked_for(tmp_path):
    save_model(network(), tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth", precision="bfloat16", channels_last=True)
    assert model.precision == "bfloat16" and len(predict(model, IMAGE)["boxes"]) > 0
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="precision"):
        load_model(tmp_path / "model.pth", precision="int8")


@pytest.mark.cuda
def test_gpu_and_cpu_find_the_same(shared):
    """The tolerance that README states, on real images."""
    files = sorted((shared / "dsb2018" / "val").glob("*.png"))[:4]
    on_cpu, on_gpu = (load_model(ROOT / "models" / "kg_lite_dsb2018.safetensors", device) for device in ("cpu", "cuda"))
    total = agreeing = 0
    for file in files:
        expected, found = predict(on_cpu, read_image(file)), predict(on_gpu, read_image(file))
        distance = torch.cdist(expected["boxes"], found["boxes"].cpu(), p=torch.inf)
        ratio = found["scores"].cpu() / expected["scores"][:, None]
        alike = (distance < 0.05) & ((ratio - 1).abs() < 0.01)
        total += max(distance.shape)
        agreeing += int(alike.any(1).sum())
    assert agreeing >= 0.99 * total > 0


def test_results_are_in_the_frame_of_the_image():
    found = predict(network(), IMAGE)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"][:, 2] <= 70).all() and (found["boxes"][:, 3] <= 50).all()
    for (x1, y1, x2, y2), window in zip(found["boxes"].tolist(), found["masks"].windows.tolist(), strict=True):
        assert np.abs(np.array([x1, y1, x2, y2]) - window).max() <= 1.5


def test_bad_files_and_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        load_model(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no model")
    with pytest.raises(ValueError, match="text.pth"):
        load_model(tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.pth"):
        load_model(tmp_path / "empty.pth")
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not describe"):
        load_model(tmp_path / "other.pth")
    model = network()
    torch.save({"model": {}, "kg_detectron": {"model": model.arguments}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth.*do not fit"):
        load_model(tmp_path / "weights.pth")
    torch.save({"model": {}, "kg_detectron": {"model": {"colour": 1}}}, tmp_path / "arguments.pth")
    with pytest.raises(ValueError, match="arguments.pth.*colour"):
        load_model(tmp_path / "arguments.pth")
    described = {"model": model.state_dict(), "kg_detectron": {"model": model.arguments | {"normalisation": "none"}}}
    torch.save(described, tmp_path / "levels.pth")
    with pytest.raises(ValueError, match="levels.pth.*normalisation.*'none'"):
        load_model(tmp_path / "levels.pth")
    with pytest.raises(ValueError, match="image"):
        predict(model, IMAGE[..., 0])
    with pytest.raises(ValueError, match="eval"):
        predict(model.train(), IMAGE)


def test_the_model_that_comes_with_the_project_finds_nuclei(shared):
    """At the figures of its card: F1 of 0.80 over all validation images."""
    model = load_model(ROOT / "models" / "kg_lite_dsb2018.safetensors")
    assert model.normalisation == "percentile" and model.input_size == (512, 512)
    cells = predict(model, read_image(shared / "dsb2018" / "val" / "9e4f8ec60a0d622a.png"))
    truths = json.loads((shared / "dsb2018" / "instances_val.json").read_text())
    (image,) = [one["id"] for one in truths["images"] if one["file_name"].endswith("9e4f8ec60a0d622a.png")]
    masks = [one["segmentation"] for one in truths["annotations"] if one["image_id"] == image]
    overlap = mask_iou(cells["masks"][cells["scores"] >= 0.004].rle(), masks)
    assert (overlap.max(axis=1) > 0.5).mean() > 0.7 and (overlap.max(axis=0) > 0.5).mean() > 0.6

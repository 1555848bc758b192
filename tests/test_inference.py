"""Model files and prediction with the core alone."""

import numpy as np
import pytest
import torch

from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.modeling import KeypointGraphNet


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

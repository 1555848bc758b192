"""tools/convert_torchvision_weights.py: torchvision's ResNets in Detectron2."""

from pathlib import Path

import convert_torchvision_weights as tool
import pytest
import torch
import torchvision
from builders import load_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn


def random_resnet(depth: int) -> nn.Module:
    """With running statistics and affine weights of the norm layers unlike each other and unlike the defaults."""
    torch.manual_seed(depth)
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    "depth, config, norm",
    [
        (18, "mask_rcnn_fpn_r18_dsb2018_cpu", "FrozenBN"),
        (50, "mask_rcnn_fpn_dsb2018", "BN"),
        (50, "mask_rcnn_c4_dsb2018", "FrozenBN"),
    ],
)
@torch.no_grad()
def test_same_features(tmp_path, depth, config, norm):
    source = random_resnet(depth)
    torch.save(source.state_dict(), tmp_path / "torchvision.pth")
    tool.main([str(tmp_path / "torchvision.pth"), str(tmp_path / "R.pth")])
    model = build_model(load_config(config, "MODEL.RESNETS.NORM", norm))
    DetectionCheckpointer(model).load(str(tmp_path / "R.pth"))  # a part of the weights, to train with
    model.eval()

    image = torch.randn(1, 3, 64, 96)
    expected = {}
    x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
    for stage in (2, 3, 4, 5):
        x = expected[f"res{stage}"] = getattr(source, f"layer{stage - 1}")(x)
    # The C4 backbone ends at res4; its res5 is in the ROI heads. FPN's has all of them below it.
    resnet = getattr(model.backbone, "bottom_up", model.backbone)
    x = resnet.stem(image)
    for stage in (2, 3, 4, 5):
        x = getattr(resnet if hasattr(resnet, f"res{stage}") else model.roi_heads, f"res{stage}")(x)
        assert (x - expected[f"res{stage}"]).abs().max() <= 1e-5 * x.abs().max()
    assert set(resnet(image)) <= set(expected)


def test_file_is_plain(tmp_path):
    source = random_resnet(18).state_dict()
    torch.save(source, tmp_path / "torchvision.pth")
    tool.main([str(tmp_path / "torchvision.pth"), str(tmp_path / "R-18.pth")])
    checkpoint = torch.load(tmp_path / "R-18.pth", weights_only=True)
    assert checkpoint["matching_heuristics"] is True
    model = checkpoint["model"]
    assert torch.equal(model["stem.conv1.norm.running_var"], source["bn1.running_var"])
    assert torch.equal(model["res3.0.shortcut.norm.bias"], source["layer2.0.downsample.1.bias"])
    left_out = [key for key in source if key.startswith("fc.") or key.endswith("num_batches_tracked")]
    assert len(model) == len(source) - len(left_out)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_depth_is_recognised(depth):
    with torch.device("meta"):
        state_dict = getattr(torchvision.models, f"resnet{depth}")(weights=None).state_dict()
    assert tool.resnet_depth(state_dict) == depth


def test_wrong_depth():
    with torch.device("meta"):
        state_dict = torchvision.models.resnet34(weights=None).state_dict()
    with pytest.raises(ValueError, match="depth 50 .* ResNet-34"):
        tool.convert(state_dict, 50)


def test_member_of_the_enums(monkeypatch, tmp_path):
    asked = []
    source = random_resnet(18).state_dict()

    def get_state_dict(self, *args, **kwargs):
        asked.append(str(self))
        return source

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    tool.main(["ResNet18_Weights.IMAGENET1K_V1", str(tmp_path / "R-18.pth")])
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"]
    assert "stem.conv1.weight" in torch.load(tmp_path / "R-18.pth", weights_only=True)["model"]


@pytest.mark.parametrize(
    "weights, output, message",
    [
        ("ResNet18_Weights.NOTHING", "R.pth", "'ResNet18_Weights.NOTHING' is neither a file nor a member"),
        ("absent.pth", "R.pth", "'absent.pth' is neither a file nor a member"),
        ("other.pth", "R.pth", "not the weights of a torchvision ResNet"),
        ("other.pth", "R.pkl", "output must end in .pth, got R.pkl"),
    ],
)
def test_bad_arguments(weights, output, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    with pytest.raises(SystemExit):
        tool.main([weights, output])
    assert message in capsys.readouterr().err
    assert not Path(output).exists()

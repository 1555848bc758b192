"""Backbones of timm: strides, weights, gradients, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import box_example, drawn_image, tiny_network

from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.modeling import BackboneSettings
from kg_detectron.modeling.backbone import build_backbone
from kg_detectron.modeling.timm_backbone import TimmBackbone

timm = pytest.importorskip("timm", reason="timm is not installed")

# One that drops its last stage and one whose last stages give no map: both without squeeze and excitation.
NAMES = ("resnet10t", "tf_efficientnet_lite0")


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_their_strides_and_every_parameter_learns(name):
    backbone = build_backbone(BackboneSettings(f"timm/{name}", c0_channels=5))
    features = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(map_.shape[1:]) for map_ in features] == [
        (channels, 64 >> level, 96 >> level) for level, channels in enumerate(backbone.channels)
    ]
    sum(map_.sum() for map_ in features).backward()
    missing = [key for key, value in backbone.named_parameters() if value.grad is None]
    assert not missing
    assert all(value.requires_grad for value in backbone.parameters())


def test_the_maps_are_those_of_timm():
    torch.manual_seed(0)
    backbone = TimmBackbone("resnet10t", 4).eval()
    whole = timm.create_model("resnet10t", features_only=True).eval()
    whole.load_state_dict(backbone.body.state_dict(), strict=False)
    image = torch.rand(1, 3, 64, 64)
    whole_maps = whole(image)
    assert len(whole_maps) == 5
    for one, other in zip(backbone.deep_features(image), whole_maps, strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_come_from_a_file_and_are_flipped(tmp_path: Path, ending: str):
    torch.manual_seed(1)
    donor = timm.create_model("resnet10t").eval()
    file = tmp_path / f"weights{ending}"
    (torch.save if ending == ".pth" else safetensors.torch.save_file)(donor.state_dict(), str(file))
    backbone = build_backbone(BackboneSettings("timm/resnet10t", backbone_weights=str(file))).eval()
    image = torch.rand(1, 3, 64, 64)
    stem = donor.act1(donor.bn1(donor.conv1(image)))
    torch.testing.assert_close(backbone.deep_features(image.flip(1))[0], stem)
    with pytest.raises(ValueError, match="does not fit timm/tf_efficientnet_lite0"):
        TimmBackbone("tf_efficientnet_lite0", weights=str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "timm/no_such_network"}, "backbone: expected timm/ and a network of timm"),
        ({"backbone": "timm/hf-hub:somebody/something"}, "backbone: expected timm/ and a network of timm"),
        ({"backbone": "timm/convnext_atto"}, r"strides 2, 4, 8, 16, got .*\[4, 8, 16, 32\]"),
        ({"backbone": "timm/resnet10t", "norm": "GN"}, "norm: expected BN"),
    ],
)
def test_what_does_not_go_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneSettings(**settings))
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        TimmBackbone("resnet10t", weights="nowhere.pth")


def test_without_timm_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package timm: pip install"):
        build_backbone(BackboneSettings("timm/resnet10t"))


def test_a_network_trains_is_saved_and_predicts_images_that_are_not_tiled(tmp_path: Path):
    model = tiny_network(backbone="timm/resnet10t", resize="isotropic")
    image, target = box_example(64, 96, [[4, 5, 40, 50]])
    sum(model([image], [target]).values()).backward()
    save_model(model.eval(), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    pixels = drawn_image(64, 96)
    cells = predict(loaded, pixels, scale=1)
    assert len(cells) and np.allclose(cells.boxes, predict(model, pixels, scale=1).boxes)
    with pytest.raises(ValueError, match="tile: the backbone timm/resnet10t.*96 or more.*got 64"):
        predict(loaded, pixels, scale=1, tile=64)

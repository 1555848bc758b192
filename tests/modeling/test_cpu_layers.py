"""The convolutions for training on a CPU give what PyTorch's give."""

import copy

import pytest
import torch
from torch import nn

from kg_detectron.modeling.cpu_layers import DepthwiseConv2d, PointwiseConv2d, use_cpu_layers


def depthwise(channels: int, kernel: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, groups=channels, **{"bias": False, "padding": kernel // 2, **options})


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(5, 7, 1), PointwiseConv2d),
        (nn.Conv2d(7, 3, 1, bias=False), PointwiseConv2d),
        (nn.Conv2d(3, 3, 1, stride=2), nn.Conv2d),
        (depthwise(16, 7), DepthwiseConv2d),
        (depthwise(21, 5, stride=2, padding=0), DepthwiseConv2d),
        (depthwise(16, 3), nn.Conv2d),
        (depthwise(16, 7, bias=True), nn.Conv2d),
        (depthwise(16, 5, dilation=2), nn.Conv2d),
        (depthwise(16, 5, padding_mode="reflect"), nn.Conv2d),
        (depthwise(16, 5, padding="same"), nn.Conv2d),
        (nn.Conv2d(4, 4, (5, 7), groups=4, bias=False), nn.Conv2d),
        (nn.Conv2d(4, 8, 5, groups=4, bias=False), nn.Conv2d),
        (nn.Conv2d(4, 4, 5, groups=2, bias=False), nn.Conv2d),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_values_and_gradients_are_the_same(layer: nn.Conv2d, kind: type, channels_last: bool) -> None:
    plain, fast = copy.deepcopy(layer).double(), nn.Sequential(copy.deepcopy(layer).double())
    use_cpu_layers(fast)
    assert type(fast[0]) is kind and list(fast[0].state_dict()) == list(plain.state_dict())
    values = torch.rand(2, layer.in_channels, 12, 9, dtype=torch.float64, requires_grad=True)
    x = values.contiguous(memory_format=torch.channels_last) if channels_last else values
    results = []
    for net in (plain, fast):
        found = net(x)
        weight = torch.linspace(0, 1, found.numel(), dtype=torch.float64).view(found.shape)
        results.append([found, *torch.autograd.grad((found * weight).sum(), [values, *net.parameters()])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_model_on_another_device_stays_as_it_is() -> None:
    net = nn.Sequential(depthwise(16, 5)).to("meta")
    use_cpu_layers(net)
    assert type(net[0]) is nn.Conv2d


def test_layers_that_are_frozen_and_maps_without_gradient() -> None:
    net = nn.Sequential(depthwise(16, 5), depthwise(16, 5))
    use_cpu_layers(net)
    image = torch.rand(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    net[0].requires_grad_(False)
    net(image).sum().backward()
    assert net[0].weight.grad is None and net[1].weight.grad is not None
    net.requires_grad_(False)
    assert not net(image).requires_grad
    with torch.no_grad():
        assert not net.requires_grad_()(image).requires_grad


def test_autocast_keeps_its_precision() -> None:
    net = nn.Sequential(depthwise(16, 5))
    use_cpu_layers(net)
    image = torch.rand(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(image)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert net[0].weight.grad.dtype == torch.float32

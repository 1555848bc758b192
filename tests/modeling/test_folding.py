"""Batch normalisation in evaluation is a part of the convolution before it."""

import pytest
import torch
from torch import nn

from kg_detectron.modeling.cpu_layers import use_cpu_layers
from kg_detectron.modeling.folding import conv_norm


def layers(bias: bool, kernel: int, groups: int) -> nn.Sequential:
    """A convolution and a norm whose statistics and weights are all different."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 12, kernel, padding=kernel // 2, bias=bias, groups=groups), nn.BatchNorm2d(12, eps=1e-3)
    for values, low in ((norm.weight, 0.2), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.1)):
        nn.init.uniform_(values, low, 2.0)
    return nn.Sequential(conv, norm)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("bias", "kernel", "groups"), [(True, 3, 1), (False, 5, 6), (True, 1, 1)])
def test_it_equals_the_two_layers(bias, kernel, groups, layout):
    pair = layers(bias, kernel, groups).double().to(memory_format=layout)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=layout)
    use_cpu_layers(pair)
    expected = pair.eval()(x)
    with torch.no_grad():
        folded = conv_norm(*pair, x)
    torch.testing.assert_close(folded, expected, rtol=1e-10, atol=1e-10)


def test_the_norm_counts_its_batches_in_training():
    pair = layers(True, 3, 1).train()
    x, before = torch.randn(2, 6, 9, 8), pair[1].running_mean.clone()
    with torch.no_grad():
        values = conv_norm(*pair, x)
    assert abs(values.mean()) < 2 and not torch.equal(pair[1].running_mean, before)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 12), nn.Identity()])
def test_other_norms_follow(norm):
    conv, x = nn.Conv2d(6, 12, 3), torch.randn(1, 6, 9, 8)
    with torch.no_grad():
        assert torch.equal(conv_norm(conv, norm.eval(), x), norm(conv(x)))

"""The gradient of a depthwise convolution in its weights, as PyTorch computes it."""

import torch
from torch import Tensor

from ..checks import check_depthwise


def depthwise_weight_gradient(input: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`layers.depthwise_weight_gradient`."""
    check_depthwise(input, gradient, kernel, stride, padding)
    channels = input.shape[1]
    weight = input.new_empty(channels, 1, kernel, kernel)
    options = [stride] * 2, [padding] * 2, [1] * 2, False, [0] * 2, channels, [False, True, False]
    return torch.ops.aten.convolution_backward(gradient, input, weight, None, *options)[1]

"""Convolutions for training on a CPU, where PyTorch is slow: 1x1 ones, and the weights' gradient of depthwise ones."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from kg_detectron.layers import depthwise_weight_gradient

# Kernels up to this side have a fast gradient in PyTorch.
FAST_KERNEL = 3


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of stride 1. Maps with the channels last become rows of pixels of one matrix product."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.is_cuda or not input.is_contiguous(memory_format=torch.channels_last):
            return super()._conv_forward(input, weight, bias)
        return linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution without bias whose weights get their gradient by `layers.depthwise_weight_gradient`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._applies_to(input):
            return super()._conv_forward(input, weight, bias)
        return _DepthwiseConvolution.apply(input, weight, self.stride[0], self.padding[0])

    def _applies_to(self, input: Tensor) -> bool:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        return input.device.type == "cpu" and input.is_contiguous(memory_format=torch.channels_last)


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return conv2d(input, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            options = [ctx.stride] * 2, [ctx.padding] * 2, [1] * 2, False, [0] * 2, len(weight), [True, False, False]
            of_input = torch.ops.aten.convolution_backward(gradient, input, weight, None, *options)[0]
        if ctx.needs_input_grad[1]:
            of_weight = depthwise_weight_gradient(input, gradient, weight.shape[2], ctx.stride, ctx.padding)
        return of_input, of_weight, None, None


def use_cpu_layers(model: nn.Module) -> None:
    """Turn the convolutions of a model on a CPU into the ones of this module where they fit, in place.

    Weights and their names stay. A model on another device stays as it is.
    """
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        return
    for layer in model.modules():
        if type(layer) is not nn.Conv2d:
            continue
        if layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1:
            layer.__class__ = PointwiseConv2d
        elif _is_depthwise(layer) and layer.kernel_size[0] > FAST_KERNEL:
            layer.__class__ = DepthwiseConv2d


def _is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution is what `layers.depthwise_weight_gradient` takes: square, without bias and dilation."""
    sides = {layer.kernel_size, layer.stride, layer.padding, layer.dilation}
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.bias is None
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and all(isinstance(side, tuple) and side[0] == side[1] for side in sides)
    )

"""1x1 convolutions as matrix products: on one CPU core PyTorch is slow with small batches of them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of stride 1. Maps with the channels last become rows of pixels of one matrix product."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.is_cuda or not input.is_contiguous(memory_format=torch.channels_last):
            return super()._conv_forward(input, weight, bias)
        return linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def use_matrix_products(model: nn.Module) -> None:
    """Turn the 1x1 convolutions of a model into `PointwiseConv2d`, in place. Weights and their names stay."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1:
            layer.__class__ = PointwiseConv2d

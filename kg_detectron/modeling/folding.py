"""Convolution and batch normalisation in one, which saves a pass over the maps in evaluation."""

import torch
from torch import Tensor, nn


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, in evaluation as one convolution, equal up to rounding.

    The weights are folded anew each time, which costs next to nothing beside the maps: the modules stay as they are for
    training and for model files.

    Args:
        conv: convolution.
        norm: the norm layer behind it; any but a batch normalisation in evaluation just follows.
        x: (N, C, h, w).
    """
    if norm.training or type(norm) is not nn.BatchNorm2d or torch.is_grad_enabled():
        return norm(conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], bias)

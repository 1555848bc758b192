"""Depthwise convolutions with a faster gradient of the weights on CPUs.

oneDNN takes three times as long for the weight gradient of a 7x7 kernel as for the forward pass.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SOURCE = Path(__file__).parents[1] / "layers" / "csrc" / "cpu" / "depthwise_weight_gradient.cpp"


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, None, 1, weight.shape[2] // 2, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        pad = weight.shape[2] // 2
        of_input, _, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, (1, 1), (pad, pad), (1, 1), False, (0, 0), len(weight), (True, False, False)
        )
        return of_input, torch.ops.kg_detectron.depthwise_weight_gradient(x, gradient, weight.shape[2])


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps the size, without bias, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        if x.is_cuda or x.dtype != torch.float32 or not torch.is_grad_enabled():
            return super().forward(x)
        return _DepthwiseConvolution.apply(x, self.weight)


def use_fast_gradients(model: nn.Module) -> bool:
    """Turn depthwise convolutions with 5x5 and 7x7 kernels into `DepthwiseConv2d`, in place. Weights stay.

    The operator is compiled if the installed package does not have it.

    Returns:
        Whether it is available: False without a C++ compiler.
    """
    if not hasattr(torch.ops.kg_detectron, "depthwise_weight_gradient"):
        from torch.utils.cpp_extension import load

        try:
            load("kg_detectron_depthwise", [str(_SOURCE)], extra_cflags=["-O3"], is_python_module=False)
        except (OSError, RuntimeError):
            return False
    for layer in model.modules():
        if type(layer) is not nn.Conv2d:
            continue
        kernel = layer.kernel_size[0]
        if (
            kernel in (5, 7)
            and layer.kernel_size == (kernel, kernel)
            and layer.groups == layer.in_channels == layer.out_channels
            and layer.in_channels % 8 == 0
            and layer.stride == layer.dilation == (1, 1)
            and layer.padding == (kernel // 2, kernel // 2)
            and layer.bias is None
        ):
            layer.__class__ = DepthwiseConv2d
    return True

"""The gradient of a depthwise convolution in its weights: against loops, autograd, and input that does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

from kg_detectron import layers
from kg_detectron.layers import reference

both = pytest.mark.parametrize("ops", [layers, reference], ids=["layers", "reference"])


def by_loops(image: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    result = torch.zeros(image.shape[1], 1, kernel, kernel, dtype=torch.float64)
    for n, c, y, x in torch.cartesian_prod(*map(torch.arange, gradient.shape)).tolist():
        for i in range(kernel):
            for j in range(kernel):
                row, column = y * stride + i - padding, x * stride + j - padding
                if 0 <= row < image.shape[2] and 0 <= column < image.shape[3]:
                    result[c, 0, i, j] += gradient[n, c, y, x] * image[n, c, row, column]
    return result


@both
def test_equals_plain_loops(ops):
    image, gradient = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)
    found = ops.depthwise_weight_gradient(image, gradient, 3, 2, 1)
    torch.testing.assert_close(found, by_loops(image, gradient, 3, 2, 1))


@both
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_equals_autograd(ops, data):
    images, channels = data.draw(st.integers(0, 3)), data.draw(st.sampled_from((1, 3, 8, 16, 21, 48)))
    kernel, stride = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, kernel + 1))
    height, width = (data.draw(st.integers(max(1, kernel - 2 * padding), 14)) for _ in range(2))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    layout = data.draw(st.sampled_from((torch.contiguous_format, torch.channels_last)))
    image = torch.randn(images, channels, height, width, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.zeros(channels, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    result = conv2d(image.double(), weight, None, stride, padding, groups=channels)
    gradient = torch.randn_like(result)
    result.backward(gradient)
    found = ops.depthwise_weight_gradient(image, gradient.to(dtype), kernel, stride, padding)
    assert found.shape == weight.shape and found.dtype == dtype
    torch.testing.assert_close(found, weight.grad.to(dtype), rtol=1e-4, atol=1e-4)


def test_sums_do_not_depend_on_the_number_of_threads():
    image, gradient = (torch.randn(3, 40, 33, 21).contiguous(memory_format=torch.channels_last) for _ in range(2))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(layers.depthwise_weight_gradient(image, gradient, 7, 1, 3))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@both
@pytest.mark.parametrize(
    ("image", "gradient", "sizes", "problem"),
    [
        ((2, 4, 8, 8), (2, 4, 8, 8), (0, 1, 1), "kernel, stride and padding: expected .* got 0, 1 and 1"),
        ((2, 4, 8, 8), (2, 4, 8, 8), (3, 0, 1), "kernel, stride and padding"),
        ((2, 4, 8, 8), (2, 4, 8, 8), (3, 1, -1), "kernel, stride and padding"),
        ((2, 4, 8, 8), (2, 4, 7, 8), (3, 1, 1), "gradient: expected .* got"),
        ((2, 4, 8, 8), (1, 4, 8, 8), (3, 1, 1), "gradient: expected .* got"),
        ((2, 4, 8, 8), (2, 3, 8, 8), (3, 1, 1), "gradient: expected 4 channels"),
        ((2, 4, 2, 8), (2, 4, 0, 6), (5, 1, 1), "gradient: expected"),
        ((4, 8, 8), (2, 4, 8, 8), (3, 1, 1), "input: expected a floating-point tensor"),
    ],
)
def test_what_does_not_fit_is_named(ops, image, gradient, sizes, problem):
    with pytest.raises(ValueError, match=problem):
        ops.depthwise_weight_gradient(torch.zeros(image), torch.zeros(gradient), *sizes)


def test_half_precision_is_summed_in_float32():
    image = torch.ones(1, 16, 80, 80, dtype=torch.bfloat16)
    assert layers.depthwise_weight_gradient(image, image, 1, 1, 0).float().eq(6400).all()

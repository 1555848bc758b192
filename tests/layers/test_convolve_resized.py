"""Convolution of resized crops: against PyTorch's own resizing and convolution, one crop at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from kg_detectron import layers
from kg_detectron.layers import ops, reference

both = pytest.mark.parametrize("ops", [layers, reference], ids=["layers", "reference"])
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


def products(crops: list[Tensor], kernel: Tensor) -> Tensor:
    """The pixels of crops [C,h,w] times the matrices of a kernel [C',C,3,3] -> [P,9,C']."""
    pixels = torch.cat([crop.flatten(1).T for crop in crops])
    return torch.einsum("pc,ocyx->pyxo", pixels, kernel).flatten(1, 2)


def tables(before: list, after: list, margin: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sizes, and places one below another with `margin` empty pixels at the right, the last crop first."""
    width = max(w for _, w in after) + margin
    height = torch.tensor([h for h, _ in after])
    bottom = height.flip(0).cumsum(0).flip(0)
    places = torch.stack((width * (bottom - height), torch.full_like(height, width)), dim=1)
    return torch.tensor(before), torch.tensor(after), places, int(bottom[0]) * width


@both
@devices
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_equals_resizing_and_convolving_each_crop(device, ops, data):
    before = data.draw(st.lists(sides, min_size=1, max_size=4))
    after = data.draw(st.lists(sides, min_size=len(before), max_size=len(before)))
    channels = data.draw(st.sampled_from((1, 3, 16, 21)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    crops = [torch.randn(4, h, w, dtype=torch.float64) for h, w in before]
    kernel = torch.randn(channels, 4, 3, 3, dtype=torch.float64)
    taken = products(crops, kernel).to(device).requires_grad_()
    *sizes, places, pixels = tables(before, after, margin=data.draw(st.integers(0, 2)))
    found = ops.convolve_resized(taken, *sizes, places, pixels).cpu()
    covered = torch.zeros(pixels, dtype=torch.bool)
    for crop, size, (first, stride) in zip(crops, after, places.tolist(), strict=True):
        resized = interpolate(crop[None], size, mode="bilinear", align_corners=False)
        expected = conv2d(resized, kernel, padding=1)[0].permute(1, 2, 0)
        index = first + stride * torch.arange(size[0])[:, None] + torch.arange(size[1])
        torch.testing.assert_close(found[index], expected)
        covered[index] = True
    assert not found[~covered].any()
    # It is linear, so its gradient is its transpose: <f(p), g> = <p, f'(g)>.
    weight = torch.randn_like(found)
    gradient = torch.autograd.grad(found, taken, weight)[0].cpu()
    taken = taken.cpu()
    torch.testing.assert_close((found * weight).sum(), (taken * gradient).sum())
    backward = reference.convolve_resized_backward(weight, len(taken), *sizes, places)
    torch.testing.assert_close(gradient, backward)
    other = torch.randn_like(taken)
    through = ops.convolve_resized(other.to(device), *sizes, places, pixels).cpu()
    torch.testing.assert_close((through * weight).sum(), (other * gradient).sum())


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions_and_layouts(device, dtype):
    *sizes, places, pixels = tables([(2, 3), (5, 4)], [(4, 5), (9, 9)])
    taken = torch.randn(9, 26, 7).transpose(0, 1).to(dtype)
    found = layers.convolve_resized(taken.to(device), *sizes, places, pixels).cpu()
    assert found.dtype == dtype
    expected = reference.convolve_resized(taken.double(), *sizes, places, pixels)
    precision = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.double(), expected, atol=precision, rtol=precision)


@both
def test_no_crops(ops):
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert torch.equal(ops.convolve_resized(torch.zeros(0, 9, 3), none, none, none, 5), torch.zeros(5, 3))


@both
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"products": torch.zeros(26, 8, 3)}, "products"),
        ({"products": torch.zeros(25, 9, 3)}, "products"),
        ({"before": torch.tensor([[2, 3], [5, 0]])}, "before"),
        ({"after": torch.tensor([[4, 5]])}, "after"),
        ({"places": torch.tensor([[0, 5], [20.0, 9]])}, "places"),
        ({"places": torch.tensor([[-1, 5], [20, 9]])}, "places"),
        ({"places": torch.tensor([[0, 4], [20, 9]])}, "places"),
        ({"pixels": 100}, "places"),
    ],
)
def test_input_that_does_not_fit_is_named(ops, change, named):
    *sizes, places, pixels = tables([(2, 3), (5, 4)], [(4, 5), (9, 9)])
    arguments = {"products": torch.zeros(26, 9, 3), "before": sizes[0], "after": sizes[1], "places": places}
    with pytest.raises(ValueError, match=named):
        ops.convolve_resized(**{**arguments, "pixels": pixels, **change})


@pytest.mark.skipif("cpu" not in ops.COMPILED_FOR, reason="the operators were not compiled; `make setup` says why")
class TestCompiled:
    @pytest.mark.parametrize("wrong", ["before", "huge", "after", "places", "far", "pixels", "products"])
    def test_a_call_past_the_wrapper_stays_inside_its_memory(self, wrong):
        before, after, places, pixels = tables([(2, 3), (5, 4)], [(4, 5), (9, 9)])
        arguments = {"products": torch.zeros(26, 9, 3), "before": before, "after": after, "places": places}
        arguments["pixels"] = pixels
        arguments |= {
            "before": {"before": before.int()},
            "huge": {"before": torch.full_like(before, 2**32)},  # whose area is 2^64, which counts as 0
            "after": {"after": after + 1},
            "places": {"places": places * 2},
            "far": {"places": torch.full_like(places, 2**62)},
            "pixels": {"pixels": 90},
            "products": {"products": before.float()},
        }[wrong]
        with pytest.raises(ValueError, match="expected"):
            torch.ops.kg_detectron.convolve_resized(*arguments.values())
        gradient = torch.zeros(90, 3)
        with pytest.raises(ValueError, match="expected"):
            torch.ops.kg_detectron.convolve_resized_backward(gradient, 26, before, after, places)

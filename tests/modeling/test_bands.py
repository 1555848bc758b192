"""Maps in bands: the values of the whole map, in less memory."""

import pytest
import torch
from torch import nn

from kg_detectron.modeling import bands
from kg_detectron.modeling.backbone import image_convolutions, image_features
from kg_detectron.modeling.efficientnet import MBConv
from kg_detectron.modeling.keypoint_graph.heads import LiteHeads
from kg_detectron.modeling.trunk import LargeKernelBlock, LiteStep


def lively(module: nn.Module) -> nn.Module:
    """Weights and statistics that are all different, in evaluation, channels last."""
    torch.manual_seed(0)
    for name, values in module.state_dict().items():
        if values.is_floating_point():
            nn.init.uniform_(values, 0.1 if "running_var" in name else -0.5, 1.0)
    return module.eval().to(memory_format=torch.channels_last)


CASES = {
    "block": lambda: (lively(LargeKernelBlock(6, 7, "BN")), 6),
    "heads": lambda: (lively(LiteHeads(6, 5, 2, "BN")), 6),
    "c0": lambda: ((lambda c0: lambda x: image_features(c0, x))(lively(image_convolutions(4))), 3),
    **{
        f"mbconv_{kernel}_{stride}_{outputs}": lambda k=kernel, s=stride, o=outputs: (lively(MBConv(8, o, 3, k, s)), 8)
        for kernel, stride, outputs in ((3, 1, 8), (5, 1, 12), (3, 2, 8), (5, 2, 12))
    },
}


def parts(result: object) -> list[torch.Tensor]:
    return [part for part in result if isinstance(part, torch.Tensor)] if isinstance(result, tuple) else [result]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("height", [64, 70])
def test_bands_give_the_values_of_the_whole(case, height, monkeypatch):
    module, channels = CASES[case]()
    x = torch.randn(1, channels, height, 20).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    monkeypatch.setattr(bands, "BAND_VALUES", 2**40)
    expected = parts(module(x))
    monkeypatch.setattr(bands, "BAND_VALUES", 1)
    for part, whole in zip(parts(module(x)), expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
        assert part.stride(1) == 1
    assert torch.equal(x, given)


@torch.no_grad()
def test_a_step_up_changes_neither_of_its_maps():
    step = lively(LiteStep(5, 7, 6, 3, "BN"))
    maps = [torch.randn(1, c, s, s).contiguous(memory_format=torch.channels_last) for c, s in ((5, 8), (7, 16))]
    given = [values.clone() for values in maps]
    step(*maps)
    assert all(map(torch.equal, maps, given))


def test_no_bands_where_gradients_several_images_or_another_layout_need_the_whole():
    x = torch.zeros(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert not bands.is_banded(x)
    with torch.no_grad():
        assert bands.is_banded(x)
        assert not bands.is_banded(x.contiguous())
        assert not bands.is_banded(torch.cat((x, x)))


@pytest.mark.parametrize("step", [1, 8])
def test_bands_cover_all_rows_once(step, monkeypatch):
    monkeypatch.setattr(bands, "BAND_VALUES", 200)
    found = list(bands.bands(30, 4, 5, step))
    assert found[0][0] == 0 and found[-1][1] == 30
    assert all(one[1] == other[0] and one[1] % step == 0 for one, other in zip(found, found[1:], strict=False))

"""Trunk: from the backbone's c4 upwards to the decoder maps s4..s1 (paper, figure 1a). All methods share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kg_detectron.modeling.backbone import NORMS, receptive_radius, zero_bias
from kg_detectron.modeling.bands import add, bands, is_banded
from kg_detectron.modeling.folding import conv_norm
from kg_detectron.modeling.settings import require

SCALES = (1, 2, 3, 4)
TRUNKS = ("paper", "lite")


@dataclass(frozen=True)
class TrunkSettings:
    """Settings of the trunk (the paper's by default).

    Attributes:
        trunk: "paper": up-sampling, conv3x3, concatenation, conv1x1; "lite": ours, of few operations, by depthwise
            convolutions with large kernels.
        widths: channels of s1, s2, s3, s4, and of the segmentation branch.
        trunk_kernel: kernel side of the depthwise convolutions of "lite", odd.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.CELLS"

    trunk: str = "paper"
    widths: tuple[int, ...] = (64, 64, 256, 512)
    trunk_kernel: int = 7

    def __post_init__(self) -> None:
        require(self.trunk in TRUNKS, "trunk", f"one of {', '.join(TRUNKS)}", self.trunk)
        require(len(self.widths) == 4 and min(self.widths) >= 1, "widths", "four positive numbers", self.widths)
        require(
            self.trunk_kernel >= 1 and self.trunk_kernel % 2 == 1, "trunk_kernel", "an odd number", self.trunk_kernel
        )


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size, initialised for a ReLU behind it."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    zero_bias(layer)
    return layer


class UpCombine(nn.Module):
    """One step up: conv3x3 on the up-sampled deep map, concatenation with the shallow one, conv1x1."""

    def __init__(self, deep: int, shallow: int, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(convolution(deep, width, 3), nn.ReLU(inplace=True))
        self.combine = nn.Sequential(convolution(width + shallow, width, 1), nn.ReLU(inplace=True))

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """deep (N, deep, h/2, w/2), shallow (N, shallow, h, w) -> (N, width, h, w)."""
        deep = interpolate(deep, shallow.shape[2:], mode="bilinear", align_corners=False)
        return self.combine(torch.cat((self.up(deep), shallow), dim=1))


class LargeKernelBlock(nn.Module):
    """Residual block: depthwise k x k and a norm, then two 1x1 convolutions that widen and narrow again."""

    def __init__(self, width: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.norm = NORMS[norm](width)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 1)
        nn.init.kaiming_normal_(self.widen.weight, nonlinearity="relu")
        nn.init.zeros_(self.narrow.weight)  # the block starts as the identity
        zero_bias(self.narrow)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) -> the same shape."""
        values = conv_norm(self.depthwise, self.norm, x)
        if not is_banded(values) or values.dtype != x.dtype:
            return add(self._pointwise(values), x)
        for first, last in bands(values.shape[2], values.shape[3], self.widen.out_channels):
            rows = values[:, :, first:last]
            torch.add(self._pointwise(rows), x[:, :, first:last], out=rows)
        return values

    def _pointwise(self, values: Tensor) -> Tensor:
        wide = self.widen(values)
        # In place, autograd would copy the whole map where it is a view, as that of a matrix product is.
        return self.narrow(wide.relu() if torch.is_grad_enabled() else wide.relu_())


class LiteStep(nn.Module):
    """One step up: both maps narrowed by 1x1 convolutions, the deep one up-sampled, added; then two blocks."""

    def __init__(self, deep: int, shallow: int, width: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.deep = nn.Conv2d(deep, width, 1)
        self.shallow = nn.Sequential(nn.Conv2d(shallow, width, 1, bias=False), NORMS[norm](width))
        self.blocks = nn.Sequential(*(LargeKernelBlock(width, kernel, norm) for _ in range(2)))

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """deep (N, deep, h/2, w/2), shallow (N, shallow, h, w) -> (N, width, h, w)."""
        up = interpolate(self.deep(deep), shallow.shape[2:], mode="bilinear", align_corners=False)
        narrow, norm = self.shallow
        return self.blocks(add(up, conv_norm(cast(nn.Conv2d, narrow), norm, shallow)))


class Trunk(nn.Module):
    """The decoder maps, from s4 up to the lowest scale that is needed.

    Args:
        in_channels: channels of c0..c4.
        widths: channels of s1..s4.
        lowest: the lowest scale, 1..4; those below it are not made.
        step: makes one step up, called with the channels of the deep map, of the shallow one, and of the result.

    Raises:
        ValueError: arguments that do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        lowest: int = 1,
        step: Callable[[int, int, int], nn.Module] = UpCombine,
    ) -> None:
        super().__init__()
        require(len(in_channels) == 5, "in_channels", "five numbers", tuple(in_channels))
        require(len(widths) == 4, "widths", "four numbers", tuple(widths))
        require(lowest in SCALES, "lowest", f"one of {SCALES}", lowest)
        deep = (*widths[1:], in_channels[4])
        self.widths = tuple(widths)
        self.scales = range(lowest, len(SCALES) + 1)
        self.steps = nn.ModuleList(step(deep[s - 1], in_channels[s - 1], widths[s - 1]) for s in self.scales)

    def up(self, scale: int, deep: Tensor, shallow: Tensor) -> Tensor:
        """Decoder map of a scale, from the one below (c4 for scale 4) and the feature map beside it."""
        return self.steps[self.scales.index(scale)](deep, shallow)

    @property
    def receptive_radius(self) -> dict[int, int]:
        """By scale: pixels of that scale, to every side, on which a step up depends."""
        return {s: 2 + receptive_radius(step) for s, step in zip(self.scales, self.steps, strict=True)}  # 2: bilinear

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """[c0..c4] -> the decoder maps by scale, from deep to shallow."""
        decoded: dict[int, Tensor] = {}
        deep = features[len(SCALES)]
        for scale in reversed(self.scales):
            deep = decoded[scale] = self.up(scale, deep, features[scale - 1])
        return decoded


def build_trunk(settings: TrunkSettings, in_channels: Sequence[int], norm: str, lowest: int = 1) -> Trunk:
    """The trunk of a name; ``norm`` is the norm layer of "lite"."""
    step = UpCombine if settings.trunk == "paper" else partial(LiteStep, kernel=settings.trunk_kernel, norm=norm)
    return Trunk(in_channels, settings.widths, lowest, step)

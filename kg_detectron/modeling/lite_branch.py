"""A keypoint branch of few operations: narrow, with depthwise large kernels and one trunk per scale.

Our own (DESIGN.md section 8). The paper spends 586 of 679 GMAC in three stacks of dense 7x7 convolutions a scale.
What these kernels are for is reach: a corner of a box lies where the lines through the cell's two outermost points
cross, up to a cell's size from either. Depthwise kernels reach as far for a fraction of the operations, and the three
heads look at the same cells, so one trunk serves them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..graph import GROUP_OFFSET_CHANNELS, HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS
from .backbone import NORMS
from .keypoint_branch import HEATMAP_PRIOR, NUM_SCALES, KeypointMaps, check_branch_arguments, scale_name


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
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N,width,h,w) -> the same shape."""
        return x + self.narrow(torch.relu(self.widen(self.norm(self.depthwise(x)))))


class LiteStep(nn.Module):
    """One step up: both maps narrowed by 1x1 convolutions, the deep one up-sampled, added; then two blocks."""

    def __init__(self, deep: int, shallow: int, width: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.deep = nn.Conv2d(deep, width, 1)
        self.shallow = nn.Sequential(nn.Conv2d(shallow, width, 1, bias=False), NORMS[norm](width))
        self.blocks = nn.Sequential(*(LargeKernelBlock(width, kernel, norm) for _ in range(2)))

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """deep (N,deep,h/2,w/2), shallow (N,shallow,h,w) -> (N,width,h,w)."""
        up = interpolate(self.deep(deep), shallow.shape[2:], mode="bilinear", align_corners=False)
        return self.blocks(up + self.shallow(shallow))


class LiteHeads(nn.Module):
    """Heatmap, single offset and group offset of one scale, by one 1x1 convolution behind a trunk of one block."""

    def __init__(self, width: int, kernel: int, stride: int, norm: str) -> None:
        super().__init__()
        self.stride = stride
        self.trunk = nn.Sequential(LargeKernelBlock(width, kernel, norm), NORMS[norm](width), nn.ReLU(inplace=True))
        self.channels = (HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS, GROUP_OFFSET_CHANNELS)
        self.predict = nn.Conv2d(width, sum(self.channels), 1)
        nn.init.normal_(self.predict.weight, std=0.1 / width**0.5)
        nn.init.zeros_(self.predict.bias)
        nn.init.constant_(self.predict.bias[:HEATMAP_CHANNELS], HEATMAP_PRIOR)

    def forward(self, decoded: Tensor) -> KeypointMaps:
        """(N,width,h,w) -> the maps of that scale."""
        return KeypointMaps(*self.predict(self.trunk(decoded)).split(self.channels, dim=1), self.stride)


class LiteKeypointBranch(nn.Module):
    """Decoder maps and keypoint maps; arguments and results as in `KeypointBranch`.

    Args:
        in_channels: channels of c0..c4.
        widths: channels of the decoder maps s1..s4; those below the lowest scale are not made.
        head_kernel: kernel size of the depthwise convolutions, odd.
        scales: scales with heads, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        norm: norm layer, a key of `NORMS`.

    Raises:
        ValueError: for arguments that do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        widths: Sequence[int],
        head_kernel: int = 7,
        scales: Sequence[int] = (2, 3, 4),
        norm: str = "BN",
    ) -> None:
        super().__init__()
        check_branch_arguments(in_channels, widths, head_kernel, scales)
        deep = (*widths[1:], in_channels[4])
        self.steps = nn.ModuleList(
            LiteStep(deep[s - 1], in_channels[s - 1], widths[s - 1], head_kernel, norm)
            for s in range(min(scales), NUM_SCALES + 1)
        )
        self.heads = nn.ModuleDict(
            {scale_name(s): LiteHeads(widths[s - 1], head_kernel, 2 ** (s - 1), norm) for s in sorted(scales)}
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[list[KeypointMaps], dict[str, Tensor]]:
        """[c0..c4] -> the maps of each chosen scale, from shallow to deep, and the decoder maps by name."""
        decoded: dict[str, Tensor] = {}
        current = features[NUM_SCALES]
        for step, s in zip(reversed(self.steps), range(NUM_SCALES, 0, -1), strict=False):
            current = decoded[scale_name(s)] = step(current, features[s - 1])
        return [head(decoded[name]) for name, head in self.heads.items()], decoded

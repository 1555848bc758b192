"""A keypoint branch of few operations: narrow, with depthwise large kernels and one trunk per scale.

Our own (DESIGN.md section 8). The paper spends 586 of 679 GMAC in three stacks of dense 7x7 convolutions a scale.
What these kernels are for is reach: a corner of a box lies where the lines through the cell's two outermost points
cross, up to a cell's size from either. Depthwise kernels reach as far for a fraction of the operations, and the three
heads look at the same cells, so one trunk serves them all.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kg_detectron.graph import GROUP_OFFSET_CHANNELS, HEATMAP_CHANNELS, SINGLE_OFFSET_CHANNELS
from kg_detectron.modeling.backbone import NORMS
from kg_detectron.modeling.keypoint_graph.heads import HEATMAP_PRIOR, KeypointMaps, reach


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

    @property
    def reach(self) -> int:
        """As of `KeypointHeads`."""
        return reach(self.trunk)

    def forward(self, decoded: Tensor) -> KeypointMaps:
        """(N,width,h,w) -> the maps of that scale."""
        return KeypointMaps(*self.predict(self.trunk(decoded)).split(self.channels, dim=1), self.stride)

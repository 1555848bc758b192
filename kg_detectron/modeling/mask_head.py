"""Segmentation branch: cut every cell out of the feature maps and segment it there (paper, figure 1b, section 2.2).

Crops have the box's own size, so a batch holds crops of different sizes: each is padded to the largest of its group,
and what lies outside a crop is kept at zero wherever a convolution could see it. The result equals that of each alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..masks import MaskCrops
from .keypoint_branch import UpCombine, convolution
from .losses import mask_loss


class SegmentationBranch(nn.Module):
    """Masks of boxes, from feature maps at strides 1, 2, 4, ...

    With the backbone's c0..c4 this is the paper's segmentation branch; with the single map s1 it is its `seg s1`.

    Args:
        in_channels: channels of the L maps.
        widths: channels of the results at the first L - 1 maps (one number where L is 1).
        pixels_in_flight: pixels of padded crops that go through the branch together; bounds the memory.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        pixels_in_flight: int = 2**21,
    ) -> None:
        super().__init__()
        expected = max(1, len(in_channels) - 1)
        if len(widths) != expected:
            raise ValueError(f"widths: expected {expected} for {len(in_channels)} maps, got {tuple(widths)}")
        self.pixels_in_flight = pixels_in_flight
        deep = (*widths[1:], in_channels[-1])
        self.steps = nn.ModuleList(UpCombine(d, c, w) for d, c, w in zip(deep, in_channels[:-1], widths, strict=False))
        # A crop whose deep levels are left out starts at a shallower map, which must then have that level's width.
        self.starts = nn.ModuleList(
            nn.Identity() if c == w else nn.Sequential(convolution(c, w, 1), nn.ReLU(inplace=True))
            for c, w in zip(in_channels, widths, strict=False)
        )
        self.hidden = nn.Sequential(convolution(widths[0], widths[0], 3), nn.ReLU(inplace=True))
        self.predict = nn.Conv2d(widths[0], 1, 3, padding=1)
        nn.init.normal_(self.predict.weight, std=0.01)
        nn.init.zeros_(self.predict.bias)

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Segment boxes.

        Args:
            features: L maps [N,C,h,w] at strides 1, 2, 4, ...
            boxes: N tensors (R,4), xyxy continuous, input pixels.

        Returns:
            The mask logits of all boxes, image after image: tensors (h,w) of the box's own size; and the places of
            these crops, (R,4) int64 xyxy on the CPU.
        """
        image = torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor([len(b) for b in boxes]))
        windows = crop_windows(torch.cat(boxes).float().cpu(), [f.shape[2:] for f in features])
        tables = [f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in features]
        logits: list[Tensor | None] = [None] * len(image)
        for flight in self._flights(windows):
            # One look-up per map for all groups: its gradient is as large as the map.
            crops: list[list[Tensor]] = [[] for _ in flight]
            for level, (table, feature) in enumerate(zip(tables, features, strict=True)):
                deep = [g for g, (_, depth) in enumerate(flight) if depth > level]
                index = [
                    _crop_index(image[m], windows[level, m], feature.shape[2:]) for m in (flight[g][0] for g in deep)
                ]
                for g, crop in zip(deep, _look_up(table, index), strict=True):
                    crops[g].append(crop)
            for (members, depth), own in zip(flight, crops, strict=True):
                sizes = window_sizes(windows[:depth, members])
                for m, (height, width), crop in zip(
                    members.tolist(), sizes[0].tolist(), self._segment(own, sizes), strict=True
                ):
                    logits[m] = crop[:height, :width]
        return logits, windows[0]

    def predict_masks(
        self, features: Sequence[Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]], threshold: float = 0.5
    ) -> list[MaskCrops]:
        """Mask probabilities of the boxes of each image, as crops.

        Args:
            features, boxes: as in `forward`.
            sizes: (h, w) of each image, input pixels, without the padding; boxes lie within it.
            threshold: probability from which a pixel belongs to the cell.
        """
        logits, windows = self(features, boxes)
        masks = []
        for own, size in zip(boxes, sizes, strict=True):
            crops = [crop.float().sigmoid() for crop in logits[: len(own)]]
            masks.append(MaskCrops(crops, windows[: len(own)], size, threshold))
            logits, windows = logits[len(own) :], windows[len(own) :]
        return masks

    def loss(self, features: Sequence[Tensor], boxes: list[Tensor], masks: list[Tensor]) -> Tensor:
        """Mask loss of ground-truth boxes; each crop's target is the mask of its own cell.

        Args:
            features: as in `forward`.
            boxes: N tensors (M,4).
            masks: N tensors (M,H,W), bool, input pixels (unpadded size).
        """
        # Crops of weight 0 that start at each of the levels: all parameters take part in every step, which distributed
        # training needs, and a batch without cells has a loss.
        sides = 2 ** torch.arange(1, len(features) + 1)
        everywhere = torch.stack((sides * 0, sides * 0, sides, sides), dim=1).to(boxes[0])
        logits, windows = self(features, [torch.cat((everywhere, boxes[0])), *boxes[1:]])
        zero = 0 * sum(crop.float().mean() for crop in logits[: len(sides)])
        logits, places = logits[len(sides) :], windows[len(sides) :].tolist()
        if not logits:
            return zero
        targets = [
            mask[y1:y2, x1:x2] for mask, (x1, y1, x2, y2) in zip((m for ms in masks for m in ms), places, strict=True)
        ]
        return mask_loss(logits, targets) + zero

    def _flights(self, windows: Tensor) -> Iterator[list[tuple[Tensor, int]]]:
        """Groups of crops of like size, and how many maps each uses; a flight has at most `pixels_in_flight` pixels."""
        sizes = window_sizes(windows)  # [L,R,2]
        depth = (sizes >= 2).all(2).cumprod(0).sum(0).clamp(min=1)
        bucket = (sizes[0].double().log2() * 2).ceil().long()  # sides within a factor of 1.41
        keys, group = torch.cat((depth[:, None], bucket), dim=1).unique(dim=0, return_inverse=True)
        flight, pixels = [], 0
        for g, key in enumerate(keys):
            members = (group == g).nonzero()[:, 0]
            largest = int(sizes[0, members].amax(0).prod())
            for part in members.split(max(1, self.pixels_in_flight // largest)):
                if flight and pixels + len(part) * largest > self.pixels_in_flight:
                    yield flight
                    flight, pixels = [], 0
                flight.append((part, int(key[0])))
                pixels += len(part) * largest
        if flight:
            yield flight

    def _segment(self, crops: list[Tensor], sizes: Tensor) -> Tensor:
        """Padded crops [B,C,h,w] of each level and their sizes [L,B,2] -> logits [B,h,w]."""
        deepest = len(crops) - 1
        result = crops[deepest]
        if deepest < len(self.starts):
            result = self.starts[deepest](result)
        for l in reversed(range(deepest)):
            deep = _resize_crops(result, sizes[l + 1], sizes[l], crops[l].shape[2:])
            result = self.steps[l](deep, crops[l])
        rows, columns = (torch.arange(side) < sizes[0, :, axis, None] for axis, side in enumerate(result.shape[2:]))
        inside = (rows[:, None, :, None] & columns[:, None, None]).to(result)
        return self.predict(self.hidden(result * inside) * inside)[:, 0]


def crop_windows(boxes: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Places of the crops of boxes in maps at strides 1, 2, 4, ...

    Args:
        boxes: (R,4) xyxy continuous, input pixels.
        shapes: (h, w) of each map.

    Returns:
        (L,R,4) int64 xyxy: box edges divided by the stride, rounded, within the map; at stride 1 at least one pixel.
    """
    windows = []
    for level, (height, width) in enumerate(shapes):
        limit = torch.tensor([width, height, width, height])
        windows.append(torch.minimum((boxes / 2**level).round().long().clamp(min=0), limit))
    low = torch.minimum(windows[0][:, :2], boxes[:, 2:].ceil().long() - 1).clamp(min=0)
    windows[0] = torch.cat((low, torch.maximum(windows[0][:, 2:], low + 1)), dim=1)
    return torch.stack(windows)


def window_sizes(windows: Tensor) -> Tensor:
    """(...,4) xyxy -> (...,2) height, width."""
    return (windows[..., 2:] - windows[..., :2]).flip(-1)


def _crop_index(image: Tensor, windows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of the table [N*h*w,C] that padded crops hold, [B,H,W], -1 outside the crop."""
    height, width = window_sizes(windows).amax(0).tolist()
    y = windows[:, 1, None] + torch.arange(height)
    x = windows[:, 0, None] + torch.arange(width)
    inside = (y < windows[:, 3, None])[:, :, None] & (x < windows[:, 2, None])[:, None]
    index = (image[:, None, None] * shape[0] + y[:, :, None]) * shape[1] + x[:, None]
    return torch.where(inside, index, -1)


def _look_up(table: Tensor, index: list[Tensor]) -> list[Tensor]:
    """Rows of the table [.,C] for each index [B,H,W], as [B,C,H,W]; zero where the index is -1."""
    if not index:
        return []
    flat = torch.cat([i.flatten() for i in index]).to(table.device)
    rows = embedding(flat.clamp(min=0), table) * (flat >= 0)[:, None]
    parts = rows.split([i.numel() for i in index])
    return [part.reshape(*i.shape, -1).permute(0, 3, 1, 2) for part, i in zip(parts, index, strict=True)]


def _interpolation(before: Tensor, after: Tensor, columns: int, rows: int) -> Tensor:
    """Matrices [B,rows,columns] of bilinear resizing (align_corners False) from `before` to `after`; 0 beyond."""
    source = (torch.arange(rows) + 0.5) * (before / after)[:, None] - 0.5
    last = (before - 1)[:, None]
    source = torch.minimum(source.clamp(min=0), last)
    low = source.floor()
    weight = source - low
    low = low.long()
    matrix = torch.zeros(len(before), rows, columns)
    matrix.scatter_add_(2, low[..., None], (1 - weight)[..., None])
    matrix.scatter_add_(2, torch.minimum(low + 1, last)[..., None], weight[..., None])
    return matrix * (torch.arange(rows) < after[:, None])[..., None]


def _resize_crops(crops: Tensor, before: Tensor, after: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize each padded crop [B,C,h,w] bilinearly from its size `before` [B,2] to its size `after`; zero beyond."""
    b, c, h, w = crops.shape
    rows = _interpolation(before[:, 0], after[:, 0], h, shape[0]).to(crops)
    columns = _interpolation(before[:, 1], after[:, 1], w, shape[1]).to(crops)
    tall = torch.bmm(rows, crops.permute(0, 2, 3, 1).reshape(b, h, w * c))
    wide = torch.bmm(columns, tall.reshape(b, shape[0], w, c).transpose(1, 2).reshape(b, w, -1))
    return wide.reshape(b, shape[1], shape[0], c).permute(0, 3, 2, 1)

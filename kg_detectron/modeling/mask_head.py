"""Segmentation branch: cut every cell out of the feature maps and segment it there (paper, figure 1b, section 2.2).

Crops have the box's own size, so a batch holds crops of different sizes: those of like size are padded to one, and what
lies outside a crop is kept at zero wherever a convolution could see it. The result equals that of each crop alone.

Letters: N images, L maps, R boxes, C channels; B crops of one group; P pixels, those of many crops one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, pad
from torch.utils.checkpoint import checkpoint

from ..masks import MaskCrops
from .keypoint_branch import UpCombine, convolution
from .losses import mask_loss

# A crop with a longer side goes alone: the matrices that resize many at once grow with the square of the side.
LARGEST_IN_COMPANY = 128


class Group(NamedTuple):
    """Crops of like size, padded to one size."""

    members: Tensor  # [B] int64 on the CPU, which of the boxes
    shapes: list[tuple[int, int]]  # (h, w) at strides 1, 2, ..., as deep as these crops reach

    def pixels(self, level: int = 0) -> int:
        height, width = self.shapes[level]
        return len(self.members) * height * width


class SegmentationBranch(nn.Module):
    """Masks of boxes, from feature maps at strides 1, 2, 4, ...

    With the backbone's c0..c4 this is the paper's segmentation branch; with the single map s1 it is its `seg s1`.

    Args:
        in_channels: channels of the L maps.
        widths: channels of the results at the first L - 1 maps (one number where L is 1).
        pixels_in_flight: pixels of padded crops that go through the branch together. It bounds the memory, in training
            too: where there are several flights, each is computed again for its gradients. A larger crop goes alone.

    Raises:
        ValueError: for widths that do not fit, or a number of pixels that is not positive.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        pixels_in_flight: int = 2**19,
    ) -> None:
        super().__init__()
        expected = max(1, len(in_channels) - 1)
        if len(widths) != expected:
            raise ValueError(f"widths: expected {expected} for {len(in_channels)} maps, got {tuple(widths)}")
        if pixels_in_flight < 1:
            raise ValueError(f"pixels_in_flight: expected a positive number, got {pixels_in_flight}")
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
        logits, windows = self._flat_logits(features, boxes)
        sizes = window_sizes(windows)
        crops = logits.split(sizes.prod(1).tolist()) if len(sizes) else []
        return [crop.view(size) for crop, size in zip(crops, sizes.tolist(), strict=True)], windows

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
        logits, windows = self._flat_logits(features, [torch.cat((everywhere, boxes[0])), *boxes[1:]])
        skipped = int(window_sizes(windows[: len(sides)]).prod(1).sum())
        zero = 0 * logits[:skipped].float().sum()
        windows, logits = windows[len(sides) :], logits[skipped:]
        if not len(windows):
            return zero
        return mask_loss(logits, _mask_pixels(masks, windows), window_sizes(windows).prod(1)) + zero

    def _flat_logits(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mask logits of all boxes, the pixels of one after those of another [P]; their places, (R,4) on the CPU."""
        device = features[0].device
        image = torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor([len(b) for b in boxes]))
        windows = crop_windows(torch.cat(boxes).float().cpu(), [f.shape[2:] for f in features])
        if not len(image):
            return features[0].new_zeros(0), windows[0]
        flights = self._flights(window_sizes(windows))
        several = torch.is_grad_enabled() and len(flights) > 1
        tables = [f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in features]
        parts, first, width, pixels = [], torch.zeros_like(image), torch.zeros_like(image), 0
        for flight in flights:
            members = torch.cat([group.members for group in flight])
            if _goes_alone(flight[0]):
                own, segment = int(image[members]), self._segment_alone
                arguments = [f[own : own + 1] for f in features], windows[:, members[0]], flight[0]
            else:
                segment = self._segment_together
                places = [(image[g.members].to(device), windows[:, g.members].to(device)) for g in flight]
                arguments = tables, [f.shape[2:] for f in features], flight, places
            parts.append(checkpoint(segment, *arguments, use_reentrant=False) if several else segment(*arguments))
            for group in flight:
                height, width[group.members] = group.shapes[0]
                first[group.members] = pixels + torch.arange(len(group.members)) * height * group.shapes[0][1]
                pixels += group.pixels()
        crop, y, x = crop_pixels(window_sizes(windows[0]), device)
        return torch.cat(parts)[first.to(device)[crop] + y * width.to(device)[crop] + x], windows[0]

    def _flights(self, sizes: Tensor) -> list[list[Group]]:
        """Groups of crops of like size [L,R,2], those that reach deepest first.

        A flight has at most `pixels_in_flight` pixels, or is one crop.
        """
        depth = (sizes >= 2).all(2).cumprod(0).sum(0).clamp(min=1)
        alone = sizes[0].amax(1) > LARGEST_IN_COMPANY
        bucket = (sizes[0].double().log2() * 2).ceil().long()  # sides within a factor of 1.41
        bucket[alone, 0] = -1 - torch.arange(int(alone.sum()))
        keys, group = torch.cat((-depth[:, None], bucket), dim=1).unique(dim=0, return_inverse=True)
        flights: list[list[Group]] = []
        room = 0
        for g, (negative_depth, *_) in enumerate(keys.tolist()):
            members = (group == g).nonzero()[:, 0]
            largest = int(sizes[0, members].amax(0).prod())
            for part in members.split(max(1, self.pixels_in_flight // largest)):
                shapes = [tuple(shape) for shape in sizes[:-negative_depth, part].amax(1).tolist()]
                new = Group(part, shapes)
                if new.pixels() > room or _goes_alone(new):
                    flights.append([])
                    room = 0 if _goes_alone(new) else self.pixels_in_flight
                flights[-1].append(new)
                room -= new.pixels()
        return flights

    def _segment_alone(self, features: list[Tensor], windows: Tensor, group: Group) -> Tensor:
        """One crop [L,4] of maps [1,C,h,w], by the definition -> logits [P]."""
        crops = [f[:, :, y1:y2, x1:x2] for f, (x1, y1, x2, y2) in zip(features, windows.tolist(), strict=True)][
            : len(group.shapes)
        ]
        result = crops[-1]
        if len(crops) <= len(self.starts):
            result = self.starts[len(crops) - 1](result)
        for step, crop in zip(reversed(self.steps[: len(crops) - 1]), reversed(crops[:-1]), strict=True):
            result = step(interpolate(result, crop.shape[2:], mode="bilinear", align_corners=False), crop)
        return self.predict(self.hidden(result)).flatten()

    def _segment_together(
        self,
        tables: list[Tensor],
        shapes: list[tuple[int, int]],
        flight: list[Group],
        places: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The crops of a flight -> logits [P], padding included.

        What works pixel by pixel runs once for the whole flight; resizing and the last convolutions, group by group.

        Args:
            tables: the L maps, [N*h*w,C].
            shapes: (h, w) of each map.
            flight: groups, those that reach deepest first.
            places: for each group its images [B] and windows [L,B,4], on the device.
        """
        pixels = tables[0].new_zeros(0)
        for level in reversed(range(len(flight[0].shapes))):
            here = [(g, *place) for g, place in zip(flight, places, strict=True) if len(g.shapes) > level]
            index = [_crop_index(image, windows[level], g.shapes[level], shapes[level]) for g, image, windows in here]
            shallow = tables[level].index_select(0, torch.cat(index))
            rising = [group for group in here if len(group[0].shapes) > level + 1]
            count = sum(group.pixels(level) for group, _, _ in rising)
            parts = []
            if count < len(shallow):
                parts.append(self._start(level, shallow[count:]))
            if rising:
                deep, layer = self._up(level, pixels, rising), self.steps[level].combine[0]
                of_deep, of_shallow = layer.weight[:, :, 0, 0].split((deep.shape[1], shallow.shape[1]), dim=1)
                combined = torch.addmm(linear(deep, of_deep, layer.bias), shallow[:count], of_shallow.T)
                parts.insert(0, combined.relu_())
            pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
        logits = []
        for group, own, (_, windows) in zip(flight, pixels.split([g.pixels() for g in flight]), places, strict=True):
            inside = _inside(windows[0], group.shapes[0])[:, None].to(own.dtype)
            crops = own.view(len(group.members), *group.shapes[0], -1).permute(0, 3, 1, 2)
            logits.append(self.predict(self.hidden(crops * inside) * inside).flatten())
        return torch.cat(logits)

    def _start(self, level: int, pixels: Tensor) -> Tensor:
        """Pixels [P,C] of crops whose deepest level this is."""
        if level == len(self.starts) or isinstance(self.starts[level], nn.Identity):
            return pixels
        layer = self.starts[level][0]
        return linear(pixels, layer.weight[:, :, 0, 0], layer.bias).relu_()

    def _up(self, level: int, pixels: Tensor, groups: list[tuple[Group, Tensor, Tensor]]) -> Tensor:
        """Crops [P,C] of the next deeper level, resized to this one, conv3x3, ReLU -> [P,C].

        Resizing is linear, and so is the convolution: each of its nine weight matrices is applied before resizing, to a
        quarter of the pixels, and the resized results are added up, each shifted by its place in the kernel.
        """
        layer = self.steps[level].up[0]
        channels = layer.out_channels
        counts = [group.pixels(level + 1) for group, _, _ in groups]
        taps = [
            linear(pixels, layer.weight[:, :, dy].permute(2, 0, 1).reshape(3 * channels, -1)).split(counts)
            for dy in range(3)
        ]
        # The matrices of all groups at once, in the size of the largest.
        before, after = (window_sizes(torch.cat([w[l] for _, _, w in groups])) for l in (level + 1, level))
        rows, columns = (max(max(group.shapes[l]) for group, _, _ in groups) for l in (level, level + 1))
        vertical, horizontal = (
            _shifted(_interpolation(before[:, axis], after[:, axis], columns, rows).to(pixels)) for axis in (0, 1)
        )
        results, first = [], 0
        for g, (group, _, _) in enumerate(groups):
            b, (h, w), (height, width) = len(group.members), group.shapes[level + 1], group.shapes[level]
            own = slice(first, first + b)
            first += b
            up, at, down = (tap[g].view(b, h, w * 3 * channels) for tap in taps)
            above, level_with, below = (matrix[own, :height, :h] for matrix in vertical.unbind(3))
            tall = torch.baddbmm(torch.baddbmm(torch.bmm(above, up), level_with, at), below, down)
            across = horizontal[own, :width, :w].reshape(b, 1, width, w * 3)
            results.append(torch.matmul(across, tall.view(b, height, w * 3, channels)).view(-1, channels))
        return torch.cat(results).add_(layer.bias).relu_()


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


def crop_pixels(sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of crops of sizes [R,2], row by row, one crop after another: crop, y, x [P] int64."""
    areas = sizes.prod(1)
    first = (areas.cumsum(0) - areas).to(device)
    crop = torch.repeat_interleave(torch.arange(len(sizes), device=device), areas.to(device), output_size=areas.sum())
    place = torch.arange(len(crop), device=device) - first[crop]
    width = sizes[:, 1].to(device)[crop]
    return crop, place // width, place % width


def _mask_pixels(masks: list[Tensor], windows: Tensor) -> Tensor:
    """Masks, N tensors (M,H,W), inside the windows [R,4] of all cells -> [P]."""
    pixels = torch.cat([m.flatten() for m in masks])
    counts = torch.tensor([len(m) for m in masks])
    height, width = torch.tensor([m.shape[1:] for m in masks]).repeat_interleave(counts, dim=0).unbind(1)
    first = (height * width).cumsum(0) - height * width + windows[:, 1] * width + windows[:, 0]
    crop, y, x = crop_pixels(window_sizes(windows), pixels.device)
    return pixels[first.to(pixels.device)[crop] + y * width.to(pixels.device)[crop] + x]


def _goes_alone(group: Group) -> bool:
    return max(group.shapes[0]) > LARGEST_IN_COMPANY


def _crop_index(image: Tensor, windows: Tensor, padded: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Rows of the table [N*h*w,C] that padded crops hold, [B*H*W]; in the padding, some row of the crop."""
    y, x = (
        torch.minimum(windows[:, 1 - a, None] + torch.arange(side, device=image.device), windows[:, 3 - a, None] - 1)
        for a, side in enumerate(padded)
    )
    return ((image[:, None, None] * shape[0] + y[:, :, None]) * shape[1] + x[:, None]).flatten()


def _inside(windows: Tensor, padded: tuple[int, int]) -> Tensor:
    """Which pixels of padded crops belong to the crop, [B,H,W] bool."""
    rows, columns = (
        torch.arange(side, device=windows.device) < window_sizes(windows)[:, a, None] for a, side in enumerate(padded)
    )
    return rows[:, :, None] & columns[:, None]


def _interpolation(before: Tensor, after: Tensor, columns: int, rows: int) -> Tensor:
    """Matrices [B,rows,columns] of bilinear resizing (align_corners False) from `before` to `after`; 0 beyond."""
    place = torch.arange(rows, device=before.device)
    last = (before - 1)[:, None]
    source = torch.minimum(((place + 0.5) * (before / after)[:, None] - 0.5).clamp(min=0), last)
    low = source.floor()
    weight = source - low
    low = low.long()
    matrix = weight.new_zeros(len(before), rows, columns)
    matrix.scatter_add_(2, low[..., None], (1 - weight)[..., None])
    matrix.scatter_add_(2, torch.minimum(low + 1, last)[..., None], weight[..., None])
    return matrix * (place < after[:, None])[..., None]


def _shifted(matrix: Tensor) -> Tensor:
    """[B,rows,columns,3] from matrices [B,rows,columns]: rows i - 1, i and i + 1 in the place of row i, 0 beyond."""
    return pad(matrix, (0, 0, 1, 1)).unfold(1, matrix.shape[1], 1).permute(0, 3, 2, 1).contiguous()

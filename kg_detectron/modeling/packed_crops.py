"""Segmentation branch: cut every cell out of the feature maps and segment it there (paper, figure 1b, section 2.2).

Crops have the box's own size, so a batch holds crops of different sizes. Their pixels lie one after another in a table,
which is all that pixel by pixel work asks for; those at full resolution lie side by side on a canvas, zeros between
them, for the last convolutions. The result equals that of each crop alone.

Letters: N images, L maps, R boxes, C channels, P pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint
from torchvision.ops import clip_boxes_to_image

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.layers import convolve_resized, crop_pixels
from kg_detectron.modeling.keypoint_graph.heads import UpCombine, convolution
from kg_detectron.modeling.keypoint_graph.losses import mask_loss

# Pixels of a row of a canvas, roughly.
CANVAS_WIDTH = 1024


class Canvas(NamedTuple):
    """Crops side by side in rows, with at least one empty pixel between any two."""

    shape: tuple[int, int]
    places: Tensor  # [R,2] int64 on the CPU: first pixel of each crop, pixels from row to row
    pixels: Tensor  # [P] int64, where the pixels of the crops lie, one crop after another
    gaps: Tensor  # int64, the empty pixels
    rising: int  # pixels of the rows that hold crops with deeper levels; the other crops lie in the rows below


class SegmentationBranch(nn.Module):
    """Masks of boxes, from feature maps at strides 1, 2, 4, ...

    With the backbone's c0..c4 this is the paper's segmentation branch; with the single map s1 it is its `seg s1`.

    Args:
        in_channels: channels of the L maps.
        widths: channels of the results at the first L - 1 maps (one number where L is 1).
        pixels_in_flight: pixels of crops that go through the branch together; one crop more may begin within them. It
            bounds the memory, in training too: where there are more, they are computed again for their gradients.
        margin: input pixels by which the crops of `predict_masks` reach beyond their boxes, on every side; our own, the
            paper has none. It mends boxes that are too small, and needs training on boxes that are off,
            `jittered_boxes`, for otherwise masks fill their crops.

    Raises:
        ValueError: for widths that do not fit, a number of pixels that is not positive, or a negative margin.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (64, 64, 256, 512, 1024),
        widths: Sequence[int] = (64, 64, 256, 512),
        pixels_in_flight: int = 2**18,
        margin: float = 0.0,
    ) -> None:
        super().__init__()
        expected = max(1, len(in_channels) - 1)
        if len(widths) != expected:
            raise ValueError(f"widths: expected {expected} for {len(in_channels)} maps, got {tuple(widths)}")
        if pixels_in_flight < 1:
            raise ValueError(f"pixels_in_flight: expected a positive number, got {pixels_in_flight}")
        if not margin >= 0:
            raise ValueError(f"margin: expected 0 or more pixels, got {margin}")
        self.pixels_in_flight = pixels_in_flight
        self.margin = margin
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
        """Mask probabilities of the boxes of each image, and of `margin` pixels around each, as crops.

        Args:
            features, boxes: as in `forward`.
            sizes: (h, w) of each image, input pixels, without the padding; boxes lie within it.
            threshold: probability from which a pixel belongs to the cell.
        """
        if self.margin:
            outwards = boxes[0].new_tensor([-self.margin, -self.margin, self.margin, self.margin])
            boxes = [clip_boxes_to_image(own + outwards, size) for own, size in zip(boxes, sizes, strict=True)]
        logits, windows = self(features, boxes)
        masks = []
        for own, size in zip(boxes, sizes, strict=True):
            crops = [crop.float().sigmoid() for crop in logits[: len(own)]]
            masks.append(MaskCrops(crops, windows[: len(own)], size, threshold))
            logits, windows = logits[len(own) :], windows[len(own) :]
        return masks

    def cell_boxes(self, boxes: Tensor, masks: MaskCrops) -> Tensor:
        """The boxes (R,4) of cells with masks of `predict_masks`: with a margin those of the masks, else as given."""
        return masks.extents().to(boxes) if self.margin else boxes

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
        tables = [_table(f) for f in features]
        # The nine matrices of each 3x3 kernel after resizing, [9*C',C].
        matrices = [step.up[0].weight.permute(2, 3, 0, 1).flatten(0, 2) for step in self.steps]
        shapes = [f.shape[2:] for f in features]
        sizes = window_sizes(windows)
        depth = (sizes >= 2).all(2).cumprod(0).sum(0).clamp(min=1)
        areas = sizes[0].prod(1)
        many = torch.is_grad_enabled() and int(areas.sum()) > self.pixels_in_flight
        flights = self._flights(sizes[0], depth)
        parts = []
        for flight in flights:
            arguments = tables, shapes, matrices, image[flight], windows[:, flight], depth[flight]
            parts.append(
                checkpoint(self._segment, *arguments, use_reentrant=False) if many else self._segment(*arguments)
            )
        # Back from the order of the flights to that of the boxes.
        order = torch.cat(flights)
        first = torch.empty_like(areas)
        first[order] = areas[order].cumsum(0) - areas[order]
        crop, y, x = crop_pixels(sizes[0], device)
        return torch.cat(parts)[first.to(device)[crop] + y * sizes[0, :, 1].to(device)[crop] + x], windows[0]

    def _flights(self, sizes: Tensor, depth: Tensor) -> list[Tensor]:
        """Crops of sizes [R,2] that go through the branch together, those that reach deepest first.

        They are of like height, within a factor of two: so they fill the rows of a canvas.
        """
        order = sizes[:, 0].argsort(descending=True, stable=True)
        areas = sizes[order].prod(1)
        height = sizes[order, 0].double().log2().floor().long()
        part = (areas.cumsum(0) - areas) // self.pixels_in_flight
        _, counts = torch.stack((height, part), dim=1).unique_consecutive(dim=0, return_counts=True)
        return [part[depth[part].argsort(descending=True, stable=True)] for part in order.split(counts.tolist())]

    def _segment(
        self,
        tables: list[Tensor],
        shapes: list[tuple[int, int]],
        matrices: list[Tensor],
        image: Tensor,
        windows: Tensor,
        depth: Tensor,
    ) -> Tensor:
        """The crops of a flight -> logits [P].

        Args:
            tables: the L maps, [N*h*w,C].
            shapes: (h, w) of each map.
            matrices: see `_rise`, of each step.
            image: [R], on the CPU like the next.
            windows: [L,R,4].
            depth: [R] number of maps that each crop reaches, falling.
        """
        device = tables[0].device
        sizes = window_sizes(windows)
        pixels = tables[0].new_zeros(0)
        for level in reversed(range(int(depth[0]))):
            here, rising = int((depth > level).sum()), int((depth > level + 1).sum())
            crop, y, x = crop_pixels(sizes[level, :here], device)
            height, width = shapes[level]
            left, top = windows[level, :here, :2].unbind(1)
            first = (image[:here] * height + top) * width + left
            index = first.to(device)[crop] + y * width + x
            if level == 0:
                canvas = fill_canvas(sizes[0], rising, device)
                # Empty pixels take any pixel.
                index = index.new_zeros(canvas.shape[0] * canvas.shape[1]).index_copy_(0, canvas.pixels, index)
                places, count = canvas.places, canvas.rising
            else:
                areas = sizes[level, :here].prod(1)
                places = torch.stack((areas.cumsum(0) - areas, sizes[level, :here, 1]), dim=1)
                count = int(areas[:rising].sum())
            shallow = tables[level].index_select(0, index)
            parts = []
            if rising:
                deep = self._rise(level, matrices[level], pixels, sizes[:, :rising], places[:rising], count)
                parts.append(self._join(level, deep, shallow[:count]))
            if count < len(shallow):
                parts.append(self._start(level, shallow[count:]))
            pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
        pixels = _clear(pixels, canvas.gaps)
        hidden = self.hidden(pixels.view(1, *canvas.shape, -1).permute(0, 3, 1, 2))
        hidden = _clear(hidden.permute(0, 2, 3, 1).reshape(len(pixels), -1), canvas.gaps)
        return self._predict(hidden, canvas.shape).flatten()[canvas.pixels]

    def _predict(self, pixels: Tensor, shape: tuple[int, int]) -> Tensor:
        """The last convolution on a canvas [H*W,C] -> [H,W]. Of one channel, it is faster as nine shifted planes."""
        planes = (self.predict.weight[0].flatten(1).T @ pixels.T).view(3, 3, *shape)
        planes = pad(planes, (1, 1, 1, 1))
        shifted = [planes[y, x, y : y + shape[0], x : x + shape[1]] for y in range(3) for x in range(3)]
        return sum(shifted) + self.predict.bias

    def _rise(self, level: int, matrices: Tensor, pixels: Tensor, sizes: Tensor, places: Tensor, count: int) -> Tensor:
        """Crops [P,C] of the next deeper level, resized to this one, conv3x3, ReLU -> [count,C'].

        The nine matrices of the kernel, [9*C',C], are applied before resizing, to a quarter of the pixels.
        """
        products = linear(pixels, matrices).view(len(pixels), 9, -1)
        deep = convolve_resized(products, sizes[level + 1], sizes[level], places, count)
        return deep.add_(self.steps[level].up[0].bias).relu_()

    def _join(self, level: int, deep: Tensor, shallow: Tensor) -> Tensor:
        """Concatenation, conv1x1, ReLU of pixels [P,C] and [P,c]."""
        layer = self.steps[level].combine[0]
        of_deep, of_shallow = layer.weight[:, :, 0, 0].split((deep.shape[1], shallow.shape[1]), dim=1)
        return torch.addmm(linear(deep, of_deep, layer.bias), shallow, of_shallow.T).relu_()

    def _start(self, level: int, pixels: Tensor) -> Tensor:
        """Pixels [P,C] of crops whose deepest level this is."""
        if level == len(self.starts) or isinstance(self.starts[level], nn.Identity):
            return pixels
        layer = self.starts[level][0]
        return linear(pixels, layer.weight[:, :, 0, 0], layer.bias).relu_()


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


def fill_canvas(sizes: Tensor, rising: int, device: torch.device) -> Canvas:
    """Places for crops of sizes [R,2]; those from `rising` on lie in rows below the others."""
    below = (torch.arange(len(sizes)) >= rising).long()
    order = (below * (1 + sizes[:, 0].max()) - sizes[:, 0]).argsort(stable=True)  # each row as high as its first crop
    height, width = (sizes[order] + 1).unbind(1)
    before = width.cumsum(0) - width
    full = (before - below[order] * before[min(rising, len(sizes) - 1)]) // CANVAS_WIDTH
    _, row, counts = torch.stack((below[order], full)).unique_consecutive(
        dim=1, return_inverse=True, return_counts=True
    )
    first = counts.cumsum(0) - counts
    left = before - before[first][row]
    bottom = height[first].cumsum(0)
    top = (bottom - height[first])[row]
    shape = int(bottom[-1]), int((left + width).max())
    places = torch.empty_like(sizes)
    places[order] = torch.stack((top * shape[1] + left, torch.full_like(top, shape[1])), dim=1)
    crop, y, x = crop_pixels(sizes, device)
    pixels = places[:, 0].to(device)[crop] + y * shape[1] + x
    empty = torch.ones(shape[0] * shape[1], dtype=torch.bool, device=device).index_fill_(0, pixels, False)
    rows_of_rising = int(bottom[row[rising - 1]]) if rising else 0
    return Canvas(shape, places, pixels, empty.nonzero()[:, 0], rows_of_rising * shape[1])


def _mask_pixels(masks: list[Tensor], windows: Tensor) -> Tensor:
    """Masks, N tensors (M,H,W), inside the windows [R,4] of all cells -> [P]."""
    pixels = torch.cat([m.flatten() for m in masks])
    counts = torch.tensor([len(m) for m in masks])
    height, width = torch.tensor([m.shape[1:] for m in masks]).repeat_interleave(counts, dim=0).unbind(1)
    first = (height * width).cumsum(0) - height * width + windows[:, 1] * width + windows[:, 0]
    crop, y, x = crop_pixels(window_sizes(windows), pixels.device)
    return pixels[first.to(pixels.device)[crop] + y * width.to(pixels.device)[crop] + x]


def _table(maps: Tensor) -> Tensor:
    """Maps [N,C,h,w] as rows of pixels [N*h*w,C]."""
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    images = [image.flatten(1).t().contiguous() for image in maps]  # faster than a permutation of the whole
    return torch.cat(images) if len(images) > 1 else images[0]


def _clear(pixels: Tensor, gaps: Tensor) -> Tensor:
    """Zeros at some pixels of [P,C], in place where nothing needs the old values."""
    return pixels.index_fill(0, gaps, 0) if pixels.requires_grad else pixels.index_fill_(0, gaps, 0)

"""The segmentation branch for many crops at once, by packing them: the fast form of `SegmentationBranch.segment_crop`.

Crops have the box's own size, so a batch holds crops of different sizes. Their pixels lie one after another in rows,
which is all that pixel by pixel work asks for; those at full resolution lie side by side on a packed grid, zeros
between them, for the last convolutions. The result equals that of each crop alone.

Letters: N images, L maps, R boxes, C channels, P pixels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from kg_detectron.layers import convolve_resized, crop_pixels
from kg_detectron.modeling.classes import masked_mean
from kg_detectron.modeling.precision import for_losses

if TYPE_CHECKING:
    from kg_detectron.modeling.segmentation_branch import SegmentationBranch

# Most pixels of a row of a packed grid, roughly: several crops share a row, and the grid stays nearly square.
GRID_WIDTH = 1024

# Most pixels of crops that go through the branch together in evaluation on a CPU: more take memory, and no less time.
CPU_CHUNK_PIXELS = 2**16


class PackedGrid(NamedTuple):
    """Crops side by side in rows, with at least one empty pixel between any two."""

    shape: tuple[int, int]
    places: Tensor  # [R,2] int64 on the CPU: first pixel of each crop, pixels from row to row
    pixels: Tensor  # [P] int64, where the pixels of the crops lie, one crop after another
    gaps: Tensor  # int64, the empty pixels
    deep_pixels: int  # pixels of the rows that hold crops with deeper levels; the other crops lie in the rows below


def crop_windows(boxes: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
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


def packed_logits(
    branch: "SegmentationBranch", features: Sequence[Tensor], boxes: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits of all boxes, the pixels of one after those of another [P]; their places, (R,4) on the CPU; and the
    features [R,C] of the cells, by which heads judge them, of no channel where there is no such head."""
    device = features[0].device
    image = torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor([len(b) for b in boxes]))
    windows = crop_windows(torch.cat(boxes).float().cpu(), [f.shape[2:] for f in features])
    if not len(image):
        return features[0].new_zeros(0), windows[0], features[0].new_zeros(0, branch.cell_channels)
    rows = [_pixel_rows(f) for f in features]
    # The nine matrices of each 3x3 kernel after resizing, [9*C',C].
    steps: Any = branch.steps
    matrices = [step.up[0].weight.permute(2, 3, 0, 1).flatten(0, 2) for step in steps]
    shapes = [f.shape[2:] for f in features]
    sizes = window_sizes(windows)
    depth = (sizes >= 2).all(2).cumprod(0).sum(0).clamp(min=1)
    areas = sizes[0].prod(1)
    many = torch.is_grad_enabled() and int(areas.sum()) > branch.chunk_pixels
    pixels = branch.chunk_pixels if torch.is_grad_enabled() or device.type != "cpu" else CPU_CHUNK_PIXELS
    chunks = _chunks(sizes[0], depth, min(pixels, branch.chunk_pixels))
    parts = []
    for chunk in chunks:
        arguments = rows, shapes, matrices, image[chunk], windows[:, chunk], depth[chunk]
        parts.append(
            checkpoint(_segment, branch, *arguments, use_reentrant=False) if many else _segment(branch, *arguments)
        )
    logits, cell_features = (torch.cat(part) for part in zip(*parts, strict=True))
    # Back from the order of the chunks to that of the boxes.
    order = torch.cat(chunks)
    first = torch.empty_like(areas)
    first[order] = areas[order].cumsum(0) - areas[order]
    crop, y, x = crop_pixels(sizes[0], device)
    logits = logits[first.to(device)[crop] + y * sizes[0, :, 1].to(device)[crop] + x]
    return logits, windows[0], cell_features[order.argsort().to(device)]


def _chunks(sizes: Tensor, depth: Tensor, pixels: int) -> list[Tensor]:
    """Crops of sizes [R,2] that go through the branch together, about so many pixels, those that reach deepest first.

    They are of like height, within a factor of two: so they fill the rows of a grid.
    """
    order = sizes[:, 0].argsort(descending=True, stable=True)
    areas = sizes[order].prod(1)
    height = sizes[order, 0].double().log2().floor().long()
    part = (areas.cumsum(0) - areas) // pixels
    _, counts = torch.stack((height, part), dim=1).unique_consecutive(dim=0, return_counts=True)
    return [part[depth[part].argsort(descending=True, stable=True)] for part in order.split(counts.tolist())]


def _segment(
    branch: "SegmentationBranch",
    rows: list[Tensor],
    shapes: Sequence[Sequence[int]],
    matrices: list[Tensor],
    image: Tensor,
    windows: Tensor,
    depth: Tensor,
) -> tuple[Tensor, Tensor]:
    """The crops of a chunk -> logits [P], and the features of the cells [R,C].

    Args:
        rows: the L maps, [N*h*w,C].
        shapes: (h, w) of each map.
        matrices: see `_upsample`, of each step.
        image: [R], on the CPU like the next.
        windows: [L,R,4].
        depth: [R] number of maps that each crop reaches, falling.
    """
    device = rows[0].device
    sizes = window_sizes(windows)
    pixels = rows[0].new_zeros(0)
    for level in reversed(range(int(depth[0]))):
        here, deep_crops = int((depth > level).sum()), int((depth > level + 1).sum())
        crop, y, x = crop_pixels(sizes[level, :here], device)
        height, width = shapes[level]
        left, top = windows[level, :here, :2].unbind(1)
        first = (image[:here] * height + top) * width + left
        index = first.to(device)[crop] + y * width + x
        if level == 0:
            grid = pack(sizes[0], deep_crops, device)
            # Empty pixels take any pixel.
            index = index.new_zeros(grid.shape[0] * grid.shape[1]).index_copy_(0, grid.pixels, index)
            places, count = grid.places, grid.deep_pixels
        else:
            areas = sizes[level, :here].prod(1)
            places = torch.stack((areas.cumsum(0) - areas, sizes[level, :here, 1]), dim=1)
            count = int(areas[:deep_crops].sum())
        shallow = rows[level].index_select(0, index)
        parts = []
        if deep_crops:
            deep = _upsample(branch, level, matrices[level], pixels, sizes[:, :deep_crops], places[:deep_crops], count)
            parts.append(_concatenate(branch, level, deep, shallow[:count]))
        if count < len(shallow):
            parts.append(_project(branch, level, shallow[count:]))
        pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
    pixels = _zeroed(pixels, grid.gaps)
    hidden = branch.hidden(pixels.view(1, *grid.shape, -1).permute(0, 3, 1, 2))
    hidden = _zeroed(hidden.permute(0, 2, 3, 1).reshape(len(pixels), -1), grid.gaps)
    logits = _predict(branch, hidden, grid.shape).flatten()[grid.pixels]
    if not branch.cell_channels:
        return logits, logits.new_zeros(len(image), 0)
    crop, y, x = crop_pixels(sizes[0], device)
    probability = logits.detach().sigmoid()
    inside = hidden[grid.pixels]
    if branch.only_hidden:
        return logits, masked_mean(inside, probability, crop, len(image))
    inside = torch.cat((pixels[grid.pixels], inside), dim=1)
    means = [masked_mean(inside, probability, crop, len(image))]
    x, y = x + windows[0, :, 0].to(device)[crop], y + windows[0, :, 1].to(device)[crop]
    for level, (height, width) in enumerate(shapes[1:], start=1):
        # Each pixel of the map counts once for a crop, by the sum of the probabilities of the crop's pixels in it.
        low, high = windows[0, :, :2] >> level, (windows[0, :, 2:] - 1 >> level) + 1
        areas = (high - low).prod(1)
        first, wide = (areas.cumsum(0) - areas).to(device), (high - low)[:, 0].to(device)
        left, top = low.to(device).unbind(1)
        place = first[crop] + ((y >> level) - top[crop]) * wide[crop] + (x >> level) - left[crop]
        of_map, row, column = crop_pixels((high - low).flip(1), device)
        weight = probability.new_zeros(len(of_map), dtype=for_losses(probability).dtype)
        weight.index_add_(0, place, probability.to(weight))
        index = (image.to(device)[of_map] * height + top[of_map] + row) * width + left[of_map] + column
        means.append(masked_mean(rows[level].index_select(0, index), weight, of_map, len(image)))
    return logits, torch.cat(means, dim=1)


def _predict(branch: "SegmentationBranch", pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """The last convolution on a grid [H*W,C] -> [H,W]. Of one channel, it is faster as nine shifted planes."""
    planes = (branch.predict.weight[0].flatten(1).T @ pixels.T).view(3, 3, *shape)
    planes = pad(planes, (1, 1, 1, 1))
    shifted = [planes[y, x, y : y + shape[0], x : x + shape[1]] for y in range(3) for x in range(3)]
    return sum(shifted[1:], shifted[0]) + branch.predict.get_parameter("bias")


def _upsample(
    branch: "SegmentationBranch",
    level: int,
    matrices: Tensor,
    pixels: Tensor,
    sizes: Tensor,
    places: Tensor,
    count: int,
) -> Tensor:
    """Crops [P,C] of the next deeper level, resized to this one, conv3x3, ReLU -> [count,C'].

    The nine matrices of the kernel, [9*C',C], are applied before resizing, to a quarter of the pixels.
    """
    products = linear(pixels, matrices).view(len(pixels), 9, -1)
    deep = convolve_resized(products, sizes[level + 1], sizes[level], places, count)
    step: Any = branch.steps[level]
    return deep.add_(step.up[0].bias).relu_()


def _concatenate(branch: "SegmentationBranch", level: int, deep: Tensor, shallow: Tensor) -> Tensor:
    """Concatenation, conv1x1, ReLU of pixels [P,C] and [P,c]."""
    step: Any = branch.steps[level]
    layer = step.combine[0]
    of_deep, of_shallow = layer.weight[:, :, 0, 0].split((deep.shape[1], shallow.shape[1]), dim=1)
    return torch.addmm(linear(deep, of_deep, layer.bias), shallow, of_shallow.T).relu_()


def _project(branch: "SegmentationBranch", level: int, pixels: Tensor) -> Tensor:
    """Pixels [P,C] of crops whose deepest level this is."""
    if level == len(branch.project) or isinstance(branch.project[level], nn.Identity):
        return pixels
    project: Any = branch.project[level]
    layer = project[0]
    return linear(pixels, layer.weight[:, :, 0, 0], layer.bias).relu_()


def pack(sizes: Tensor, deep_crops: int, device: torch.device) -> PackedGrid:
    """Places for crops of sizes [R,2]; those from `deep_crops` on lie in rows below the others."""
    below = (torch.arange(len(sizes)) >= deep_crops).long()
    order = (below * (1 + sizes[:, 0].max()) - sizes[:, 0]).argsort(stable=True)  # each row as high as its first crop
    height, width = (sizes[order] + 1).unbind(1)
    before = width.cumsum(0) - width
    # The rows of each part get about equally many pixels, for the last one is as wide as the others.
    total = torch.zeros(2, dtype=torch.long).index_add_(0, below[order], width)
    rows = -(-total // GRID_WIDTH)
    of_part = before - below[order] * total[0]
    full = of_part * rows[below[order]] // total[below[order]]
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
    rows_of_deep = int(bottom[row[deep_crops - 1]]) if deep_crops else 0
    return PackedGrid(shape, places, pixels, empty.nonzero()[:, 0], rows_of_deep * shape[1])


def _pixel_rows(maps: Tensor) -> Tensor:
    """Maps [N,C,h,w] as rows of pixels [N*h*w,C]."""
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    images = [image.flatten(1).t().contiguous() for image in maps]  # faster than a permutation of the whole
    return torch.cat(images) if len(images) > 1 else images[0]


def _zeroed(pixels: Tensor, gaps: Tensor) -> Tensor:
    """Zeros at some pixels of [P,C], in place where nothing needs the old values."""
    return pixels.index_fill(0, gaps, 0) if pixels.requires_grad else pixels.index_fill_(0, gaps, 0)

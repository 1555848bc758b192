"""The checks of arguments in the PyTorch reference; the compiled kernels have the same ones in csrc/checks.h.

Every error names the argument, what was expected and what came.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import NUM_KEYPOINTS


def _check_maps(name: str, maps: Tensor, channels: int | None = None) -> None:
    if maps.dim() != 4 or not maps.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor (N,C,H,W), got {maps.dtype} of shape {tuple(maps.shape)}"
        )
    if channels is not None and maps.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got shape {tuple(maps.shape)}")


def _check_positive(name: str, value: float, zero: bool = False) -> None:
    if not (value > 0 or zero and value == 0) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a {'non-negative' if zero else 'positive'} finite number, got {value}")


def check_votes(heatmap: Tensor, offsets: Tensor, radius: float) -> None:
    """For `hough_vote`."""
    _check_maps("heatmap", heatmap)
    n, k, h, w = heatmap.shape
    _check_maps("offsets", offsets, 2 * k)
    if offsets.shape != (n, 2 * k, h, w) or offsets.device != heatmap.device:
        raise ValueError(
            f"offsets: expected shape {(n, 2 * k, h, w)} on {heatmap.device}, "
            f"got {tuple(offsets.shape)} on {offsets.device}"
        )
    _check_positive("radius", radius)


def check_smoothing(votes: Tensor, sigma: float) -> None:
    """For `smooth_votes`."""
    _check_maps("votes", votes)
    _check_positive("sigma", sigma, zero=True)


def _check_scales(name: str, maps: Sequence[Tensor], channels: int | None = None) -> None:
    """Maps of one batch at several scales."""
    if not maps:
        raise ValueError(f"{name}: expected the maps of at least one scale, got none")
    for scale in maps:
        _check_maps(name, scale, channels)
        facts, expected = ((tuple(m.shape[:2]), m.dtype, m.device) for m in (scale, maps[0]))
        if facts != expected:
            raise ValueError(f"{name}: expected (N,C), type and device {expected} at every scale, got {facts}")


def check_threshold(scores: Sequence[Tensor], threshold: float) -> None:
    """For `find_peaks`."""
    _check_scales("scores", scores)
    if math.isnan(threshold):
        raise ValueError(f"threshold: expected a number, got {threshold}")


def _check_peaks(peaks: Tensor) -> None:
    if peaks.dim() != 2 or peaks.shape[1] != 4 or peaks.dtype != torch.int64:
        raise ValueError(f"peaks: expected int64 (P,4), got {peaks.dtype} of shape {tuple(peaks.shape)}")


def _check_edges(edges: Sequence[tuple[int, int]]) -> None:
    keypoints = range(NUM_KEYPOINTS)
    if len(set(edges)) < len(edges) or any(k == l or k not in keypoints or l not in keypoints for k, l in edges):
        raise ValueError(f"edges: expected different pairs of different keypoints below {NUM_KEYPOINTS}, got {edges}")


def check_gathering(peaks: Tensor, group_offsets: Sequence[Tensor], edges: Sequence[tuple[int, int]]) -> None:
    """For `gather_displacements`."""
    _check_peaks(peaks)
    _check_edges(edges)
    _check_scales("group_offsets", group_offsets, 2 * len(edges))
    if peaks.device != group_offsets[0].device:
        raise ValueError(
            f"peaks and group_offsets: expected one device, got {peaks.device} and {group_offsets[0].device}"
        )


def check_positions(peaks: Tensor, group_offsets: Tensor) -> None:
    """For `group_keypoints`: every peak is a pixel of the maps."""
    n, _, h, w = group_offsets.shape
    limit = torch.tensor([n, NUM_KEYPOINTS, h, w], device=peaks.device)
    if not len(peaks):
        return
    lowest, highest = peaks.aminmax(dim=0)
    if bool(((lowest < 0) | (highest >= limit)).any()):
        raise ValueError(f"peaks: expected image, keypoint, y, x below {limit.tolist()}, got {highest.tolist()}")


def check_grouping(
    peaks: Tensor, scores: Tensor, displacements: Tensor, match_radius: float, reject_radius: float, hops: int
) -> None:
    """For `group_peaks`, but for the positions of the peaks: they are looked at where the peaks are."""
    _check_peaks(peaks)
    count = peaks.shape[0]  # len() would ask `torch.export` for a number
    for name, values, shape in (
        ("scores", scores, (count,)),
        ("displacements", displacements, (count, NUM_KEYPOINTS - 1, 2)),
    ):
        if tuple(values.shape) != shape or not values.is_floating_point():
            raise ValueError(
                f"{name}: expected floating-point {shape}, got {values.dtype} of shape {tuple(values.shape)}"
            )
    if not peaks.device == scores.device == displacements.device:
        raise ValueError(
            f"peaks, scores and displacements: expected one device, "
            f"got {peaks.device}, {scores.device} and {displacements.device}"
        )
    if hops not in (1, 2):
        raise ValueError(f"hops: expected 1 or 2, got {hops}")
    _check_positive("match_radius", match_radius, zero=True)
    _check_positive("reject_radius", reject_radius, zero=True)


def check_graphs(graphs: Tensor) -> None:
    """For `graphs_to_boxes`."""
    if graphs.dim() != 3 or graphs.shape[1:] != (NUM_KEYPOINTS, 3) or not graphs.is_floating_point():
        raise ValueError(
            f"graphs: expected a floating-point tensor (G,5,3), got {graphs.dtype} of shape {tuple(graphs.shape)}"
        )


def check_targets(
    boxes: Tensor,
    image: Tensor,
    images: int,
    height: int,
    width: int,
    stride: float,
    radius: float,
    edges: Sequence[tuple[int, int]],
) -> None:
    """For `render_targets`."""
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
        raise ValueError(f"boxes: expected float32 (M,4), got {boxes.dtype} of shape {tuple(boxes.shape)}")
    if image.shape != boxes.shape[:1] or image.dtype != torch.int64 or image.device != boxes.device:
        raise ValueError(
            f"image: expected int64 {tuple(boxes.shape[:1])} on {boxes.device}, "
            f"got {image.dtype} of shape {tuple(image.shape)} on {image.device}"
        )
    if min(images, height, width) < 0:
        raise ValueError(f"images, height and width: expected no negative ones, got {images}, {height} and {width}")
    if len(image) and not 0 <= int(image.min()) <= int(image.max()) < images:
        raise ValueError(f"image: expected indices below {images}, got {int(image.min())} to {int(image.max())}")
    _check_positive("stride", stride)
    _check_positive("radius", radius)
    _check_edges(edges)


def check_products(products: Tensor) -> None:
    """For `convolve_resized`."""
    if products.dim() != 3 or products.shape[1] != 9 or not products.is_floating_point():
        raise ValueError(
            f"products: expected a floating-point tensor (P,9,C), got {products.dtype} of shape {tuple(products.shape)}"
        )


def check_crops(products: int, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> None:
    """The tables of `convolve_resized`, for so many pixels of products and of the result."""
    for name, table in (("before", before), ("after", after), ("places", places)):
        if table.shape != (len(before), 2) or table.dtype != torch.int64 or table.device.type != "cpu":
            raise ValueError(
                f"{name}: expected int64 ({len(before)},2) on the CPU, "
                f"got {table.dtype} of shape {tuple(table.shape)} on {table.device}"
            )
    if len(before) and min(before.min(), after.min()) < 1:
        raise ValueError(f"before, after: expected sides of at least 1, got {before.min()} and {after.min()}")
    if before.prod(1).sum() != products:
        raise ValueError(f"products: expected {before.prod(1).sum()} pixels, as `before` says, got {products}")
    last = places[:, 0] + (after[:, 0] - 1) * places[:, 1] + after[:, 1]
    if bool(((places[:, 0] < 0) | (places[:, 1] < after[:, 1]) | (last > pixels)).any()):
        raise ValueError(f"places: expected crops within {pixels} pixels, got {places.tolist()}")


def check_depthwise(input: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> None:
    """For `depthwise_weight_gradient`."""
    _check_maps("input", input)
    if kernel < 1 or stride < 1 or padding < 0:
        raise ValueError(
            "kernel, stride and padding: expected 1 or more, 1 or more and 0 or more, "
            f"got {kernel}, {stride} and {padding}"
        )
    sides = [side + 2 * padding - kernel for side in input.shape[2:]]
    expected = (*input.shape[:2], *(side // stride + 1 for side in sides))
    _check_maps("gradient", gradient, input.shape[1])
    if min(sides) < 0 or tuple(gradient.shape) != expected or gradient.device != input.device:
        raise ValueError(
            f"gradient: expected shape {expected} on {input.device}, got {tuple(gradient.shape)} on {gradient.device}"
        )

"""The keypoint-graph operators: compiled where they were built for the device, `reference` elsewhere.

`reference` says what each one does and takes; the letters are its letters. Beside every wrapper stands its fake, which
gives the shapes to `torch.compile`. On a GPU, `find_peaks`, `group_peaks` and `graphs_to_boxes` wait for the device
once each, for the size of their result, whatever the number of images and scales; `group_keypoints` also to hear of
peaks outside the maps. The others never wait.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import GROUP_OFFSET_CHANNELS, NUM_KEYPOINTS, SINGLE_OFFSET_CHANNELS
from . import reference
from .checks import (
    check_crops,
    check_gathering,
    check_graphs,
    check_grouping,
    check_positions,
    check_smoothing,
    check_threshold,
    check_votes,
)

# Those that are compiled for every device, and those for the CPU alone.
OPERATORS = (
    "hough_vote",
    "smooth_votes",
    "find_peaks",
    "gather_displacements",
    "group_peaks",
    "graphs_to_boxes",
    "render_targets",
)
CPU_OPERATORS = ("convolve_resized", "convolve_resized_backward")


def _load() -> frozenset[str]:
    """Load the compiled operators; the types of device that they were built for."""
    chosen = os.environ.get("KG_DETECTRON_LIBRARY")  # another build of it, for tools/sanitize.py
    library = Path(chosen) if chosen else next(Path(__file__).parent.glob("_C.*"), None)
    if library is None:
        return frozenset()
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built for another PyTorch
        warnings.warn(f"kg_detectron: {library.name} does not load ({error})", stacklevel=2)
        return frozenset()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        return frozenset(
            key.lower()
            for key, names in (("CPU", OPERATORS + CPU_OPERATORS), ("CUDA", OPERATORS))
            if all(has(f"kg_detectron::{name}", key) for name in names)
        )
    except RuntimeError as error:  # built from older sources, without one of them
        warnings.warn(f"kg_detectron: {library.name} is out of date ({error})", stacklevel=2)
        return frozenset()


COMPILED_FOR = _load()
_warned: set[str] = set()


def _is_compiled(device: torch.device) -> bool:
    """Whether the operators were built for this type of device; a warning, once, where they were not."""
    if device.type in COMPILED_FOR:
        return True
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"kg_detectron: its operators are not compiled for {device.type}, and their slow PyTorch reference runs. "
            f"To build them, have a C++ compiler{', CUDA_HOME' if device.type == 'cuda' else ''} and ninja, and run "
            "`make setup`, or `pip install --no-build-isolation .`, in a checkout of kg_detectron.",
            stacklevel=3,
        )
    return False


def _register_fake(name: str) -> Callable:
    """`torch.library.register_fake`, where there is an operator to register it for."""
    if COMPILED_FOR:
        return torch.library.register_fake(f"kg_detectron::{name}")
    return lambda fake: fake


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def hough_vote(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    check_votes(heatmap, offsets, radius)
    if not _is_compiled(heatmap.device):
        return reference.hough_vote(heatmap, offsets, radius)
    return torch.ops.kg_detectron.hough_vote(heatmap, offsets, radius)


@_register_fake("hough_vote")
def _(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    return heatmap.new_empty(heatmap.shape, dtype=_wide(heatmap.dtype))


@torch.no_grad()
def smooth_votes(votes: Tensor, sigma: float) -> Tensor:
    check_smoothing(votes, sigma)
    if sigma == 0:
        return votes.to(_wide(votes.dtype))
    if not _is_compiled(votes.device):
        return reference.smooth_votes(votes, sigma)
    return torch.ops.kg_detectron.smooth_votes(votes, sigma)


@_register_fake("smooth_votes")
def _(votes: Tensor, sigma: float) -> Tensor:
    return votes.new_empty(votes.shape, dtype=_wide(votes.dtype))


@torch.no_grad()
def find_peaks(scores: Tensor | Sequence[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    maps = [scores] if isinstance(scores, Tensor) else scores
    check_threshold(maps, threshold)
    if not _is_compiled(maps[0].device):
        return reference.find_peaks(maps, threshold)
    return torch.ops.kg_detectron.find_peaks(maps, threshold)


@_register_fake("find_peaks")
def _(maps: list[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return maps[0].new_empty((count, 4), dtype=torch.int64), maps[0].new_empty((count,))


@torch.no_grad()
def gather_displacements(peaks: Tensor, group_offsets: Sequence[Tensor]) -> Tensor:
    check_gathering(peaks, group_offsets)
    if not _is_compiled(peaks.device):
        return reference.gather_displacements(peaks, group_offsets)
    return torch.ops.kg_detectron.gather_displacements(peaks, group_offsets)


@_register_fake("gather_displacements")
def _(peaks: Tensor, group_offsets: list[Tensor]) -> Tensor:
    return group_offsets[0].new_empty((peaks.shape[0], NUM_KEYPOINTS - 1, 2))


@torch.no_grad()
def group_keypoints(
    peaks: Tensor,
    scores: Tensor,
    group_offsets: Tensor,
    match_radius: float = 6,
    reject_radius: float = 10,
    hops: int = 1,
) -> tuple[Tensor, Tensor]:
    displacements = gather_displacements(peaks, [group_offsets])
    check_positions(peaks, group_offsets)
    return group_peaks(peaks, scores, displacements, match_radius, reject_radius, hops)


@torch.no_grad()
def group_peaks(
    peaks: Tensor,
    scores: Tensor,
    displacements: Tensor,
    match_radius: float = 6,
    reject_radius: float = 10,
    hops: int = 1,
) -> tuple[Tensor, Tensor]:
    check_grouping(peaks, scores, displacements, match_radius, reject_radius, hops)
    if not _is_compiled(peaks.device):
        return reference.group_peaks(peaks, scores, displacements, match_radius, reject_radius, hops)
    return torch.ops.kg_detectron.group_peaks(peaks, scores, displacements, match_radius, reject_radius, hops)


@_register_fake("group_peaks")
def _(
    peaks: Tensor, scores: Tensor, displacements: Tensor, match_radius: float, reject_radius: float, hops: int
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((count, NUM_KEYPOINTS, 3), dtype=_wide(scores.dtype)), peaks.new_empty((count,))


@torch.no_grad()
def graphs_to_boxes(graphs: Tensor, corner_and_centre: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check_graphs(graphs)
    if not _is_compiled(graphs.device):
        return reference.graphs_to_boxes(graphs, corner_and_centre)
    return torch.ops.kg_detectron.graphs_to_boxes(graphs, corner_and_centre)


@_register_fake("graphs_to_boxes")
def _(graphs: Tensor, corner_and_centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return graphs.new_empty((count, 4)), graphs.new_empty((count,)), graphs.new_empty((count,), dtype=torch.int64)


@torch.no_grad()
def render_targets(
    boxes: Tensor,
    image: Tensor,
    images: int,
    height: int,
    width: int,
    stride: float,
    radius: float,
    min_side: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_compiled(boxes.device):
        return reference.render_targets(boxes, image, images, height, width, stride, radius, min_side)
    return torch.ops.kg_detectron.render_targets(boxes, image, images, height, width, stride, radius, min_side)


@_register_fake("render_targets")
def _(
    boxes: Tensor,
    image: Tensor,
    images: int,
    height: int,
    width: int,
    stride: float,
    radius: float,
    min_side: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        boxes.new_empty((images, channels, height, width))
        for channels in (NUM_KEYPOINTS, SINGLE_OFFSET_CHANNELS, GROUP_OFFSET_CHANNELS)
    )


def convolve_resized(products: Tensor, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> Tensor:
    check_crops(products, before, after, places, pixels)
    if products.device.type != "cpu" or not _is_compiled(products.device):
        # Gathering and adding is all that a kernel of its own could do on a GPU.
        return reference.convolve_resized(products, before, after, places, pixels)
    tables = (table.contiguous() for table in (before, after, places))
    return torch.ops.kg_detectron.convolve_resized(products, *tables, pixels)


@_register_fake("convolve_resized")
def _(products: Tensor, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> Tensor:
    return products.new_empty((pixels, products.shape[2]))


@_register_fake("convolve_resized_backward")
def _(gradient: Tensor, products: int, before: Tensor, after: Tensor, places: Tensor) -> Tensor:
    return gradient.new_empty((products, 9, gradient.shape[1]))


def _keep_tables(ctx: Any, inputs: tuple, output: Tensor) -> None:
    products, *tables, _ = inputs
    ctx.count = len(products)
    ctx.save_for_backward(*tables)


def _propagate_resized(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    products = torch.ops.kg_detectron.convolve_resized_backward(gradient, ctx.count, *ctx.saved_tensors)
    return products, None, None, None, None


if COMPILED_FOR:
    torch.library.register_autograd("kg_detectron::convolve_resized", _propagate_resized, setup_context=_keep_tables)

for _operator in (
    convolve_resized,
    hough_vote,
    smooth_votes,
    find_peaks,
    gather_displacements,
    group_keypoints,
    group_peaks,
    graphs_to_boxes,
    render_targets,
):
    _operator.__doc__ = getattr(reference, _operator.__name__).__doc__

"""The keypoint-graph operators: for each one its schema, its typed wrapper, and its fake.

An operator has up to three kernels, and PyTorch's dispatcher chooses among them: C++ (csrc/cpu), CUDA (csrc/cuda), and
for every other device, or where nothing was compiled, the PyTorch reference (`reference`), with a warning. Each kernel
checks its arguments first, so that they are checked once, by whatever way they come. The fakes give shapes to
`torch.compile` and `torch.export`.

Letters: N images, K keypoint types, H x W pixels of one scale, P peaks, G graphs, R boxes. x points right, y down.
Coordinates are pixel indices of the scale. Only `convolve_resized` is differentiable.

On a GPU, `find_peaks`, `group_peaks` and `graphs_to_boxes` wait for the device once each, for the size of their result,
whatever the number of images and scales; `group_keypoints` also to learn of peaks outside the maps. The others never
wait.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from ..graph import DIRECTED_EDGES, NUM_KEYPOINTS, SINGLE_OFFSET_CHANNELS
from . import reference
from .checks import check_positions

OPERATORS = (
    "hough_vote",
    "smooth_votes",
    "find_peaks",
    "gather_displacements",
    "group_peaks",
    "graphs_to_boxes",
    "render_targets",
    "convolve_resized",
    "convolve_resized_backward",
)

_SUFFIXES = (".so", ".pyd")  # of the library; beside it lies _C.torch, the version of PyTorch that it was built for
_BUILD = "run `make setup`, or `pip install --no-build-isolation .`, in a checkout of kg_detectron"


def _load_library() -> None:
    """Load the compiled kernels, where there are any that fit the installed PyTorch."""
    chosen = os.environ.get("KG_DETECTRON_LIBRARY")  # another build, for tools/sanitize.py
    found = (path for path in sorted(Path(__file__).parent.glob("_C.*")) if path.suffix in _SUFFIXES)
    library = Path(chosen) if chosen else next(found, None)
    if library is None:
        return
    problem = _mismatch(library)
    if not problem:
        try:
            torch.ops.load_library(library)
        except OSError as error:  # built for another PyTorch, or for another system
            problem = str(error)
    if problem:
        warnings.warn(
            f"kg_detectron: {library.name} does not load ({problem}); to build it again, {_BUILD}", stacklevel=2
        )


def _mismatch(library: Path) -> str:
    """Why a library cannot fit the installed PyTorch; "" where it may.

    PyTorch keeps its binary interface within a minor version. A library of another one may load all the same, and fail
    later, or end the process.
    """
    note = library.with_name("_C.torch")
    if not note.is_file():
        return ""
    built_for = note.read_text(encoding="utf-8").strip()
    if built_for.split(".")[:2] == torch.__version__.split(".")[:2]:
        return ""
    return f"it was built for PyTorch {built_for}, and {torch.__version__} is installed"


_load_library()
_warned: set[str] = set()


def _define(schema: str, kernel: Callable[..., Any]) -> None:
    """Define an operator, with its reference as the kernel of all devices that have none of their own."""
    name = schema.split("(", 1)[0]

    @functools.wraps(kernel)
    def fallback(*arguments: Any) -> Any:
        first = arguments[0] if isinstance(arguments[0], Tensor) else next(iter(arguments[0]), None)
        if first is not None:
            _warn_once(first.device.type)
        return kernel(*arguments)

    try:
        torch.library.define(f"kg_detectron::{name}", schema.removeprefix(name))
        torch.library.impl(f"kg_detectron::{name}", "default", fallback)
    except RuntimeError as error:  # its signatures are others
        message = f"kg_detectron: its compiled operators are out of date; to build them again, {_BUILD}"
        raise ImportError(message) from error


def _warn_once(device: str) -> None:
    """Say that the operators are not compiled for this type of device, where that is so."""
    if device in COMPILED_FOR or device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"kg_detectron: its operators are not compiled for {device}, and their slow PyTorch reference runs. To build "
        f"them, have a C++ compiler{', CUDA_HOME' if device == 'cuda' else ''} and ninja, and {_BUILD}.",
        stacklevel=4,
    )


def _flat(edges: Sequence[tuple[int, int]]) -> list[int]:
    """Edges as a schema takes them: k and l of each one, one after another."""
    return list(chain.from_iterable(edges))


def _pairs(edges: list[int]) -> list[tuple[int, int]]:
    return list(zip(edges[::2], edges[1::2], strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_define("hough_vote(Tensor heatmap, Tensor offsets, float radius) -> Tensor", reference.hough_vote)


@torch.no_grad()
def hough_vote(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    """Hough voting (paper, equation 2).

    Every pixel x casts its heatmap probability to x + s(x), bilinearly, scaled by 1 / (pi radius^2). Votes that land
    outside the map are dropped, corner by corner. A value or an offset that is not finite casts no vote.

    Args:
        heatmap: (N, K, H, W) probabilities.
        offsets: (N, 2K, H, W) single offsets, channels 2k, 2k+1 = x, y, in pixels.
        radius: disc radius, pixels.

    Returns:
        (N, K, H, W) keypoint scores, float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes, types or a radius that do not fit.
    """
    return torch.ops.kg_detectron.hough_vote(heatmap, offsets, radius)


@torch.library.register_fake("kg_detectron::hough_vote")
def _(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    return heatmap.new_empty(heatmap.shape, dtype=_wide(heatmap.dtype))


_define("smooth_votes(Tensor votes, float sigma) -> Tensor", reference.smooth_votes)


@torch.no_grad()
def smooth_votes(votes: Tensor, sigma: float) -> Tensor:
    """Gaussian of the votes: half-sample symmetric border, truncated at 4 sigma.

    Args:
        votes: (N, K, H, W).
        sigma: standard deviation, pixels; 0 copies the votes.

    Returns:
        (N, K, H, W), float32 (float64 for float64 input).

    Raises:
        ValueError: for maps of another shape or type, or a negative sigma.
    """
    return torch.ops.kg_detectron.smooth_votes(votes, sigma)


@torch.library.register_fake("kg_detectron::smooth_votes")
def _(votes: Tensor, sigma: float) -> Tensor:
    return votes.new_empty(votes.shape, dtype=_wide(votes.dtype))


_define("find_peaks(Tensor[] scores, float threshold) -> (Tensor peaks, Tensor values)", reference.find_peaks)


@torch.no_grad()
def find_peaks(scores: Tensor | Sequence[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    """Local maxima of the score maps (paper, section 2.1, step 2).

    A peak is a pixel that is above the threshold and equal to the maximum of its 4-neighbourhood. Values that are not
    finite are no peaks and hide none.

    Args:
        scores: (N, K, H, W), or a sequence of them, one for each scale.
        threshold: peaks are strictly above it.

    Returns:
        peaks: (P, 4) int64, columns image, keypoint, y, x; ordered by image, then falling score, then keypoint, y, x.
            Of several scales, "image" is image + N * index of the scale.
        scores: (P,) their scores.

    Raises:
        ValueError: for maps of another shape or type, or scales that differ in more than their size.
    """
    return torch.ops.kg_detectron.find_peaks([scores] if isinstance(scores, Tensor) else scores, threshold)


@torch.library.register_fake("kg_detectron::find_peaks")
def _(scores: list[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return scores[0].new_empty((count, 4), dtype=torch.int64), scores[0].new_empty((count,))


_define(
    "gather_displacements(Tensor peaks, Tensor[] group_offsets, int[] edges) -> Tensor",
    lambda peaks, group_offsets, edges: reference.gather_displacements(peaks, group_offsets, _pairs(edges)),
)


@torch.no_grad()
def gather_displacements(
    peaks: Tensor, group_offsets: Sequence[Tensor], edges: Sequence[tuple[int, int]] = DIRECTED_EDGES
) -> Tensor:
    """The group offsets at the peaks, towards the other keypoints.

    Args:
        peaks: (P, 4) int64, columns image + N * index of the scale, keypoint, y, x.
        group_offsets: (N, 2E, H, W) of each scale; channels 2e, 2e+1 = x, y of edge e, in pixels.
        edges: keypoints k, l of the E directed edges k -> l.

    Returns:
        (P, 4, 2): for a peak of keypoint k the x, y of g(k -> l), l ascending without k; not numbers for a peak outside
        the maps and for a pair without an edge.

    Raises:
        ValueError: for shapes, types, devices or edges that do not fit.
    """
    return torch.ops.kg_detectron.gather_displacements(peaks, group_offsets, _flat(edges))


@torch.library.register_fake("kg_detectron::gather_displacements")
def _(peaks: Tensor, group_offsets: list[Tensor], edges: list[int]) -> Tensor:
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
    """`group_peaks` with the displacements that the maps of one scale have at the peaks.

    Args:
        peaks: (P, 4) int64, columns image, keypoint, y, x, in the order of `find_peaks`.
        scores: (P,) positive scores.
        group_offsets: (N, 40, H, W), in pixels.
        match_radius: see `group_peaks`.
        reject_radius: see there.
        hops: see there.

    Returns:
        graphs: (G, 5, 3) and image: (G,), see `group_peaks`.

    Raises:
        ValueError: for shapes, types, peaks outside the maps, or options that do not fit.
    """
    displacements = gather_displacements(peaks, [group_offsets])
    check_positions(peaks, group_offsets)
    return group_peaks(peaks, scores, displacements, match_radius, reject_radius, hops)


_define(
    "group_peaks(Tensor peaks, Tensor scores, Tensor displacements, float match_radius, float reject_radius, int hops) "
    "-> (Tensor graphs, Tensor image)",
    reference.group_peaks,
)


@torch.no_grad()
def group_peaks(
    peaks: Tensor,
    scores: Tensor,
    displacements: Tensor,
    match_radius: float = 6,
    reject_radius: float = 10,
    hops: int = 1,
) -> tuple[Tensor, Tensor]:
    """Link peaks into keypoint graphs, greedily by falling score (paper, section 2.1, step 2).

    For each image: the best remaining peak leaves the queue; unless it lies within `reject_radius` of a present
    keypoint of its type in an existing graph, it opens a graph. For each other type l ascending, the peak of type l in
    the queue that is nearest to start + g(start -> l), within `match_radius`, leaves the queue and joins (ties: higher
    score). With ``hops=2`` a type that is still missing is looked for from the joined keypoints too, best score first.

    Args:
        peaks: (P, 4) int64, columns image, keypoint, y, x, in the order of `find_peaks`. The image is any number that
            tells apart what is grouped apart, such as image + N * index of the scale.
        scores: (P,) positive scores.
        displacements: (P, 4, 2) as from `gather_displacements`: for a peak of keypoint k the x, y of the group offset
            there towards each other keypoint l, l ascending without k, in pixels. From one that is not finite, no
            partner is found.
        match_radius: pixels, r + 1 in the paper's code.
        reject_radius: pixels, 2r.
        hops: 1 or 2.

    Returns:
        graphs: (G, 5, 3) x, y, score of each keypoint, score 0 = missing; by image, in the order in which they were
            opened.
        image: (G,) int64, ascending.

    Raises:
        ValueError: for shapes, types, impossible positions (negative, 2^31 or more, no keypoint), or options that do
            not fit.
    """
    return torch.ops.kg_detectron.group_peaks(peaks, scores, displacements, match_radius, reject_radius, hops)


@torch.library.register_fake("kg_detectron::group_peaks")
def _(
    peaks: Tensor, scores: Tensor, displacements: Tensor, match_radius: float, reject_radius: float, hops: int
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((count, NUM_KEYPOINTS, 3), dtype=_wide(scores.dtype)), peaks.new_empty((count,))


_define(
    "graphs_to_boxes(Tensor graphs, bool corner_and_centre) -> (Tensor boxes, Tensor scores, Tensor graph)",
    reference.graphs_to_boxes,
)


@torch.no_grad()
def graphs_to_boxes(graphs: Tensor, corner_and_centre: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Retrieve the boxes of keypoint graphs (paper, section 2.1, step 3, and figure 1d).

    A side of the box is the outermost of its present corners; a side without corners is the opposite side mirrored
    through the centre. Any three keypoints, or two corners of one diagonal, give a box.

    Args:
        graphs: (G, 5, 3) x, y, score (0 = missing).
        corner_and_centre: let one corner with the centre give a box too.

    Returns:
        boxes: (R, 4) x1, y1, x2, y2: pixel indices of the corners, in the frame of the graphs.
        scores: (R,) mean score of the present keypoints.
        graph: (R,) int64, the graph that each box comes from, ascending.

    Raises:
        ValueError: for graphs of another shape or type.
    """
    return torch.ops.kg_detectron.graphs_to_boxes(graphs, corner_and_centre)


@torch.library.register_fake("kg_detectron::graphs_to_boxes")
def _(graphs: Tensor, corner_and_centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return graphs.new_empty((count, 4)), graphs.new_empty((count,)), graphs.new_empty((count,), dtype=torch.int64)


_define(
    "render_targets(Tensor boxes, Tensor image, SymInt images, SymInt height, SymInt width, float stride, "
    "float radius, float min_side, int[] edges) -> (Tensor heatmap, Tensor single_offset, Tensor group_offset)",
    lambda boxes, image, images, height, width, stride, radius, min_side, edges: reference.render_targets(
        boxes, image, images, height, width, stride, radius, min_side, _pairs(edges)
    ),
)


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
    edges: Sequence[tuple[int, int]] = DIRECTED_EDGES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training targets of one scale (paper, equations 1 and 3); `modeling.keypoint_targets` says what they are.

    Args:
        boxes: (M, 4) float32, xyxy continuous (x2 = last pixel + 1), input pixels.
        image: (M,) int64, the image of each box.
        images: N, their number.
        height: H of the maps.
        width: W of the maps.
        stride: of the scale.
        radius: of the discs, pixels of the scale.
        min_side: boxes are targets where both sides, last minus first pixel, exceed it; pixels of the scale.
        edges: keypoints k, l of the E directed edges k -> l, in the order of the group offset channels.

    Returns:
        heatmap (N, 5, H, W), single offset (N, 10, H, W), group offset (N, 2E, H, W), float32.

    Raises:
        ValueError: for shapes, types, sizes or edges that do not fit.
    """
    return torch.ops.kg_detectron.render_targets(
        boxes, image, images, height, width, stride, radius, min_side, _flat(edges)
    )


@torch.library.register_fake("kg_detectron::render_targets")
def _(
    boxes: Tensor,
    image: Tensor,
    images: int,
    height: int,
    width: int,
    stride: float,
    radius: float,
    min_side: float,
    edges: list[int],
) -> tuple[Tensor, ...]:
    channels = NUM_KEYPOINTS, SINGLE_OFFSET_CHANNELS, len(edges)
    return tuple(boxes.new_empty((images, count, height, width)) for count in channels)


_define(
    "convolve_resized(Tensor products, Tensor before, Tensor after, Tensor places, SymInt pixels) -> Tensor",
    reference.convolve_resized,
)
_define(
    "convolve_resized_backward(Tensor gradient, SymInt products, Tensor before, Tensor after, Tensor places) -> Tensor",
    reference.convolve_resized_backward,
)


def convolve_resized(products: Tensor, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> Tensor:
    """Convolution 3x3 of resized crops, each by itself (paper, figure 1b: up-sampling and the convolution after it).

    Resizing (bilinear, align_corners False) and the convolution are linear: the nine matrices of the kernel may be
    applied before resizing, to the fewer pixels. This does the rest: it resizes the nine products of every crop and
    adds them up, each shifted by its place in the kernel, with zeros around the crop. Differentiable in `products`.

    Args:
        products: (P, 9, C): the pixels of R crops, row by row, one crop after another, times each matrix of the kernel,
            from its upper left to its lower right.
        before: (R, 2) int64 on the CPU, height and width of the crops.
        after: (R, 2) int64 on the CPU, height and width to which they are resized.
        places: (R, 2) int64 on the CPU, where the resized crops lie in the result: the first pixel, and the number of
            pixels from there to the next row of the crop. They must not overlap.
        pixels: of the result.

    Returns:
        (pixels, C): the resized and convolved crops, without bias; 0 elsewhere.

    Raises:
        ValueError: for shapes, types, sizes or places that do not fit.
    """
    return torch.ops.kg_detectron.convolve_resized(products, before, after, places, pixels)


@torch.library.register_fake("kg_detectron::convolve_resized")
def _(products: Tensor, before: Tensor, after: Tensor, places: Tensor, pixels: int) -> Tensor:
    return products.new_empty((pixels, products.shape[2]))


@torch.library.register_fake("kg_detectron::convolve_resized_backward")
def _(gradient: Tensor, products: int, before: Tensor, after: Tensor, places: Tensor) -> Tensor:
    return gradient.new_empty((products, 9, gradient.shape[1]))


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    products, before, after, places, _ = inputs
    ctx.count = products.shape[0]
    ctx.save_for_backward(before, after, places)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    products = torch.ops.kg_detectron.convolve_resized_backward(gradient, ctx.count, *ctx.saved_tensors)
    return products, None, None, None, None


torch.library.register_autograd("kg_detectron::convolve_resized", _backward, setup_context=_save_for_backward)


_define(
    "depthwise_weight_gradient(Tensor input, Tensor gradient, int kernel, int stride, int padding) -> Tensor",
    reference.depthwise_weight_gradient,
)


@torch.no_grad()
def depthwise_weight_gradient(input: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The gradient of a depthwise convolution in its weights; on a CPU much faster than PyTorch's own.

    It is compiled for CPUs alone, and meant for maps with the channels last, a multiple of 16 of them.

    Args:
        input: (N, C, H, W) of the convolution.
        gradient: (N, C, h, w) in its result.
        kernel: side of the kernel, pixels.
        stride: in both directions.
        padding: pixels on every side.

    Returns:
        (C, 1, kernel, kernel).

    Raises:
        ValueError: for shapes, types or sizes that do not fit.
    """
    return torch.ops.kg_detectron.depthwise_weight_gradient(input, gradient, kernel, stride, padding)


@torch.library.register_fake("kg_detectron::depthwise_weight_gradient")
def _(input: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    return input.new_empty((input.shape[1], 1, kernel, kernel))


def _is_compiled(name: str, key: DispatchKey) -> bool:
    return getattr(torch.ops.kg_detectron, name).default.has_kernel_for_dispatch_key(key)


# The types of device that the operators were compiled for.
COMPILED_FOR = frozenset(
    key.name.lower()
    for key in (DispatchKey.CPU, DispatchKey.CUDA)
    if all(_is_compiled(name, key) for name in OPERATORS)
)

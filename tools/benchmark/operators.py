"""The operators, each beside `torch.clone` of the same maps, measured in turn with it.

A copy is what the memory allows, and a ratio to it holds from machine to machine. The PyTorch reference is timed too,
unless it would take too long.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmark.measure import milliseconds
from benchmark.scenes import RADIUS, STRIDES, cells, network_maps
from kg_detectron import layers
from kg_detectron.graph import DIRECTED_EDGES
from kg_detectron.layers import ops, reference
from kg_detectron.modeling import KeypointDecoder, keypoint_targets

# Its time grows with the square of the number.
LARGEST_REFERENCE_GROUPING = 4000
OPERATORS = (
    "hough_vote",
    "smooth_votes",
    "find_peaks",
    "gather_displacements",
    "group_peaks",
    "graphs_to_boxes",
    "render_targets",
    "convolve_resized",
    "convolve_resized and its gradient",
)


def with_reference(call: Callable[[], object]) -> None:
    """Call it with the reference in place of the compiled kernels."""
    kernels = {
        **{name: getattr(reference, name) for name in ops.OPERATORS},
        # Their operators take the edges as plain numbers.
        "gather_displacements": lambda peaks, maps, edges: reference.gather_displacements(peaks, maps),
        "render_targets": lambda *arguments: reference.render_targets(*arguments[:-1]),
        "depthwise_weight_gradient": reference.depthwise_weight_gradient,
    }
    with mock.patch.multiple(torch.ops.kg_detectron, create=True, **kernels):
        call()


class Table:
    """Prints one line for each case measured.

    Args:
        device: "cpu" or "cuda".
        repeats: times that each call is measured; the median counts.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def head(self, title: str) -> None:
        print(f"\n| {title:<44} |  time, ms | clone, ms | time / clone | reference / time |")
        print(f"|{'-' * 46}|{'-' * 10}:|{'-' * 10}:|{'-' * 13}:|{'-' * 17}:|")

    def line(self, case: str, call: Callable[[], object], maps: list[Tensor], slow_reference: bool = False) -> float:
        """Measure one case; ``maps`` are what is cloned. Returns the time, milliseconds."""
        runs = {"time": call, "clone": lambda: [m.clone() for m in maps]}
        taken = {name: [] for name in runs}
        for repeat in range(self.repeats + 1):
            for name, run in runs.items():
                duration = milliseconds(run, self.device)
                if repeat:  # the first one fills caches
                    taken[name].append(duration)
        time, clone = (statistics.median(taken[name]) for name in runs)
        reference = "-"
        if not slow_reference:
            reference = f"{milliseconds(partial(with_reference, call), self.device) / time:.1f}"
        print(f"| {case:<44} | {time:9.3f} | {clone:9.3f} | {time / clone:12.2f} | {reference:>16} |", flush=True)
        return time


def crops_to_resize(count: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Arguments of `convolve_resized`: crops of 64 channels, one below another, of double size afterwards."""
    before = torch.randint(8, 25, (count, 2), generator=torch.Generator().manual_seed(0))
    after = 2 * before
    areas = after.prod(1)
    places = torch.stack((areas.cumsum(0) - areas, after[:, 1]), dim=1)
    products = torch.randn(int(before.prod(1).sum()), 9, 64, device=device, requires_grad=True)
    return products, before, after, places, int(areas.sum())


def queue_of_peaks(count: int, largest: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Peaks (count,4), scores (count,) and group offsets (1,40,h,w) of cells spread over a map.

    The map has room for ``largest`` peaks whatever the count, so that all counts find it as deep in memory.
    """
    generator = torch.Generator().manual_seed(0)
    spacing, side = 16, 12
    columns = math.ceil((largest / 5) ** 0.5)
    corner = torch.tensor([[0, 0], [side, 0], [0, side], [side, side], [side // 2, side // 2]])  # x, y
    cell = torch.randperm(columns**2, generator=generator)[: math.ceil(count / 5)].repeat_interleave(5)[:count]
    keypoint = torch.arange(count) % 5
    x, y = (torch.stack((cell % columns, cell // columns), dim=1) * spacing + corner[keypoint]).unbind(1)
    peaks = torch.stack((torch.zeros_like(cell), keypoint, y, x), dim=1)
    offsets = torch.zeros(1, 2 * len(DIRECTED_EDGES), columns * spacing, columns * spacing, dtype=torch.float16)
    for edge, (source, target) in enumerate(DIRECTED_EDGES):
        chosen, offset = keypoint == source, (corner[target] - corner[source]).half()
        offsets[0, 2 * edge, y[chosen], x[chosen]], offsets[0, 2 * edge + 1, y[chosen], x[chosen]] = offset
    order = torch.randperm(count, generator=generator)
    return peaks[order].to(device), torch.linspace(1, 0.1, count).to(device), offsets.to(device)


def benchmark_operators(arguments: argparse.Namespace, device: str) -> None:
    """Every operator, the whole decode, grouping and targets on one device."""
    table = Table(device, arguments.repeats)
    size, count = arguments.size, max(arguments.cells)
    scale = network_maps(count, 1, size, device)[0]
    heatmap = scale.heatmap.sigmoid()
    votes = layers.hough_vote(heatmap, scale.single_offset, RADIUS)
    smooth = layers.smooth_votes(votes, 2.0)
    peaks, scores = layers.find_peaks(smooth, 0.004)
    displacements = layers.gather_displacements(peaks, [scale.group_offset])
    graphs, _ = layers.group_peaks(peaks, scores, displacements)
    boxes, image = cells(count, size, 0).to(device), torch.zeros(count, dtype=torch.int64, device=device)
    target_maps = list(layers.render_targets(boxes, image, 1, size, size, 1, RADIUS, 2 * RADIUS + 1))

    crops = crops_to_resize(count, device)
    gradient = torch.ones_like(layers.convolve_resized(*crops))
    table.head(f"operators, {size}x{size}, stride 1, {count} cells")
    calls = (
        (partial(layers.hough_vote, heatmap, scale.single_offset, RADIUS), [heatmap, scale.single_offset]),
        (partial(layers.smooth_votes, votes, 2.0), [votes]),
        (partial(layers.find_peaks, smooth, 0.004), [smooth]),
        (partial(layers.gather_displacements, peaks, [scale.group_offset]), [displacements]),
        (partial(layers.group_peaks, peaks, scores, displacements), [peaks, scores, displacements]),
        (partial(layers.graphs_to_boxes, graphs), [graphs]),
        (partial(layers.render_targets, boxes, image, 1, size, size, 1, RADIUS, 2 * RADIUS + 1), target_maps),
        (partial(torch.no_grad()(layers.convolve_resized), *crops), [crops[0]]),
        (lambda: layers.convolve_resized(*crops).backward(gradient), [crops[0], gradient]),
    )
    for name, (call, maps) in zip(OPERATORS, calls, strict=True):
        table.line(name, call, maps)

    table.head(f"decode, {size}x{size}, four scales")
    for batch in arguments.batches:
        for count in arguments.cells:
            maps = network_maps(count, batch, size, device)
            decode = partial(KeypointDecoder(RADIUS), maps, [(size, size)] * batch)
            inputs = [m for scale in maps for m in (scale.heatmap, scale.single_offset)]
            table.line(f"batch {batch}, {count} cells an image", decode, inputs, slow_reference=batch > 1)

    table.head("group_keypoints")
    taken = {}
    for count in arguments.peaks:
        queue = queue_of_peaks(count, max(arguments.peaks), device)
        slow = count > LARGEST_REFERENCE_GROUPING
        taken[count] = table.line(f"{count} peaks", partial(layers.group_keypoints, *queue), list(queue), slow)
    for first, last in itertools.combinations(sorted(taken), 2):
        if last == 16 * first:
            print(f"{last} peaks take {taken[last] / taken[first]:.1f} times as long as {first}.")

    table.head(f"targets, {size}x{size}, four scales")
    for count in arguments.boxes:
        boxes = [cells(count, size, 0).to(device)]
        render = partial(render_scales, boxes, size)
        table.line(f"{count} boxes", render, [m for scale in render() for m in scale])

    if device == "cpu":  # elsewhere PyTorch's own runs
        table.head("gradient of a depthwise convolution 7x7")
        for channels, side in ((48, size // 4), (64, size // 8), (96, size // 16)):
            of_layer = [
                torch.randn(4, channels, side, side).contiguous(memory_format=torch.channels_last) for _ in range(2)
            ]
            gradient_of_weights = partial(layers.depthwise_weight_gradient, *of_layer, 7, 1, 3)
            table.line(f"weights, 4 x {channels} x {side} x {side}", gradient_of_weights, of_layer)


def render_scales(boxes: list[Tensor], size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Targets of all scales."""
    return [keypoint_targets(boxes, (size, size), stride, RADIUS) for stride in STRIDES]


def add_command(commands: Any) -> None:
    """Add ``ops`` to the commands of tools/benchmark.py."""
    command = commands.add_parser("ops", help="the keypoint-graph operators", description=__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), help="only this one; every device at hand otherwise")
    command.add_argument("--size", type=int, default=512, help="side of the images, pixels (%(default)s)")
    command.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images a batch (%(default)s)")
    command.add_argument("--cells", type=int, nargs="+", default=[10, 100, 300], help="an image (%(default)s)")
    peaks = [250, 1000, 4000, 16000, 64000]
    command.add_argument("--peaks", type=int, nargs="+", default=peaks, help="to group (%(default)s)")
    command.add_argument("--boxes", type=int, nargs="+", default=[1, 10, 100, 300, 400], help="targets (%(default)s)")
    command.add_argument("--repeats", type=int, default=15, help="of each measurement (%(default)s)")
    command.set_defaults(benchmark=benchmark_operators)

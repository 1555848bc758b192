"""How long the parts of kg_detectron take here.

``python tools/benchmark.py ops`` times the keypoint-graph operators. ``python tools/benchmark.py large MODEL`` predicts
the cells of an image that is larger than memory should be, tile by tile, and says how much memory that took.

Every time stands beside that of `torch.clone` of the same maps, measured in turn with it: a copy is what the memory
allows, and a ratio to it holds from machine to machine. The PyTorch reference is timed too, where it ends in time.
"""

import argparse
import itertools
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kg_detectron import layers
from kg_detectron.graph import DIRECTED_EDGES
from kg_detectron.inference import load_model
from kg_detectron.inference.tiling import predict_tiled
from kg_detectron.layers import ops
from kg_detectron.modeling import KeypointDecoder, KeypointMaps, keypoint_targets
from kg_detectron.synthetic import nuclei_image

RADIUS = 5.0
STRIDES = (1, 2, 4, 8)
# Its time grows with the square of the number.
LARGEST_REFERENCE_GROUPING = 4000
PATCH = 256  # side of the pieces of a large image, pixels
OPERATORS = ("hough_vote", "smooth_votes", "find_peaks", "group_keypoints", "graphs_to_boxes", "render_targets")


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Time of one call, on the device too."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def with_reference(call: Callable[[], object]) -> None:
    """Call it with the reference in place of the compiled operators."""
    with mock.patch.object(ops, "COMPILED_FOR", frozenset()), mock.patch.object(ops, "_warned", {"cpu", "cuda"}):
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
                own = milliseconds(run, self.device)
                if repeat:  # the first one fills caches
                    taken[name].append(own)
        own, clone = (statistics.median(taken[name]) for name in runs)
        beside = "-"
        if not slow_reference:
            beside = f"{milliseconds(partial(with_reference, call), self.device) / own:.1f}"
        print(f"| {case:<44} | {own:9.3f} | {clone:9.3f} | {own / clone:12.2f} | {beside:>16} |", flush=True)
        return own


def cells(count: int, size: int, seed: int) -> Tensor:
    """Boxes of cells (count,4) xyxy: sides from 14 pixels to an eighth of the image, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    side = 14 + torch.rand(count, 2, generator=generator) ** 2 * max(size / 8 - 14, 0)
    corner = torch.rand(count, 2, generator=generator) * (size - side)
    return torch.cat((corner, corner + side), dim=1).round()


def network_maps(count: int, batch: int, size: int, device: str) -> list[KeypointMaps]:
    """What a good network gives for images of so many cells: the targets of all scales, and noise."""
    generator = torch.Generator().manual_seed(0)
    boxes = [cells(count, size, seed=i) for i in range(batch)]
    maps = []
    for stride in STRIDES:
        heatmap, single, group = keypoint_targets(boxes, (size, size), stride, RADIUS)
        noisy = (
            heatmap * 10 - 6 + torch.randn(heatmap.shape, generator=generator),
            single + torch.randn(single.shape, generator=generator),
            group + torch.randn(group.shape, generator=generator),
        )
        maps.append(KeypointMaps(*(m.to(device) for m in noisy), stride))
    return maps


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
        at, offset = keypoint == source, (corner[target] - corner[source]).half()
        offsets[0, 2 * edge, y[at], x[at]], offsets[0, 2 * edge + 1, y[at], x[at]] = offset
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
    graphs, _ = layers.group_keypoints(peaks, scores, scale.group_offset)
    boxes, image = cells(count, size, 0).to(device), torch.zeros(count, dtype=torch.int64, device=device)
    target_maps = list(layers.render_targets(boxes, image, 1, size, size, 1, RADIUS))

    table.head(f"operators, {size}x{size}, stride 1, {count} cells")
    calls = (
        (partial(layers.hough_vote, heatmap, scale.single_offset, RADIUS), [heatmap, scale.single_offset]),
        (partial(layers.smooth_votes, votes, 2.0), [votes]),
        (partial(layers.find_peaks, smooth, 0.004), [smooth]),
        (partial(layers.group_keypoints, peaks, scores, scale.group_offset), [peaks, scores, scale.group_offset]),
        (partial(layers.graphs_to_boxes, graphs), [graphs]),
        (partial(layers.render_targets, boxes, image, 1, size, size, 1, RADIUS), target_maps),
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


def render_scales(boxes: list[Tensor], size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Targets of all scales."""
    return [keypoint_targets(boxes, (size, size), stride, RADIUS) for stride in STRIDES]


def large_image(path: Path, size: int, cells: int) -> tuple[np.ndarray, int]:
    """An image (size,size,3) uint8 in a file, mapped into memory: dark noise, and patches with about so many nuclei.

    Returns:
        The image and the number of nuclei in it.
    """
    rng = np.random.default_rng(0)
    image = np.memmap(path, np.uint8, "w+", shape=(size, size, 3))
    noise = rng.integers(6, 14, (PATCH, size, 1), dtype=np.uint8)
    for y in range(0, size, PATCH):
        image[y : y + PATCH] = noise[: size - y]
    drawn, columns = 0, size // PATCH
    for place in rng.permutation(columns**2).tolist():
        if drawn >= cells:
            break
        patch, masks = nuclei_image(rng, PATCH, PATCH, min(25, cells - drawn))
        y, x = place // columns * PATCH, place % columns * PATCH
        image[y : y + PATCH, x : x + PATCH] = patch
        drawn += len(masks)
    return image, drawn


def benchmark_large(arguments: argparse.Namespace) -> None:
    """Prediction in tiles: time, cells, and the largest memory of the whole process, mapped files included."""
    model = load_model(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        image, drawn = large_image(Path(folder) / "image", arguments.size, arguments.cells)
        start = time.perf_counter()
        with tqdm(unit="step") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = predict_tiled(model, image, tile=arguments.tile, overlap=arguments.overlap, progress=show)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.size}x{arguments.size}, tile {arguments.tile}, overlap {arguments.overlap}: {drawn} nuclei drawn, "
        f"{len(found['boxes'])} cells found in {seconds:.0f} s, peak memory {peak:.2f} GiB"
    )


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("ops", help="the keypoint-graph operators")
    command.add_argument("--device", choices=("cpu", "cuda"), help="only this one; every device at hand otherwise")
    command.add_argument("--size", type=int, default=512, help="side of the images, pixels (%(default)s)")
    command.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images a batch (%(default)s)")
    command.add_argument("--cells", type=int, nargs="+", default=[10, 100, 300], help="an image (%(default)s)")
    peaks = [250, 1000, 4000, 16000, 64000]
    command.add_argument("--peaks", type=int, nargs="+", default=peaks, help="to group (%(default)s)")
    command.add_argument("--boxes", type=int, nargs="+", default=[1, 10, 100, 300, 400], help="targets (%(default)s)")
    command.add_argument("--repeats", type=int, default=15, help="of each measurement (%(default)s)")
    command = commands.add_parser("large", help="prediction in tiles")
    command.add_argument("model", type=Path, help="model file, as train_net.py or train_core.py writes it")
    command.add_argument("--size", type=int, default=20000, help="side of the image, pixels (%(default)s)")
    command.add_argument("--cells", type=int, default=5000, help="about so many in the image (%(default)s)")
    command.add_argument("--tile", type=int, default=1024, help="pixels (%(default)s)")
    command.add_argument("--overlap", type=int, default=256, help="pixels (%(default)s)")
    command.add_argument("--scratch", type=Path, help="folder for the image, 3 bytes a pixel (the system's for such)")
    arguments = parser.parse_args()
    if arguments.command == "large":
        return benchmark_large(arguments)
    for device in [arguments.device] if arguments.device else ["cpu", *["cuda"] * torch.cuda.is_available()]:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        kind = "compiled operators" if device in ops.COMPILED_FOR else "PyTorch reference"
        print(f"\n{device} ({name}), PyTorch {torch.__version__}, {kind}")
        benchmark_operators(arguments, device)


if __name__ == "__main__":
    main()

"""The table of docs/cuda.md: what the CUDA kernels of a decode and of the targets read and write, counted on the CPU.

    PYTHONPATH=.:tools python tests/cuda_on_cpu/cost.py --cells 0 30 300

Bytes are those of all loads and stores outside shared memory, most of which the caches serve. "Longest" is the largest
number of accesses to memory by one thread in one launch. PyTorch's own kernels (sorting, zeros, nonzero) are left out.
"""

import argparse

import torch
from benchmark.operators import crops_to_resize
from benchmark.scenes import RADIUS, cells, network_maps
from stand_in import Count, StandIn

from kg_detectron import layers


def print_counts(title: str, counts: dict[str, Count], inputs: int) -> None:
    """A table of Markdown; ``inputs``: bytes of the maps that go in or come out."""
    print(f"\n{title}\n\n| kernel | launches | MB read | MB written | atomics | longest |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, count in counts.items():
        megabytes = f"{count.read / 1e6:.2f} | {count.written / 1e6:.2f}"
        print(f"| `{name}` | {count.launches} | {megabytes} | {count.atomics} | {count.most_accesses} |")
    total = sum(count.read + count.written for count in counts.values())
    print(f"\nAll: {total / 1e6:.1f} MB, maps: {inputs / 1e6:.1f} MB, ratio {total / inputs:.2f}", flush=True)


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cells", type=int, nargs="+", default=[0, 30, 300])
    parser.add_argument("--crops", type=int, default=8, help="to resize and convolve (%(default)s)")
    arguments = parser.parse_args()
    machine = StandIn()
    machine.detect_races(False)
    with machine.in_place():
        for count in arguments.cells:
            maps = network_maps(count, arguments.batch, arguments.size, "cpu")
            heatmaps = [scale.heatmap.sigmoid() for scale in maps]
            machine.take_counts()
            votes = [layers.hough_vote(h, scale.single_offset, RADIUS) for h, scale in zip(heatmaps, maps, strict=True)]
            smooth = [layers.smooth_votes(v, 2.0) for v in votes]
            peaks, scores = layers.find_peaks(smooth, 0.004)
            displacements = layers.gather_displacements(peaks, [scale.group_offset for scale in maps])
            graphs, _ = layers.group_peaks(peaks, scores, displacements)
            layers.graphs_to_boxes(graphs)
            inputs = sum(m.nbytes for scale in maps for m in (scale.heatmap, scale.single_offset))
            title = f"Decoding, batch {arguments.batch}, {count} cells: {len(peaks)} peaks, {len(graphs)} graphs"
            print_counts(title, machine.take_counts(), inputs)
            boxes, image = cells(count, arguments.size, 0), torch.zeros(count, dtype=torch.int64)
            targets = layers.render_targets(boxes, image, 1, arguments.size, arguments.size, 1, RADIUS, 11)
            print_counts(f"Targets, {count} cells", machine.take_counts(), sum(m.nbytes for m in targets))
        if arguments.crops:
            crops = crops_to_resize(arguments.crops, "cpu")
            resized = layers.convolve_resized(*crops)
            resized.backward(torch.ones_like(resized))
            title = f"Resizing and convolving {arguments.crops} crops, and the gradient"
            print_counts(title, machine.take_counts(), 2 * (crops[0].nbytes + resized.nbytes))


if __name__ == "__main__":
    main()

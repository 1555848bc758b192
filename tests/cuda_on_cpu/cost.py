"""The table of docs/cuda.md: what the CUDA kernels of a decode and of the targets read and write, counted on the CPU.

    PYTHONPATH=.:tools python tests/cuda_on_cpu/cost.py --cells 0 30 300

Bytes are those of all loads and stores, most of which the caches serve. PyTorch's own kernels (sorting, concatenation,
zeros) are not among them.
"""

import argparse

import torch
from benchmark.scenes import RADIUS, cells, network_maps
from stand_in import Count, StandIn

from kg_detectron import layers


def print_counts(title: str, counts: dict[str, Count], inputs: int) -> None:
    """A table of Markdown; ``inputs``: bytes of the maps that go in or come out."""
    print(f"\n{title}\n\n| kernel | launches | MB read | MB written | atomics |")
    print("|---|--:|--:|--:|--:|")
    for name, count in counts.items():
        megabytes = f"{count.read / 1e6:.2f} | {count.written / 1e6:.2f}"
        print(f"| `{name}` | {count.launches} | {megabytes} | {count.atomics} |")
    total = sum(count.read + count.written for count in counts.values())
    print(f"\nAll: {total / 1e6:.1f} MB, maps: {inputs / 1e6:.1f} MB, ratio {total / inputs:.2f}")


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cells", type=int, nargs="+", default=[0, 30, 300])
    arguments = parser.parse_args()
    machine = StandIn()
    for count in arguments.cells:
        maps = network_maps(count, arguments.batch, arguments.size, "cpu")
        heatmaps = [scale.heatmap.sigmoid() for scale in maps]
        machine.detect_races(False)
        with machine.in_place():
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
        machine.detect_races(True)


if __name__ == "__main__":
    main()

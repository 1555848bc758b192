"""Run the CUDA kernels on the CPU under AddressSanitizer, on maps and lists of every awkward size.

With an argument, the operator of a faulty copy, that one runs, and AddressSanitizer ends the program.
"""

import itertools
import sys

import torch
from stand_in import BOUNDS_FAULTS, StandIn

from kg_detectron import layers


def call_all(height: int, width: int, count: int) -> None:
    """All operators on maps of this size, and on `count` boxes."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    heatmap = torch.rand(2, 5, height, width, generator=generator)
    single = torch.randn(2, 10, height, width, generator=generator) * max(height, width)
    group = torch.randn(2, 40, height, width, generator=generator) * 9
    votes = layers.hough_vote(heatmap, single, 3.0)
    for sigma in (2.0, 5.0):  # in one kernel and in two passes
        layers.smooth_votes(votes, sigma)
    peaks, scores = layers.find_peaks([heatmap, votes[..., 1:, 1:]], 0.2)
    displacements = layers.gather_displacements(peaks, [group, group[..., 1:, 1:]])
    graphs, _ = layers.group_peaks(peaks[:300], scores[:300], displacements[:300], hops=2)
    layers.graphs_to_boxes(graphs)
    corner = torch.rand(count, 2, generator=generator) * max(height, width, 1) - 5
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 20), dim=1)
    before = torch.randint(1, 7, (count, 2), generator=generator)
    after = before * 2 - torch.randint(0, 2, (count, 2), generator=generator)
    areas = after.prod(1)
    places = torch.stack((areas.cumsum(0) - areas, after[:, 1]), dim=1)
    products = torch.randn(int(before.prod(1).sum()), 9, 3, generator=generator, requires_grad=True)
    resized = layers.convolve_resized(products, before, after, places, int(areas.sum()))
    resized.backward(torch.ones_like(resized))
    layers.render_targets(boxes, torch.zeros(count, dtype=torch.int64), 1, height, width, 1, 5, 0)


def main() -> None:
    """Entry point of the command line."""
    machine = StandIn("bounds", BOUNDS_FAULTS)
    arguments = {
        "find_peaks": ([torch.rand(1, 5, 7, 9)], 0.1),
        "hough_vote": (torch.rand(1, 5, 7, 9), torch.rand(1, 10, 7, 9), 3.0),
    }
    for fault in BOUNDS_FAULTS:
        if fault.operator in sys.argv[1:]:
            getattr(torch.ops.kg_cuda_on_cpu, fault.operator)(*arguments[fault.name])
    with machine.in_place():
        for (height, width), count in itertools.product([(1, 1), (1, 40), (33, 1), (7, 9), (16, 32)], [0, 1, 3]):
            call_all(height, width, count)
    print("within bounds")


if __name__ == "__main__":
    main()

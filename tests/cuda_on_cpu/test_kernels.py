"""The CUDA kernels, run on the CPU: the tests of the operators, races and divergence watched, in several orders."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from stand_in import StandIn
from test_convolve_resized import (  # noqa: F401
    test_equals_resizing_and_convolving_each_crop,
    test_no_crops,
    test_precisions_and_layouts,
)
from test_operators import golden, test_golden_peaks_groups_and_boxes, test_golden_targets, test_golden_votes  # noqa: F401
from test_ops_compiled import (  # noqa: F401
    random_maps,
    test_all_scales_at_once,
    test_boxes_of_any_graphs,
    test_every_pixel_a_peak,
    test_graphs_and_boxes,
    test_layouts,
    test_maps_without_a_finite_value,
    test_mirrored_votes_have_mirrored_maps,
    test_nothing,
    test_operators_called_past_their_wrappers_do_not_crash,
    test_peaks,
    test_peaks_outside_the_maps_are_named,
    test_targets,
    test_the_edges_are_an_argument,
    test_values_of_any_size_are_voted_for,
    test_votes_and_smoothing,
)

from kg_detectron import layers

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the stand-in for CUDA needs g++"),
    pytest.mark.timeout(1200),  # seconds; the first test compiles the kernels
]


@pytest.fixture(scope="module")
def machine() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module", autouse=True)
def in_place(machine: StandIn) -> Iterator[None]:
    with machine.in_place():
        yield


@pytest.fixture(scope="module")
def device() -> str:
    return "cpu"


def everything(boxes: torch.Tensor) -> list[torch.Tensor]:
    """The results of all operators."""
    heatmap, single, group = random_maps(11, 2, 24, 33, spread=3.0)
    votes = layers.hough_vote(heatmap, single, 5)
    smooth = layers.smooth_votes(votes, 2.0)
    peaks = layers.find_peaks([(heatmap * 9).round(), smooth], 0.05)
    displacements = layers.gather_displacements(peaks[0], [group, group])
    graphs = layers.group_peaks(*peaks, displacements, hops=2)
    targets = layers.render_targets(boxes, torch.zeros(len(boxes), dtype=torch.int64), 2, 24, 33, 1, 5, 0)
    products = torch.randn(26, 9, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tables = (torch.tensor(rows) for rows in ([[2, 3], [5, 4]], [[4, 5], [9, 9]], [[1, 9], [37, 10]]))
    resized = layers.convolve_resized(products, *tables, 130)
    (gradient,) = torch.autograd.grad(resized.square().sum(), products)
    return [
        *(votes, smooth, *peaks, displacements, *graphs, *layers.graphs_to_boxes(graphs[0], True), *targets),
        *(resized.detach(), gradient),
    ]


@pytest.mark.parametrize("orders", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_same_in_any_order(machine: StandIn, orders: int) -> None:
    boxes = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)).cumsum(1) * 12
    expected = everything(boxes)
    for seed in range(1, orders):
        machine.seed(seed)
        assert all(map(torch.equal, everything(boxes), expected)), seed
    machine.seed(0)


# What the machine must find


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("without_barrier", r"group_kernel:\n(race .*group_peaks\.cu:\d+.*|.*unwritten.*)"),
        ("without_syncwarp", r"group_kernel:\nrace .*group_peaks\.cu:\d+"),
        ("with_divergent_barrier", r"group_kernel:\ndivergent barrier: .*line"),
        ("with_divergent_warp", r"group_kernel:\ndivergent (warp|barrier): .*line"),
        ("with_unwritten_shared_memory", r"group_kernel:\nshared memory is read before .*group_peaks\.cu:\d+"),
    ],
)
def test_faults_of_grouping_are_found(machine: StandIn, fault: str, message: str) -> None:
    heatmap, _, group = random_maps(3)
    peaks, scores = layers.find_peaks(heatmap, 0.9)
    displacements = layers.gather_displacements(peaks, [group])
    operator = getattr(torch.ops.kg_cuda_on_cpu, f"group_peaks_{fault}")
    with pytest.raises(RuntimeError, match=message):
        for seed in range(5):
            machine.seed(seed)
            operator(peaks, scores, displacements, 6.0, 10.0, 2)
    machine.seed(0)


def test_a_missing_atomic_is_found() -> None:
    heatmap, single, _ = random_maps(3)
    with pytest.raises(RuntimeError, match=r"vote_kernel:\nrace .*(read|write) at hough_vote\.cu:\d+"):
        torch.ops.kg_cuda_on_cpu.hough_vote_without_atomic(heatmap, single, 3.0)

"""The CUDA kernels, run on the CPU: the tests of the operators, races and divergence watched, in several orders."""

import math
import shutil
from collections.abc import Iterator

import numpy as np
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
from kg_detectron.graph import EDGE_INDEX

# Before they are replaced.
VOTE_ON_CPU, SMOOTH_ON_CPU = torch.ops.kg_detectron.hough_vote, torch.ops.kg_detectron.smooth_votes

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
    heatmap, single, group = random_maps(11, 2, 12, 17, spread=3.0)
    votes = layers.hough_vote(heatmap, single, 5)
    smooth = layers.smooth_votes(votes, 2.0)
    peaks = layers.find_peaks([(heatmap * 9).round(), smooth], 0.05)
    displacements = layers.gather_displacements(peaks[0], [group, group])
    graphs = layers.group_peaks(*peaks, displacements, hops=2)
    targets = layers.render_targets(boxes, torch.zeros(len(boxes), dtype=torch.int64), 2, 12, 17, 1, 5, 0)
    products = torch.randn(26, 9, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tables = (torch.tensor(rows) for rows in ([[2, 3], [5, 4]], [[4, 5], [9, 9]], [[1, 9], [37, 10]]))
    resized = layers.convolve_resized(products, *tables, 130)
    (gradient,) = torch.autograd.grad(resized.square().sum(), products)
    return [
        *(votes, smooth, *peaks, displacements, *graphs, *layers.graphs_to_boxes(graphs[0], True), *targets),
        *(resized.detach(), gradient),
    ]


@pytest.mark.parametrize("orders", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_same_in_any_order(machine: StandIn, orders: int) -> None:
    boxes = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)).cumsum(1) * 8
    expected = everything(boxes)
    for seed in range(1, orders):
        machine.seed(seed)
        assert all(map(torch.equal, everything(boxes), expected)), seed
    machine.seed(0)


# What depends on the kernels' own sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (2, 70), (33, 32), (65, 31)])
@pytest.mark.parametrize("sigma", [0.0, 2.0, 4.0, 4.2])  # the last one in two passes
def test_smoothing_is_that_of_the_cpu_kernel(size: tuple[int, int], sigma: float, dtype: torch.dtype) -> None:
    votes = random_maps(1, 1, *size)[0].to(dtype)
    assert torch.equal(layers.smooth_votes(votes, sigma), SMOOTH_ON_CPU(votes, sigma))


def test_planes_that_take_turns(machine: StandIn) -> None:
    """Two planes, and a buffer of sums that holds one. Few pixels vote, which is quick."""
    heatmap, offsets = torch.zeros(1, 2, 1024, 1025), torch.full((1, 4, 1024, 1025), math.nan)
    heatmap[0, :, 500:520, :20] = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0))
    offsets[..., 500:520, :20] = 1.3
    machine.detect_races(False)
    votes = layers.hough_vote(heatmap, offsets, 5)
    machine.detect_races(True)
    expected = VOTE_ON_CPU(heatmap, offsets, 5.0)
    torch.testing.assert_close(votes, expected, atol=1e-7, rtol=1e-6)
    assert expected.amax((2, 3)).min() > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_more_than_2_to_the_31_pixels(machine: StandIn) -> None:
    """Half precision, and pages of zeros that take no memory until they are written: 2 GiB are."""
    height, width = 5, 2**29
    scores = torch.from_numpy(np.zeros((1, 1, height, width), np.float16))
    scores[0, 0, 4, -1], scores[0, 0, 0, 1], scores[0, 0, 4, 3] = 3, 2, 1
    machine.detect_races(False)
    peaks, values = layers.find_peaks(scores, 0.5)
    assert values.tolist() == [3, 2, 1]
    assert peaks.tolist() == [[0, 0, 4, width - 1], [0, 0, 0, 1], [0, 0, 4, 3]]
    maps = torch.from_numpy(np.zeros((1, 40, 2, 2**26), np.float16))
    edge = EDGE_INDEX[4, 3]
    maps[0, 2 * edge : 2 * edge + 2, 1, -1] = torch.tensor([5.0, 7.0], dtype=torch.float16)
    displacements = layers.gather_displacements(torch.tensor([[0, 4, 1, 2**26 - 1]]), [maps])
    machine.detect_races(True)
    assert displacements.tolist() == [[[0, 0], [0, 0], [0, 0], [5, 7]]]


# What the machine must find


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("without_barrier", r"group_kernel:\n(race .*group_peaks\.cu:\d+.*|.*unwritten.*)"),
        ("without_syncwarp", r"group_kernel:\nrace .*group_peaks\.cu:\d+"),
        ("with_divergent_barrier", r"group_kernel:\ndivergent barrier: .*line"),
        ("with_divergent_warp", r"(nearest|group)_kernel:\ndivergent (warp|barrier): .*line"),
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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("without_barrier", r"smooth_kernel:\n(race .*smooth_votes\.cu:\d+.*|shared memory is read before .*)"),
        ("with_too_little_shared_memory", r"smooth_kernel:\nbeyond the \d+ bytes of shared memory at smooth_votes\.cu"),
    ],
)
def test_faults_of_smoothing_are_found(fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.kg_cuda_on_cpu, f"smooth_votes_{fault}")(random_maps(3, 1, 40, 40)[0], 2.0)


def test_a_missing_atomic_is_found() -> None:
    heatmap, single, _ = random_maps(3)
    with pytest.raises(RuntimeError, match=r"vote_kernel:\nrace .*(read|write) at hough_vote\.cu:\d+"):
        torch.ops.kg_cuda_on_cpu.hough_vote_without_atomic(heatmap, single, 3.0)

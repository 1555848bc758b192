"""The compiled operators against their reference: exactly equal, in every precision and layout, on hostile input."""

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME, include_paths

from kg_detectron import layers
from kg_detectron.graph import DIRECTED_EDGES
from kg_detectron.layers import ops, reference
from kg_detectron.modeling import DecodingSettings, KeypointDecoder, KeypointMaps, keypoint_targets

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(not ops.COMPILED_FOR, reason="the operators were not compiled; `make setup` says why"),
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]),
]
seeds = st.integers(0, 2**31)
EDGES = [keypoint for edge in DIRECTED_EDGES for keypoint in edge]


def random_maps(seed: int, n: int = 2, h: int = 21, w: int = 37, spread: float = 6.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heatmap = torch.rand(n, 5, h, w, generator=generator)
    single = torch.randn(n, 10, h, w, generator=generator) * spread
    group = torch.randn(n, 40, h, w, generator=generator) * spread
    return heatmap, single, group


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Exactly equal, type included, and contiguous; a nan equals a nan."""
    return all(
        f.is_contiguous() and f.dtype == e.dtype and torch.equal(f.cpu().nan_to_num(nan=-7), e.nan_to_num(nan=-7))
        for f, e in zip(found, expected, strict=True)
    )


# Equal to the reference


@given(
    seed=seeds,
    size=st.sampled_from([(1, 1), (1, 40), (40, 1), (3, 5), (21, 37), (32, 64)]),
    whole=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_votes_and_smoothing(device, seed, size, whole, dtype):
    heatmap, single, _ = (maps.to(dtype) for maps in random_maps(seed, 2, *size))
    single = single.round() if whole else single
    expected = reference.hough_vote(heatmap, single, 3.5)
    votes = layers.hough_vote(heatmap.to(device), single.to(device), 3.5)
    torch.testing.assert_close(votes.cpu(), expected, atol=1e-5, rtol=1e-5)
    sigma = 0.3 + seed % 40 / 10
    smooth = layers.smooth_votes(votes, sigma)
    torch.testing.assert_close(smooth.cpu(), reference.smooth_votes(expected, sigma), atol=1e-5, rtol=1e-5)


@given(
    seed=seeds,
    levels=st.sampled_from([2, 5, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    broken=st.booleans(),
)
def test_peaks(device, seed, levels, dtype, broken):
    scores = (random_maps(seed)[0] * levels).round().div(levels).to(dtype)  # few levels make ties and plateaus
    if broken:
        scores.view(-1)[seed % 97 :: 97] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[seed % 3]
    assert same(layers.find_peaks(scores.to(device), 0.4), reference.find_peaks(scores, 0.4))


@settings(max_examples=40)
@given(
    seed=seeds,
    whole=st.booleans(),
    hops=st.sampled_from([1, 2]),
    match=st.sampled_from([0.0, 1.5, 6.0, 40.0]),
    reject=st.sampled_from([0.0, 5.0, 10.0, 100.0]),
    shuffled=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_graphs_and_boxes(device, seed, whole, hops, match, reject, shuffled, dtype):
    heatmap, _, group = random_maps(seed)
    heatmap = (heatmap * 8).round() / 8  # equal scores
    group = (group.round() if whole else group).to(dtype)  # equal distances
    peaks, scores = reference.find_peaks(heatmap, 0.9)
    if shuffled:  # the queue is the order given, of each image by itself; some peaks come twice
        order = torch.randint(len(peaks), (len(peaks),), generator=torch.Generator().manual_seed(seed))
        peaks, scores = peaks[order], scores[order]
    expected = reference.group_keypoints(peaks, scores, group, match, reject, hops)
    graphs = layers.group_keypoints(peaks.to(device), scores.to(device), group.to(device), match, reject, hops)
    assert same(graphs, expected)
    for option in (False, True):
        assert same(layers.graphs_to_boxes(graphs[0], option), reference.graphs_to_boxes(expected[0], option))


@settings(max_examples=20)
@given(
    seed=seeds,
    hops=st.sampled_from([1, 2]),
    reach=st.sampled_from([0.0, 6.0, 40.0, 1e9]),
    step=st.sampled_from([1, 7, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_all_scales_at_once(device, seed, hops, reach, step, dtype):
    """Peaks of several scales; groups of any number, in any order; positions of any size."""
    heatmaps = [(maps[0] * 8).round().div(8).to(dtype) for maps in (random_maps(seed), random_maps(seed, 2, 11, 18))]
    group = [maps[2].to(dtype) for maps in (random_maps(seed), random_maps(seed, 2, 11, 18))]
    peaks, scores = reference.find_peaks(heatmaps, 0.9)
    assert same(layers.find_peaks([h.to(device) for h in heatmaps], 0.9), (peaks, scores))
    peaks[-1, 3] = 18  # beside the map
    displacements = reference.gather_displacements(peaks, group)
    assert displacements[-1].isnan().all() and displacements[:-1].isfinite().all()
    assert same((layers.gather_displacements(peaks.to(device), [g.to(device) for g in group]),), (displacements,))
    order = torch.randperm(len(peaks), generator=torch.Generator().manual_seed(seed))
    queue = peaks[order] * torch.tensor([2**40 + 1, 1, step, step]), scores[order], displacements[order] * step
    expected = reference.group_peaks(*queue, reach, reach, hops)
    assert same(layers.group_peaks(*(q.to(device) for q in queue), reach, reach, hops), expected)
    assert expected[1].unique().tolist() == [i * (2**40 + 1) for i in range(4)]


@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_boxes_of_any_graphs(device, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    graphs = torch.rand(64, 5, 3, generator=generator) * 60
    graphs[..., 2] *= torch.rand(64, 5, generator=generator) < 0.6
    graphs.view(-1)[seed % 31 :: 31] = (0.0, -1.0, math.nan, math.inf)[seed % 4]
    graphs = graphs.to(dtype)
    found, expected = layers.graphs_to_boxes(graphs.to(device)), reference.graphs_to_boxes(graphs)
    assert same((found[0], found[2]), (expected[0], expected[2]))
    torch.testing.assert_close(found[1].cpu(), expected[1], equal_nan=True)


@given(
    seed=seeds,
    stride=st.sampled_from([1, 2, 4, 8]),
    radius=st.sampled_from([0.5, 2.0, 5.0, 7.3]),
    min_side=st.floats(0, 9),
)
def test_targets(device, seed, stride, radius, min_side):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(40, 2, generator=generator) * 100 - 10
    boxes = torch.cat((corner, corner + torch.rand(40, 2, generator=generator) * 90), dim=1)
    boxes = boxes.round() if seed % 2 else boxes
    boxes[seed % 40] = math.nan
    image = torch.randint(3, (40,), generator=generator)
    expected = reference.render_targets(boxes, image, 3, 61, 83, stride, radius, min_side)
    assert same(
        layers.render_targets(boxes.to(device), image.to(device), 3, 61, 83, stride, radius, min_side), expected
    )


@given(seed=seeds, count=st.integers(0, 20))
def test_the_edges_are_an_argument(device, seed, count):
    """Any edges in any order: their channels are those of the whole graph, and what is missing is not a number."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    edges = [DIRECTED_EDGES[e] for e in order]
    channels = [2 * e + axis for e in order for axis in (0, 1)]
    heatmap, _, group = random_maps(seed)
    peaks, _ = reference.find_peaks(heatmap, 0.9)
    expected = reference.gather_displacements(peaks, [group])
    for k, l in set(DIRECTED_EDGES) - set(edges):
        expected[peaks[:, 1] == k, l - (l > k)] = math.nan
    chosen = group[:, channels]
    assert same((reference.gather_displacements(peaks, [chosen], edges),), (expected,))
    assert same((layers.gather_displacements(peaks.to(device), [chosen.to(device)], edges),), (expected,))

    targets = torch.tensor([[2.0, 3, 20, 18], [1, 1, 30, 19]]), torch.tensor([0, 1]), 2, 21, 37, 1.0, 2.0, 3.5
    *maps, whole = reference.render_targets(*targets)
    expected = (*maps, whole[:, channels])
    assert same(reference.render_targets(*targets, edges), expected)
    assert same(layers.render_targets(*(t.to(device) for t in targets[:2]), *targets[2:], edges), expected)


# Layouts and sizes


def layouts(maps: Tensor) -> list[Tensor]:
    """The same values in memory of other orders."""
    wider = torch.full((*maps.shape[:-1], 2 * maps.shape[-1]), math.nan, dtype=maps.dtype, device=maps.device)
    wider[..., ::2] = maps
    return [maps.to(memory_format=torch.channels_last), wider[..., ::2], maps.transpose(2, 3).contiguous().mT]


def test_layouts(device):
    heatmap, single, group = (maps.to(device) for maps in random_maps(1))
    votes = layers.hough_vote(heatmap, single, 3)
    smooth = layers.smooth_votes(votes, 2.0)
    peaks, scores = layers.find_peaks(votes, 0.0)
    graphs = layers.group_keypoints(peaks, scores, group)
    for i in range(3):
        assert torch.equal(layers.hough_vote(layouts(heatmap)[i], layouts(single)[i], 3), votes)
        assert torch.equal(layers.smooth_votes(layouts(votes)[i], 2.0), smooth)
        assert all(map(torch.equal, layers.find_peaks(layouts(votes)[i], 0.0), (peaks, scores)))
        assert all(map(torch.equal, layers.group_keypoints(peaks, scores, layouts(group)[i]), graphs))
    strided = torch.stack((peaks, peaks), dim=2)[..., 0], torch.stack((scores, scores), dim=1)[:, 0]
    assert all(map(torch.equal, layers.group_keypoints(*strided, group), graphs))
    turned = graphs[0].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert all(map(torch.equal, layers.graphs_to_boxes(turned), layers.graphs_to_boxes(graphs[0])))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (0, 0, 0)])
def test_nothing(device, shape):
    n, h, w = shape
    votes = layers.hough_vote(torch.zeros(n, 5, h, w, device=device), torch.zeros(n, 10, h, w, device=device), 5)
    assert votes.shape == layers.smooth_votes(votes, 2.0).shape == (n, 5, h, w)
    peaks, scores = layers.find_peaks(votes, 0.0)
    graphs, image = layers.group_keypoints(peaks, scores, torch.zeros(n, 40, h, w, device=device))
    boxes, box_scores, graph = layers.graphs_to_boxes(graphs)
    assert [len(t) for t in (peaks, scores, graphs, image, boxes, box_scores, graph)] == [0] * 7
    none = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert [t.shape for t in layers.render_targets(*none, n, h, w, 1, 5, 11)] == [(n, c, h, w) for c in (5, 10, 40)]


def test_every_pixel_a_peak(device):
    scores = torch.ones(1, 5, 20, 30)
    group = random_maps(3, 1, 20, 30)[2]
    peaks, values = layers.find_peaks(scores.to(device), 0.5)
    assert same((peaks, values), reference.find_peaks(scores, 0.5)) and len(peaks) == scores.numel()
    expected = reference.group_keypoints(peaks.cpu(), values.cpu(), group)
    assert same(layers.group_keypoints(peaks, values, group.to(device)), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_maps_without_a_finite_value(device, value):
    """No vote, no partner; never a crash."""
    heatmap, single, group = random_maps(4)
    single, group = torch.full_like(single, value), torch.full_like(group, value)
    assert not layers.hough_vote(heatmap.to(device), single.to(device), 5).any()
    if not math.isfinite(value):
        assert not layers.hough_vote(single[:, :5].to(device), torch.zeros_like(single).to(device), 5).any()
    layers.smooth_votes(heatmap.to(device) * value, 2.0)
    layers.find_peaks(single[:, :5].to(device), 0.1)
    peaks, scores = reference.find_peaks(heatmap, 0.9)
    expected = reference.group_keypoints(peaks, scores, group, hops=2)
    found = layers.group_keypoints(peaks.to(device), scores.to(device), group.to(device), hops=2)
    assert same(found, expected) and len(expected[0])
    huge = torch.tensor([[-value, -value, value, value], [0, 0, value, value]]).nan_to_num(nan=math.nan)
    image = torch.zeros(2, dtype=torch.int64)
    for maps in layers.render_targets(huge.to(device), image.to(device), 1, 30, 30, 1, 5, 11):
        assert maps.isfinite().all() or value != value


def test_values_of_any_size_are_voted_for(device):
    """The scores are probabilities, yet nothing overflows with others."""
    heatmap, single, _ = random_maps(5)
    for factor in (1e-30, 1e30, -1.0):
        expected = reference.hough_vote(heatmap * factor, single, 5)
        votes = layers.hough_vote((heatmap * factor).to(device), single.to(device), 5).cpu()
        torch.testing.assert_close(votes / factor, expected / factor, atol=1e-5, rtol=1e-5)


def test_same_from_run_to_run(device):
    heatmap, single, _ = random_maps(6, 3, 64, 96, spread=20.0)
    heatmap, single = heatmap.to(device), single.to(device)
    votes = layers.hough_vote(heatmap, single, 5)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = layers.hough_vote(heatmap, single, 5)
            assert torch.equal(again, votes)
            assert torch.equal(layers.smooth_votes(again, 2.0), layers.smooth_votes(votes, 2.0))
    finally:
        torch.set_num_threads(threads)


def test_mirrored_votes_have_mirrored_maps(device):
    """Smoothing favours no direction in the last bit, which would break or make ties between neighbours."""
    votes = random_maps(7)[0].to(device)
    for dims in ((2,), (3,), (2, 3)):
        assert torch.equal(layers.smooth_votes(votes.flip(dims), 2.0), layers.smooth_votes(votes, 2.0).flip(dims))


# PyTorch's contracts


def arguments(device: str) -> dict[str, tuple]:
    """Of every operator, as its schema takes them."""
    heatmap, single, group = (maps.to(device) for maps in random_maps(8))
    peaks, scores = layers.find_peaks(heatmap, 0.8)
    graphs, _ = layers.group_keypoints(peaks, scores, group)
    boxes = torch.tensor([[2.0, 3, 20, 18], [1, 1, 30, 19]], device=device)
    before, after, places = (torch.tensor(rows) for rows in ([[2, 3], [5, 4]], [[4, 5], [9, 9]], [[1, 9], [37, 10]]))
    products, gradient = torch.randn(26, 9, 3, device=device), torch.randn(130, 3, device=device)
    return {
        "hough_vote": (heatmap, single, 5.0),
        "smooth_votes": (heatmap, 2.0),
        "find_peaks": ([heatmap, heatmap[..., ::2]], 0.8),
        "gather_displacements": (peaks, [group, group[..., ::2]], EDGES),
        "group_peaks": (peaks, scores, layers.gather_displacements(peaks, [group]), 6.0, 10.0, 2),
        "graphs_to_boxes": (graphs, True),
        "render_targets": (boxes, torch.tensor([0, 1], device=device), 2, 21, 37, 1.0, 2.0, 3.5, EDGES),
        "convolve_resized": (products.requires_grad_(), before, after, places, 130),
        "convolve_resized_backward": (gradient, 26, before, after, places),
    }


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck(device, name):
    torch.library.opcheck(getattr(torch.ops.kg_detectron, name).default, arguments(device)[name])


def test_inputs_that_require_grad(device):
    heatmap, single, group = (maps.to(device).requires_grad_() for maps in random_maps(9))
    votes = layers.smooth_votes(layers.hough_vote(heatmap, single, 5), 2.0)
    graphs, _ = layers.group_keypoints(*layers.find_peaks(votes, 0.0), group)
    assert not votes.requires_grad and not layers.graphs_to_boxes(graphs)[0].requires_grad


def test_decoder_under_compile(device):
    heatmap, single, group = random_maps(10, 2, 40, 48, spread=1.0)
    maps = [KeypointMaps(heatmap.to(device) * 8 - 4, single.to(device), group.to(device), 2)]
    decoder, sizes = KeypointDecoder(settings=DecodingSettings(corner_and_centre=True)), [(80, 96)] * 2
    expected = decoder(maps, sizes)
    assert sum(len(boxes) for boxes, _ in expected) > 0
    found = torch.compile(decoder, backend="aot_eager", fullgraph=False)(maps, sizes)
    for own, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, own, wanted))


class DenseAndDecoder(torch.nn.Module):
    """A convolution that changes nothing, and the decoder behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Conv2d(55, 55, 1)
        torch.nn.init.dirac_(self.dense.weight)
        torch.nn.init.zeros_(self.dense.bias)
        self.decoder = KeypointDecoder(radius=3.0)

    def forward(self, maps: Tensor) -> list[tuple[Tensor, Tensor]]:
        heatmap, single, group = self.dense(maps).split((5, 10, 40), dim=1)
        return self.decoder([KeypointMaps(heatmap, single, group, 2)], [(80, 96)] * maps.shape[0])


def test_exported_program_finds_any_number_of_boxes(device):
    boxes = torch.tensor([[10.0, 10, 40, 60], [50, 10, 90, 50], [44, 56, 70, 78]])
    heatmap, single, group = keypoint_targets([boxes, boxes[:0], boxes[:1], boxes[1:]], (80, 96), 2, 3.0)
    maps = torch.cat((heatmap * 20 - 14, single, group), dim=1).to(device)
    model = DenseAndDecoder().to(device).eval()
    program = torch.export.export(model, (maps[[0, 3]],)).module()
    counts = []
    for images in ([0, 3], [1, 2], [1, 1], [3, 2]):
        expected = model(maps[images])
        counts += [len(scores) for _, scores in expected]
        for own, wanted in zip(program(maps[images]), expected, strict=True):
            assert all(map(torch.equal, own, wanted))
    assert counts == [3, 2, 0, 1, 0, 0, 2, 1]


# Calls that do not fit


def test_peaks_outside_the_maps_are_named(device):
    group = torch.zeros(1, 40, 8, 8, device=device)
    for column, value in ((0, 1), (0, -1), (1, 5), (2, 8), (3, 8), (3, -1), (2, 2**62)):
        peaks = torch.zeros(3, 4, dtype=torch.int64)
        peaks[1, column] = value
        with pytest.raises(ValueError, match="peaks"):
            layers.group_keypoints(peaks.to(device), torch.ones(3, device=device), group)
    for column, value in ((0, -1), (1, 5), (1, -1), (2, -1), (2, 2**31), (3, 2**62)):
        peaks = torch.zeros(3, 4, dtype=torch.int64)
        peaks[1, column] = value
        displacements = torch.zeros(3, 4, 2, device=device)
        with pytest.raises(ValueError, match="peaks"):
            layers.group_peaks(peaks.to(device), torch.ones(3, device=device), displacements)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("hough_vote", {0: torch.zeros(2, 5, 21)}),
        ("hough_vote", {1: torch.zeros(2, 10, 21, 36)}),
        ("smooth_votes", {0: torch.zeros(3)}),
        ("find_peaks", {0: []}),
        ("find_peaks", {0: [torch.zeros(3)]}),
        ("find_peaks", {0: [torch.zeros(1, 5, 8, 8, dtype=torch.int32)]}),
        ("find_peaks", {0: [torch.zeros(1, 5, 8, 8), torch.zeros(1, 4, 8, 8)]}),
        ("find_peaks", {0: [torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 8, 8, dtype=torch.float64)]}),
        ("find_peaks", {0: [torch.zeros(1, 5, 8, 8)] * 9}),
        ("find_peaks", {1: math.nan}),
        ("hough_vote", {2: math.inf}),
        ("smooth_votes", {1: -1.0}),
        ("gather_displacements", {0: torch.zeros(3, 3, dtype=torch.int64)}),
        ("gather_displacements", {1: []}),
        ("gather_displacements", {1: [torch.zeros(2, 39, 21, 37)]}),
        ("gather_displacements", {2: EDGES[:-1]}),
        ("gather_displacements", {2: [0, 5]}),
        ("gather_displacements", {2: [-1, 2]}),
        ("gather_displacements", {2: [0, 1, 0, 1]}),
        ("group_peaks", {0: torch.zeros(3, 3, dtype=torch.int64)}),
        ("group_peaks", {1: torch.zeros(0)}),
        ("group_peaks", {2: torch.zeros(0, 4, 2)}),
        ("group_peaks", {2: torch.zeros(3, 8)}),
        ("group_peaks", {3: math.nan}),
        ("group_peaks", {4: math.inf}),
        ("group_peaks", {5: 3}),
        ("graphs_to_boxes", {0: torch.zeros(3, 4, 3)}),
        ("render_targets", {0: torch.zeros(2, 3)}),
        ("render_targets", {0: torch.zeros(2, 4, dtype=torch.float64)}),
        ("render_targets", {1: torch.zeros(3, dtype=torch.int64)}),
        ("render_targets", {3: -1}),
        ("render_targets", {5: 0.0}),
        ("render_targets", {6: math.inf}),
        ("render_targets", {8: [2, 2]}),
        ("convolve_resized", {0: torch.zeros(26, 8, 3)}),
        ("convolve_resized", {0: torch.zeros(25, 9, 3)}),
        ("convolve_resized", {1: torch.tensor([[2, 3], [5, 0]])}),
        ("convolve_resized", {3: torch.tensor([[1, 4], [37, 10]])}),
        ("convolve_resized_backward", {0: torch.zeros(125, 3)}),
        ("convolve_resized_backward", {1: 27}),
    ],
)
def test_operators_called_past_their_wrappers_do_not_crash(device, name, changed):
    values = list(arguments(device)[name])
    for index, value in changed.items():
        values[index] = tree_map_only(Tensor, lambda t: t.to(device), value)
    with pytest.raises(ValueError, match=": expected "):
        getattr(torch.ops.kg_detectron, name)(*values)


def test_one_warning_where_nothing_was_compiled(device, tmp_path):
    shutil.copytree(
        ROOT / "kg_detectron", tmp_path / "kg_detectron", ignore=shutil.ignore_patterns("_C.*", "csrc", "__pycache__")
    )
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
import torch
from kg_detectron import layers
from kg_detectron.graph import DIRECTED_EDGES
assert layers.__file__.startswith({str(tmp_path)!r})
maps = torch.ones(1, 15, 8, 8, device={device!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        votes = layers.hough_vote(maps[:, :5], maps[:, 5:], 5)
        layers.find_peaks(layers.smooth_votes(votes, 2.0), 0.0)
assert len(caught) == 1, caught
print(caught[0].message)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"not compiled for {device}" in run.stdout and "make setup" in run.stdout


def test_reference_as_the_kernel_where_nothing_was_compiled(device, tmp_path):
    """The operators keep PyTorch's contracts: shapes of the fakes, no aliases, gradients."""
    code = """
import warnings
import torch
from kg_detectron.layers import ops
from test_ops_compiled import arguments
warnings.simplefilter("ignore")
assert not ops.COMPILED_FOR
for name, call in arguments({device!r}).items():
    torch.library.opcheck(getattr(torch.ops.kg_detectron, name).default, call)
"""
    environment = os.environ | {
        "KG_DETECTRON_LIBRARY": str(tmp_path / "none.so"),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "layers"))),
    }
    command = [sys.executable, "-c", code.replace("{device!r}", repr(device))]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# The build


@pytest.mark.timeout(1200)
def test_the_cuda_sources_compile(device, tmp_path):
    """The set-up builds them where it finds a toolkit; where it did not, at least the compiler is asked."""
    if device == "cuda" or "cuda" in ops.COMPILED_FOR:
        return
    nvcc = CUDA_HOME and Path(CUDA_HOME) / "bin" / "nvcc"
    if not nvcc or not nvcc.is_file() or torch.version.cuda is None:
        pytest.skip("no nvcc, or a PyTorch without CUDA")
    include = [f"-isystem={path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    command = [str(nvcc), "-std=c++17", "-arch=sm_80", "-Xcompiler", "-fPIC", *COMMON_NVCC_FLAGS, *include, "-c"]
    probe = tmp_path / "probe.cu"
    probe.write_text("#include <c10/cuda/CUDAGuard.h>\n#include <torch/library.h>\n")
    if subprocess.run([*command, str(probe), "-o", str(tmp_path / "probe.o")], capture_output=True).returncode:
        pytest.skip(f"{nvcc} does not compile PyTorch's own headers")
    for source in sorted((ROOT / "kg_detectron" / "layers" / "csrc" / "cuda").glob("*.cu")):
        run = subprocess.run([*command, str(source), "-o", str(tmp_path / "o")], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def set_up(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Build the operators of a copy of the package."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "kg_detectron", folder / "kg_detectron", ignore=shutil.ignore_patterns("_C.*"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def test_set_up_without_a_compiler_goes_on(device, tmp_path):
    """It says that nothing was built, and succeeds."""
    run = set_up(tmp_path, CXX=str(tmp_path / "no-compiler"), FORCE_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert "building C++ FAILED" in run.stdout and "NOT BUILT" in run.stdout
    assert not list((tmp_path / "kg_detectron" / "layers").glob("_C.*"))


def test_forced_cuda_that_cannot_be_built_fails(device, tmp_path):
    run = set_up(tmp_path, CXX=str(tmp_path / "no-compiler"), CUDA_HOME=str(tmp_path / "no-cuda"), FORCE_CUDA="1")
    assert run.returncode != 0 and "FORCE_CUDA=1" in run.stderr
    assert not list((tmp_path / "kg_detectron" / "layers").glob("_C.*"))

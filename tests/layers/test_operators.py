"""The operators against the golden files, against plain nested loops, and on input that does not fit."""

import math

import numpy as np
import pytest
import torch
from builders import golden_files, golden_id
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import nms

from kg_detectron import layers
from kg_detectron.graph import DIRECTED_EDGES, EDGE_INDEX
from kg_detectron.layers import reference
from kg_detectron.modeling import keypoint_targets

# What the package offers, compiled where that was built, and the specification beside it.
both = pytest.mark.parametrize("ops", [layers, reference], ids=["layers", "reference"])


@pytest.fixture(params=golden_files("*_[0-9]*.npz"), ids=golden_id)
def golden(request):
    with np.load(request.param) as file:
        return {name: torch.from_numpy(value) for name, value in file.items()}


def xyxy(golden_boxes: Tensor) -> Tensor:
    return golden_boxes[:, [1, 0, 3, 2]]


# Parity with the published implementation


@both
def test_golden_votes(ops, golden):
    votes = ops.hough_vote(golden["heatmap"][None].float(), golden["single_offset"][None].float(), 5)
    torch.testing.assert_close(votes[0], golden["votes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(ops.smooth_votes(votes, 2.0)[0], golden["smoothed"], atol=1e-4, rtol=0)


@both
def test_golden_peaks_groups_and_boxes(ops, golden):
    votes = ops.hough_vote(golden["heatmap"][None].float(), golden["single_offset"][None].float(), 5)
    peaks, scores = ops.find_peaks(ops.smooth_votes(votes, 2.0), 0.004)
    expected = golden["keypoints"]
    assert {tuple(p) for p in peaks[:, 1:].tolist()} == {(k, y, x) for k, x, y in expected[:, :3].int().tolist()}
    assert len(peaks) == len(expected)

    graphs, image = ops.group_keypoints(peaks, scores, golden["group_offset"][None].float())
    assert (image == 0).all()
    torch.testing.assert_close(graphs.double(), golden["groups"], atol=1e-4, rtol=0)

    boxes, box_scores, graph = ops.graphs_to_boxes(graphs)
    before = golden["boxes_pre_nms_y1x1y2x2s"]
    torch.testing.assert_close(boxes.double(), xyxy(before), atol=1e-3, rtol=0)
    torch.testing.assert_close(box_scores.double(), before[:, 4], atol=1e-3, rtol=0)
    assert graph.tolist() == sorted(set(graph.tolist()))

    # The published NMS drops boxes without area by comparing with 0 / 0; we drop boxes whose corners cross, and compare
    # those that are boxes. Equal scores may come out in another order.
    real = (boxes[:, 2:] > boxes[:, :2]).all(1)
    kept = boxes[real][nms(boxes[real], box_scores[real], 0.5)]
    after = xyxy(golden["boxes_y1x1y2x2s"])
    after = after[(after[:, 2:] > after[:, :2]).all(1)]
    assert len(kept) == len(after)
    distance = (kept[:, None].double() - after[None]).abs().amax(2)
    assert (distance.amin(0) < 1e-3).all() and (distance.amin(1) < 1e-3).all()


def test_golden_targets(golden):
    boxes = golden["boxes_xyxy"].clone()
    boxes[:, 2:] += 1
    heatmap, single, group = keypoint_targets([boxes], tuple(golden["heatmap"].shape[1:]), stride=1, radius=5)
    assert torch.equal(heatmap[0], golden["target_heatmap"])
    assert torch.equal(single[0], golden["target_single_offset"])
    assert torch.equal(group[0], golden["target_group_offset"])


# Plain loops


def loop_votes(heatmap: Tensor, offsets: Tensor, radius: float) -> Tensor:
    n, k, h, w = heatmap.shape
    votes = torch.zeros(n, k, h, w, dtype=torch.float64)
    for i in range(n):
        for c in range(k):
            for y in range(h):
                for x in range(w):
                    value, to_x, to_y = (float(v) for v in (heatmap[i, c, y, x], *offsets[i, 2 * c : 2 * c + 2, y, x]))
                    to_x, to_y = to_x + x, to_y + y
                    if not (math.isfinite(value) and math.isfinite(to_x) and math.isfinite(to_y)):
                        continue
                    left, top = math.floor(to_x), math.floor(to_y)
                    for row, wy in ((top, 1 - (to_y - top)), (top + 1, to_y - top)):
                        for column, wx in ((left, 1 - (to_x - left)), (left + 1, to_x - left)):
                            if 0 <= row < h and 0 <= column < w:
                                votes[i, c, row, column] += value * wy * wx
    return votes / (math.pi * radius**2)


def loop_peaks(scores: Tensor, threshold: float) -> list[tuple]:
    n, k, h, w = scores.shape
    found = []
    for i in range(n):
        for c in range(k):
            for y in range(h):
                for x in range(w):
                    value = float(scores[i, c, y, x])
                    near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                    others = [float(scores[i, c, b, a]) for b, a in near if 0 <= b < h and 0 <= a < w]
                    if math.isfinite(value) and value > threshold:
                        if all(not math.isfinite(o) or value >= o for o in others):
                            found.append((i, -value, c, y, x))
    return [(i, c, y, x) for i, _, c, y, x in sorted(found)]


def loop_partner(source, l, queue, peaks, offsets, match):
    i, a, sy, sx = peaks[source]
    e = EDGE_INDEX[a, l]
    to_x = sx + float(offsets[i, 2 * e, sy, sx])
    to_y = sy + float(offsets[i, 2 * e + 1, sy, sx])
    best = None
    for p in queue:
        if peaks[p][1] == l:
            distance = (peaks[p][3] - to_x) ** 2 + (peaks[p][2] - to_y) ** 2
            if distance <= match**2 and (best is None or distance < best[0]):
                best = (distance, p)
    return None if best is None else best[1]


def loop_groups(peaks, scores, offsets, match, reject, hops):
    graphs, images = [], []
    for i in range(offsets.shape[0]):
        queue = [p for p in range(len(peaks)) if peaks[p][0] == i]
        opened = []
        while queue:
            start = queue.pop(0)
            _, k, y, x = peaks[start]
            if any(g[k] is not None and math.hypot(peaks[g[k]][3] - x, peaks[g[k]][2] - y) <= reject for g in opened):
                continue
            graph = [None] * 5
            graph[k] = start

            for l in range(5):
                if l != k:
                    graph[l] = loop_partner(start, l, queue, peaks, offsets, match)
                    if graph[l] is not None:
                        queue.remove(graph[l])
            if hops == 2:
                joined = [p for p in graph if p is not None and p != start]
                joined.sort(key=lambda p: -scores[p])
                for l in range(5):
                    for source in joined:
                        if graph[l] is None:
                            graph[l] = loop_partner(source, l, queue, peaks, offsets, match)
                            if graph[l] is not None:
                                queue.remove(graph[l])
            opened.append(graph)
        graphs += opened
        images += [i] * len(opened)
    return graphs, images


def random_maps(seed: int, n: int = 2, h: int = 9, w: int = 11, spread: float = 4.0):
    generator = torch.Generator().manual_seed(seed)
    heatmap = torch.rand(n, 5, h, w, generator=generator)
    single = torch.randn(n, 10, h, w, generator=generator) * spread
    group = torch.randn(n, 40, h, w, generator=generator) * spread
    return heatmap, single, group


seeds = st.integers(0, 2**31)


@both
@given(seed=seeds, whole=st.booleans(), broken=st.booleans())
def test_votes_equal_loops(ops, seed, whole, broken):
    heatmap, single, _ = random_maps(seed)
    if whole:
        single = single.round()
    if broken:
        heatmap[0, 0, 0, 0], single[0, 3, 2, 2], single[1, 0, 4, 4] = math.nan, math.inf, math.nan
    expected = loop_votes(heatmap, single, 3.0)
    torch.testing.assert_close(ops.hough_vote(heatmap, single, 3.0).double(), expected, atol=1e-6, rtol=1e-5)


@both
@given(seed=seeds, levels=st.sampled_from([3, 1000]), broken=st.booleans())
def test_peaks_equal_loops(ops, seed, levels, broken):
    scores = (random_maps(seed)[0] * levels).round() / levels  # few levels make ties and plateaus
    if broken:
        scores[0, 0, 1, 1], scores[1, 2, 3, 3], scores[1, 2, 3, 4] = math.nan, math.inf, -math.inf
    peaks, values = ops.find_peaks(scores, 0.31234)
    assert [tuple(p) for p in peaks.tolist()] == loop_peaks(scores, 0.31234)
    assert torch.equal(values, scores[tuple(peaks.T)])


@both
@settings(max_examples=30)
@given(seed=seeds)
def test_several_scales_are_each_by_itself(ops, seed):
    """Image + N * scale tells them apart, from the peaks to the graphs."""
    (first, _, offsets), (second, _, others) = random_maps(seed), random_maps(seed + 1, h=5, w=6)
    peaks, scores = ops.find_peaks([first, second], 0.7)
    apart = ops.find_peaks(first, 0.7), ops.find_peaks(second, 0.7)
    after = torch.tensor([2, 0, 0, 0])
    assert torch.equal(peaks, torch.cat((apart[0][0], apart[1][0] + after)))
    assert torch.equal(scores, torch.cat((apart[0][1], apart[1][1])))

    displacements = ops.gather_displacements(peaks, [offsets, others])
    for (group, k, y, x), by in zip(peaks.tolist(), displacements.tolist(), strict=True):
        for l, found in zip([l for l in range(5) if l != k], by, strict=True):
            e = EDGE_INDEX[k, l]
            assert found == [offsets, others][group // 2][group % 2, 2 * e : 2 * e + 2, y, x].tolist()

    graphs, image = ops.group_peaks(peaks, scores, displacements, 4.0, 5.0, 2)
    (of_first, image_of_first), (of_second, image_of_second) = (
        ops.group_keypoints(*found, maps, 4.0, 5.0, 2) for found, maps in zip(apart, (offsets, others), strict=True)
    )
    assert torch.equal(graphs, torch.cat((of_first, of_second)))
    assert torch.equal(image, torch.cat((image_of_first, image_of_second + 2)))


@both
@given(seed=seeds, hops=st.sampled_from([1, 2]), match=st.sampled_from([1.5, 4.0]), reject=st.sampled_from([2.0, 5.0]))
def test_groups_equal_loops(ops, seed, hops, match, reject):
    heatmap, _, group = random_maps(seed)
    scores = (heatmap * 4).round() / 4
    if seed % 2:
        group = group.round()  # equal distances
    peaks, values = ops.find_peaks(scores, 0.7)
    graphs, image = ops.group_keypoints(peaks, values, group, match, reject, hops)
    expected, images = loop_groups(peaks.tolist(), values.tolist(), group, match, reject, hops)
    assert image.tolist() == images
    for graph, members in zip(graphs.tolist(), expected, strict=True):
        for (x, y, score), p in zip(graph, members, strict=True):
            if p is None:
                assert score == 0
            else:
                assert [y, x] == peaks[p, 2:].tolist() and score == pytest.approx(float(values[p]))


def loop_box(graph, corner_and_centre):
    """The cases of retrieval, one by one."""
    there = [k for k in range(5) if graph[k][2] > 0]
    corners = [k for k in there if k < 4]
    if len(corners) < (1 if corner_and_centre else 2):
        return None

    def side(axis, keys, outer):
        values = [graph[k][axis] for k in keys if k in there]
        return outer(values) if values else None

    sides = []
    for axis, low, high in ((0, (0, 2), (1, 3)), (1, (0, 1), (2, 3))):
        first, last = side(axis, low, min), side(axis, high, max)
        if first is None and last is None:
            return None
        if first is None or last is None:
            if 4 not in there:
                return None
            first, last = (
                2 * graph[4][axis] - last if first is None else first,
                2 * graph[4][axis] - first if last is None else last,
            )
        sides.append((first, last))
    (x1, x2), (y1, y2) = sides
    return (x1, y1, x2, y2), sum(graph[k][2] for k in there) / len(there)


@both
@given(seed=seeds, option=st.booleans())
def test_boxes_equal_loops_for_every_set_of_keypoints(ops, seed, option):
    generator = torch.Generator().manual_seed(seed)
    graphs = torch.rand(32, 5, 3, generator=generator, dtype=torch.float64) * 50 + 0.01
    for subset in range(32):
        for k in range(5):
            if not subset >> k & 1:
                graphs[subset, k] = 0
    boxes, scores, graph = ops.graphs_to_boxes(graphs, corner_and_centre=option)
    expected = {i: box for i in range(32) if (box := loop_box(graphs[i].tolist(), option)) is not None}
    assert graph.tolist() == list(expected)
    for box, score, i in zip(boxes.tolist(), scores.tolist(), graph.tolist(), strict=True):
        assert box == pytest.approx(expected[i][0]) and score == pytest.approx(expected[i][1])


@both
def test_which_sets_of_keypoints_give_a_box(ops):
    """Any three keypoints, or a diagonal; with the option one corner and the centre too (paper, figure 1d)."""
    for option, count in ((False, 10 + 5 + 1 + 2), (True, 10 + 5 + 1 + 2 + 4)):
        graphs = torch.zeros(32, 5, 3)
        for subset in range(32):
            graphs[subset, [k for k in range(5) if subset >> k & 1]] = 1.0
        assert len(ops.graphs_to_boxes(graphs, option)[0]) == count


@both
def test_keypoints_at_the_origin_count(ops):
    """A keypoint at x = 0 or y = 0 is present, and a missing one rejects nothing near the origin."""
    graph = torch.tensor([[[0, 0, 1], [20, 0, 1], [0, 30, 1], [20, 30, 1], [10, 15, 1.0]]])
    assert ops.graphs_to_boxes(graph)[0].tolist() == [[0, 0, 20, 30]]
    peaks = torch.tensor([[0, 4, 25, 25], [0, 0, 2, 3]])  # a centre alone, then a corner near the origin
    graphs, _ = ops.group_keypoints(peaks, torch.tensor([0.9, 0.5]), torch.zeros(1, 40, 30, 30))
    assert len(graphs) == 2


# Input at the edges, and input that does not fit


@both
def test_empty_batches_and_no_peaks(ops):
    assert ops.hough_vote(torch.zeros(0, 5, 8, 8), torch.zeros(0, 10, 8, 8), 5).shape == (0, 5, 8, 8)
    assert ops.smooth_votes(torch.zeros(0, 5, 8, 8), 2.0).shape == (0, 5, 8, 8)
    peaks, scores = ops.find_peaks(torch.zeros(2, 5, 8, 8), 0.004)
    assert peaks.shape == (0, 4) and scores.shape == (0,)
    graphs, image = ops.group_keypoints(peaks, scores, torch.zeros(2, 40, 8, 8))
    assert graphs.shape == (0, 5, 3) and image.shape == (0,)
    boxes, scores, graph = ops.graphs_to_boxes(graphs)
    assert boxes.shape == (0, 4) and scores.shape == (0,) and graph.shape == (0,)


@both
def test_smoothing_by_nothing_copies(ops):
    votes = random_maps(4)[0]
    smooth = ops.smooth_votes(votes, 0)
    assert torch.equal(smooth, votes) and smooth.data_ptr() != votes.data_ptr()


@both
def test_smoothing_of_a_map_smaller_than_its_reach(ops):
    scipy_ndimage = pytest.importorskip("scipy.ndimage")
    votes = torch.rand(1, 1, 3, 5, dtype=torch.float64)
    expected = scipy_ndimage.gaussian_filter(votes[0, 0].numpy(), 2.0, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(ops.smooth_votes(votes, 2.0)[0, 0].numpy(), expected, atol=1e-12)


@both
def test_inputs_stay_as_they_are_and_layout_does_not_matter(ops):
    heatmap, single, group = random_maps(1)
    copies = [t.clone() for t in (heatmap, single, group)]
    votes = ops.hough_vote(heatmap, single, 3)
    strided = [t.to(memory_format=torch.channels_last) for t in (heatmap, single, group)]
    assert torch.equal(ops.hough_vote(strided[0], strided[1], 3), votes)
    peaks, scores = ops.find_peaks(votes, 0.0)
    expected = ops.group_keypoints(peaks, scores, group)
    assert all(map(torch.equal, ops.group_keypoints(peaks, scores, strided[2]), expected))
    assert all(map(torch.equal, (heatmap, single, group), copies))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(ops, dtype):
    heatmap, single, group = (t.to(dtype) for t in random_maps(2))
    votes = ops.hough_vote(heatmap, single, 3)
    wide = torch.promote_types(dtype, torch.float32)
    assert votes.dtype == wide
    torch.testing.assert_close(votes, ops.hough_vote(heatmap.to(wide), single.to(wide), 3))
    peaks, scores = ops.find_peaks(votes, 0.0)
    assert all(
        map(torch.equal, ops.group_keypoints(peaks, scores, group), ops.group_keypoints(peaks, scores, group.to(wide)))
    )


MAPS = torch.zeros(1, 5, 8, 8)
PEAKS = torch.zeros(1, 4, dtype=torch.int64)
BOXES = torch.zeros(1, 4)


@both
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda ops: ops.hough_vote(MAPS[0], torch.zeros(1, 10, 8, 8), 5), "heatmap"),
        (lambda ops: ops.hough_vote(MAPS.long(), torch.zeros(1, 10, 8, 8), 5), "heatmap"),
        (lambda ops: ops.hough_vote(MAPS, torch.zeros(1, 5, 8, 8), 5), "offsets"),
        (lambda ops: ops.hough_vote(MAPS, torch.zeros(1, 10, 8, 9), 5), "offsets"),
        (lambda ops: ops.hough_vote(MAPS, torch.zeros(1, 10, 8, 8), 0), "radius"),
        (lambda ops: ops.hough_vote(MAPS, torch.zeros(1, 10, 8, 8), math.nan), "radius"),
        (lambda ops: ops.smooth_votes(MAPS, -1.0), "sigma"),
        (lambda ops: ops.find_peaks(MAPS[0], 0.1), "scores"),
        (lambda ops: ops.find_peaks(MAPS, math.nan), "threshold"),
        (lambda ops: ops.group_keypoints(PEAKS.float(), torch.ones(1), torch.zeros(1, 40, 8, 8)), "peaks"),
        (lambda ops: ops.group_keypoints(PEAKS, torch.ones(2), torch.zeros(1, 40, 8, 8)), "scores"),
        (lambda ops: ops.group_keypoints(PEAKS, torch.ones(1), torch.zeros(1, 20, 8, 8)), "group_offsets"),
        (lambda ops: ops.group_keypoints(PEAKS + 8, torch.ones(1), torch.zeros(1, 40, 8, 8)), "peaks"),
        (lambda ops: ops.group_keypoints(PEAKS, torch.ones(1), torch.zeros(1, 40, 8, 8), hops=3), "hops"),
        (
            lambda ops: ops.group_keypoints(PEAKS, torch.ones(1), torch.zeros(1, 40, 8, 8), match_radius=-1),
            "match_radius",
        ),
        (lambda ops: ops.find_peaks([], 0.1), "scores"),
        (lambda ops: ops.find_peaks([MAPS, MAPS.double()], 0.1), "scores"),
        (lambda ops: ops.gather_displacements(PEAKS[:, :3], [torch.zeros(1, 40, 8, 8)]), "peaks"),
        (
            lambda ops: ops.gather_displacements(PEAKS, [torch.zeros(1, 40, 8, 8), torch.zeros(2, 40, 4, 4)]),
            "group_offsets",
        ),
        (lambda ops: ops.group_peaks(PEAKS, torch.ones(1), torch.zeros(1, 4)), "displacements"),
        (lambda ops: ops.group_peaks(PEAKS - 1, torch.ones(1), torch.zeros(1, 4, 2)), "peaks"),
        (lambda ops: ops.gather_displacements(PEAKS, [torch.zeros(1, 2, 8, 8)], [(0, 5)]), "edges"),
        (lambda ops: ops.graphs_to_boxes(torch.zeros(1, 4, 3)), "graphs"),
        (lambda ops: ops.graphs_to_boxes(torch.zeros(1, 5, 3, dtype=torch.int64)), "graphs"),
        (lambda ops: ops.render_targets(BOXES.double(), PEAKS[:, 0], 1, 8, 8, 1, 5, 0), "boxes"),
        (lambda ops: ops.render_targets(BOXES, PEAKS[0], 1, 8, 8, 1, 5, 0), "image"),
        (lambda ops: ops.render_targets(BOXES, PEAKS[:, 0] + 1, 1, 8, 8, 1, 5, 0), "image"),
        (lambda ops: ops.render_targets(BOXES, PEAKS[:, 0], 1, -8, 8, 1, 5, 0), "height"),
        (lambda ops: ops.render_targets(BOXES, PEAKS[:, 0], 1, 8, 8, 0, 5, 0), "stride"),
    ],
)
def test_input_that_does_not_fit_is_named(ops, call, named):
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        call(ops)


def test_edges_are_numbered_as_the_channels():
    assert DIRECTED_EDGES[:10] == ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))
    assert all(DIRECTED_EDGES[10 + e] == DIRECTED_EDGES[e][::-1] for e in range(10))

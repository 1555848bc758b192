"""Retrieval by completion, against plain loops, and in the decoder."""

import math

import numpy as np
import pytest
import torch
from builders import tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st

from kg_detectron.graph import CENTRE, NUM_KEYPOINTS
from kg_detectron.layers import box_keypoints, graphs_to_boxes
from kg_detectron.modeling.keypoint_graph.completion import complete_graphs, completed_boxes
from kg_detectron.modeling.keypoint_graph.decoding import DecodingSettings, KeypointDecoder, Peaks


def drawn_peaks(seed: int, count: int, groups: int = 2, side: int = 24) -> Peaks:
    """Peaks as the decoder orders them, at different places, some with scores or displacements that are equal."""
    rng = np.random.default_rng(seed)
    places = rng.choice(groups * NUM_KEYPOINTS * side * side, count, replace=False)
    peaks = np.stack(np.unravel_index(places, (groups, NUM_KEYPOINTS, side, side)), axis=1)
    scores = rng.integers(1, 6, count) / 10
    order = np.lexsort((*peaks.T[:0:-1], -scores, peaks[:, 0]))
    displacements = rng.integers(-side, side, (count, 4, 2)) / 2
    displacements[rng.random(count) < 0.1] = rng.choice([math.nan, math.inf])
    return Peaks(
        torch.from_numpy(peaks[order]), torch.from_numpy(scores[order]).float(), torch.from_numpy(displacements).float()
    )


def by_loops(found: Peaks, match_radius: float, missing_factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The requirement: graphs, boxes, scores."""
    peaks, scores, displacements = (value.numpy().astype(float) for value in found)
    graphs, boxes, box_scores = [], [], []
    for (group, keypoint, y, x), score, towards in zip(peaks, scores, displacements, strict=True):
        graph = {int(keypoint): (x, y, score)}
        others = [l for l in range(NUM_KEYPOINTS) if l != keypoint]
        for l, (dx, dy) in zip(others, towards, strict=True):
            graph[l] = (x + dx, y + dy, 0.0)
            best = math.inf
            for other, other_score in zip(peaks, scores, strict=True):
                distance = math.hypot(other[3] - x - dx, other[2] - y - dy)
                if other[0] == group and other[1] == l and distance <= match_radius and distance < best:
                    graph[l], best = (other[3], other[2], other_score), distance
        present = [l for l in graph if graph[l][2] > 0]

        def side(corners, axis, graph=graph, present=present):
            chosen = [k for k in corners if k in present] or corners
            return sum(graph[k][axis] for k in chosen) / len(chosen)

        boxes.append([side((0, 2), 0), side((0, 1), 1), side((1, 3), 0), side((2, 3), 1)])
        mean = sum(graph[l][2] for l in present) / len(present)
        box_scores.append(mean * missing_factor ** (NUM_KEYPOINTS - len(present)))
        graphs.append([graph[l] for l in range(NUM_KEYPOINTS)])
    return (
        np.array(graphs).reshape(-1, NUM_KEYPOINTS, 3),
        np.array(boxes).reshape(-1, 4),
        np.array(box_scores).reshape(-1),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 120), st.sampled_from([0.4, 1.0, 2.5, 3.0, 7.0]))
def test_graphs_and_boxes_are_those_of_plain_loops(seed, count, radius):
    found = drawn_peaks(seed, count)
    expected, boxes, scores = (torch.from_numpy(value).float() for value in by_loops(found, radius, 0.5))
    graphs = complete_graphs(*found, radius)
    torch.testing.assert_close(graphs, expected, equal_nan=True)
    found_boxes, found_scores = completed_boxes(graphs, 0.5)
    torch.testing.assert_close(found_boxes, boxes, equal_nan=True)
    torch.testing.assert_close(found_scores, scores)


def peaks_of_box(box: list[float], keypoints: list[int], score: float = 0.4) -> Peaks:
    """Peaks at keypoints of a box, whose group offsets are exact."""
    points = box_keypoints(torch.tensor([box]).float())[0]  # [5,2]
    peaks = torch.stack([torch.tensor([0, k, points[k, 1], points[k, 0]]) for k in keypoints]).long()
    others = [[l for l in range(NUM_KEYPOINTS) if l != k] for k in keypoints]
    displacements = torch.stack([points[o] - points[k] for k, o in zip(keypoints, others, strict=True)])
    return Peaks(peaks, torch.full((len(keypoints),), score), displacements)


@pytest.mark.parametrize("keypoint", range(NUM_KEYPOINTS))
def test_a_lone_peak_gives_the_box_of_its_cell(keypoint):
    found = peaks_of_box([4, 6, 15, 21], [keypoint])
    boxes, scores = completed_boxes(complete_graphs(*found, 3.0), 0.5)
    torch.testing.assert_close(boxes, torch.tensor([[4.0, 6, 14, 20]]))
    torch.testing.assert_close(scores, torch.tensor([0.4 / 16]))


def test_with_all_keypoints_it_is_the_box_of_grouping():
    found = peaks_of_box([4, 6, 15, 21], list(range(NUM_KEYPOINTS)))
    graphs = complete_graphs(*found, 3.0)
    boxes, scores = completed_boxes(graphs, 0.5)
    expected, expected_scores, _ = graphs_to_boxes(graphs)
    torch.testing.assert_close(boxes, expected)
    torch.testing.assert_close(scores, expected_scores)


def test_the_decoder_finds_cells_whose_peaks_went_to_another_graph():
    # Of two cells with a common corner keypoint, only one can have it when peaks are used once.
    first, second = peaks_of_box([0, 0, 11, 11], [0, 3], 0.5), peaks_of_box([10, 10, 21, 21], [CENTRE], 0.2)
    found = Peaks(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
    boxes = {}
    for factor in (0.0, 0.5):
        decoder = KeypointDecoder(2.0, DecodingSettings(missing_factor=factor, nms_threshold=0.7))
        ((boxes[factor], scores),) = decoder.assemble(found, [(32, 32)], [1])
        assert (scores.diff() <= 0).all()
    assert boxes[0.0].tolist() == [[0, 0, 11, 11]]
    assert boxes[0.5].tolist() == [[0, 0, 11, 11], [10, 10, 21, 21]]


def test_weak_candidates_can_be_dropped():
    found = peaks_of_box([4, 6, 15, 21], [CENTRE])
    for least, count in ((0.02, 1), (0.03, 0)):
        decoder = KeypointDecoder(2.0, DecodingSettings(missing_factor=0.5, min_candidate_score=least))
        ((boxes, _),) = decoder.assemble(found, [(32, 32)], [1])
        assert len(boxes) == count


def test_images_of_a_batch_are_apart_and_a_whole_network_runs():
    model = tiny_network(missing_factor=0.5).eval()
    images = [torch.rand(3, 64, 96) * 255, torch.rand(3, 64, 96) * 255]
    together, alone = model.detect(images), [model.detect([image])[0] for image in images]
    for cells, single in zip(together, alone, strict=True):
        assert len(cells) == len(single) > 0
        torch.testing.assert_close(cells.boxes, single.boxes)


def test_no_peaks_give_no_boxes():
    none = Peaks(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0), torch.zeros(0, 4, 2))
    decoder = KeypointDecoder(2.0, DecodingSettings(missing_factor=0.5))
    ((boxes, scores),) = decoder.assemble(none, [(32, 32)], [1])
    assert boxes.shape == (0, 4) and scores.shape == (0,)


@pytest.mark.parametrize("name", ["missing_factor", "min_candidate_score"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        DecodingSettings(**{name: value})

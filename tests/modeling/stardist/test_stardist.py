"""StarDist: targets, losses and decoding against plain loops, and targets that decode to the cells they come from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from kg_detectron.metrics.iou import mask_iou
from kg_detectron.modeling.classes import ClassSettings
from kg_detectron.modeling.stardist.decoding import decode_stars
from kg_detectron.modeling.stardist.losses import star_class_loss, star_losses
from kg_detectron.modeling.stardist.network import StarHeads
from kg_detectron.modeling.stardist.polygons import areas, polygon_pixels, suppress, vertices
from kg_detectron.modeling.stardist.settings import StarDecodingSettings, StarHeadSettings
from kg_detectron.modeling.stardist.targets import object_probability, star_classes, star_distances, star_targets

SIDE = 64


def wavy_discs(seed: int, count: int) -> torch.Tensor:
    """(SIDE, SIDE) labels of star-convex shapes apart from each other, in the cells of a coarse grid."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((SIDE, SIDE), np.int64)
    y, x = np.indices(labels.shape) + 0.5
    for number, place in enumerate(rng.choice(9, count, replace=False), start=1):
        centre = (np.array(divmod(place, 3)) + 0.5) * SIDE / 3 + rng.uniform(-2, 2, 2)
        angle = np.arctan2(y - centre[0], x - centre[1])
        radius = rng.uniform(5, 7.5) * (1 + 0.1 * np.cos(rng.integers(2, 4) * angle + rng.uniform(0, 6)))
        labels[np.hypot(y - centre[0], x - centre[1]) <= radius] = number
    return torch.from_numpy(labels)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1, 2]))
def test_targets_decode_to_the_cells(seed, count, stride):
    labels = wavy_discs(seed, count)
    probability, distances = star_targets(labels[None], stride, 32)
    cells = decode_stars(probability[0], distances[0], stride, (SIDE, SIDE), StarDecodingSettings())
    assert len(cells) == count and (cells.scores.diff() <= 0).all()
    truth = torch.stack([labels == number for number in range(1, count + 1)])
    found = torch.stack(list(cells.masks))
    overlap = (truth[:, None] & found).sum((2, 3)) / (truth[:, None] | found).sum((2, 3))
    assert overlap.amax(1).min() > 0.9
    assert overlap.amax(0).min() > 0.9


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_distances_are_those_of_slow_rays(stride):
    labels = torch.from_numpy(np.kron(np.random.default_rng(stride).integers(0, 3, (4, 5)), np.ones((8, 8), int)))
    distances = star_distances(labels[None], stride, 8)[0]
    labels, step = labels.numpy(), 1 / 64
    for row, column in [(1, 2), (3, 3), (0, 0), (32 // stride - 1, 40 // stride - 1)]:
        y, x = (row + 0.5) * stride, (column + 0.5) * stride
        label = labels[row * stride + stride // 2, column * stride + stride // 2]
        for k in range(8):
            down, right = round(math.sin(k * math.pi / 4), 9), round(math.cos(k * math.pi / 4), 9)
            length = 0.0
            while label:
                middle = length + step / 2
                i, j = math.floor(y + middle * down), math.floor(x + middle * right)
                if not (0 <= i < 32 and 0 <= j < 40 and labels[i, j] == label):
                    break
                length += step
            assert float(distances[k, row, column]) == pytest.approx(length, abs=2 * step)


def published_distance(labels: np.ndarray, row: int, column: int, angle: float) -> float:
    """The length of a ray as the publication's program takes it: steps of one pixel from the pixel's centre, rounded to
    the nearest pixel, until that is another cell's; less the part of the last step that overshoots on average."""
    down, right = math.sin(angle), math.cos(angle)
    steps = 0
    while True:
        steps += 1
        i, j = round(row + steps * down), round(column + steps * right)
        inside = 0 <= i < labels.shape[0] and 0 <= j < labels.shape[1]
        if not (inside and labels[i, j] == labels[row, column]):
            return steps - (1 - 0.5 / max(abs(down), abs(right)))


def test_distances_are_the_published_ones_but_for_whole_steps():
    labels = wavy_discs(3, 6).numpy()
    distances = star_distances(torch.from_numpy(labels)[None], 1, 16)[0].numpy()
    rows, columns = np.nonzero(labels)
    steps = range(0, len(rows), 7)
    errors = np.zeros((len(steps), 16))
    for n, k in np.ndindex(*errors.shape):
        row, column = rows[steps[n]], columns[steps[n]]
        errors[n, k] = distances[k, row, column] - published_distance(labels, row, column, 2 * math.pi * k / 16)
    assert np.abs(errors[:, ::4]).max() < 1e-4  # along rows and columns steps end at the border
    assert np.median(np.abs(errors)) < 0.2 and abs(errors.mean()) < 0.1


GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "stardist.npz")


@pytest.mark.parametrize("case", range(int(GOLDEN["cases"])))
def test_it_equals_the_published_program_on_stored_cases(case):
    """Targets, and the way from maps to cells, of the public package stardist, see tests/golden/README.md."""
    labels, probability, distances, rendered = (
        torch.from_numpy(GOLDEN[f"{name}_{case}"].astype(np.float32))
        for name in ("labels", "probability", "distances", "rendered")
    )
    true_probability, true_distances = GOLDEN[f"true_probability_{case}"], GOLDEN[f"true_distances_{case}"]
    np.testing.assert_allclose(object_probability(labels.long()).numpy(), true_probability, atol=1e-3)
    found = star_distances(labels[None].long(), 1, len(distances))[0].numpy()
    errors = np.abs(found - true_distances)[:, labels.numpy() > 0]
    # Half a step of the program, along a diagonal 0.71 pixels; more where a step jumps over a corner of background.
    assert errors[::4].max() < 0.01 and np.median(errors) < 0.2 and (errors < 0.72).mean() > 0.98
    for row, column in np.argwhere(labels.numpy())[::20]:
        loops = [published_distance(labels.numpy(), row, column, math.pi * k / 8) for k in range(16)]
        assert (np.abs(loops - true_distances[:, row, column]) < 0.01).sum() >= 15  # a step may end between two pixels
    cells = decode_stars(probability, distances, 1, tuple(labels.shape), StarDecodingSettings())
    assert len(cells) == int(rendered.max()) > 3
    for mask, score in zip(cells.masks, cells.scores, strict=True):
        numbers = rendered[mask].unique()
        assert len(numbers) == 1 and int(numbers) > 0 and torch.equal(mask, rendered == numbers)
        assert float(score) == pytest.approx(float(GOLDEN[f"scores_{case}"][int(numbers) - 1]), abs=1e-6)


def test_probability_is_the_relative_depth():
    labels = torch.zeros(9, 12, dtype=torch.int64)
    labels[:, :5], labels[2:5, 5:8] = (
        1,
        2,
    )  # the first one lies at the border, which is no outline, and touches the second
    probability = object_probability(labels)
    depth = {}
    for i, j in np.ndindex(9, 12):
        if labels[i, j]:
            depth[i, j] = min(math.dist((i, j), (a, b)) for a, b in np.ndindex(9, 12) if labels[a, b] != labels[i, j])
    assert (object_probability(torch.ones(3, 4, dtype=torch.int64)) == 1).all()  # a cell without an outline
    for y, x in np.ndindex(9, 12):
        expected = 0.0
        if labels[y, x]:
            expected = depth[y, x] / max(d for place, d in depth.items() if labels[place] == labels[y, x])
        assert float(probability[y, x]) == pytest.approx(expected, abs=1e-5)


def test_losses_are_those_of_plain_loops():
    torch.manual_seed(0)
    logits, distances = torch.randn(2, 3, 4), torch.randn(2, 5, 3, 4)
    probability, truth = torch.rand(2, 3, 4) * (torch.rand(2, 3, 4) > 0.5), torch.rand(2, 5, 3, 4)
    weights = StarHeadSettings(rays=5, distance_weight=0.3, background_weight=0.01)
    losses = star_losses(logits, distances, probability, truth, weights)
    entropy = error = background = 0.0
    for n, y, x in np.ndindex(2, 3, 4):
        p, q = float(probability[n, y, x]), 1 / (1 + math.exp(-logits[n, y, x]))
        entropy -= (p * math.log(q) + (1 - p) * math.log(1 - q)) / 24
        for k in range(5):
            error += p * abs(float(distances[n, k, y, x] - truth[n, k, y, x])) / 5
            background += (1 - p) * abs(float(distances[n, k, y, x])) / 5 / 24
    expected = 0.3 * (error / float(probability.sum()) + 0.01 * background)
    assert float(losses["loss_probability"]) == pytest.approx(entropy, rel=1e-5)
    assert float(losses["loss_distance"]) == pytest.approx(expected, rel=1e-5)


def test_distances_are_learned_in_their_unit():
    settings = StarHeadSettings(rays=3, channels=4, distance_unit=8.0)
    in_pixels = StarHeads(2, StarHeadSettings(rays=3, channels=4), ClassSettings())
    in_units = StarHeads(2, settings, ClassSettings())
    in_units.load_state_dict(in_pixels.state_dict())
    decoded = torch.randn(1, 2, 5, 6)
    assert torch.equal(in_units(decoded).distances, 8 * in_pixels(decoded).distances)
    assert torch.equal(in_units(decoded).probability, in_pixels(decoded).probability)
    with pytest.raises(ValueError, match="distance_unit.*above 0.*-1"):
        StarHeadSettings(distance_unit=-1.0)


def test_classes_of_pixels_and_their_loss_are_those_of_plain_loops():
    torch.manual_seed(0)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (2, 6, 24)))
    of_cells = [torch.tensor([2, 0, 1]), torch.tensor([3, 3, 0])]
    classes = star_classes(labels, 2, of_cells)
    logits, weights = torch.randn(2, 4, 3, 12), torch.tensor([0.5, 2.0, 3.0])
    total = 0.0
    for n, y, x in np.ndindex(2, 3, 12):
        cell = int(labels[n, 2 * y + 1, 2 * x + 1])
        number = int(of_cells[n][cell - 1]) or -1 if cell else 0
        assert classes[n, y, x] == number
        if number >= 0:
            weight = float(weights[number - 1]) if number else 1.0
            total -= weight * math.log(float(logits[n, :, y, x].exp()[number] / logits[n, :, y, x].exp().sum()))
    assert set(classes.unique().tolist()) == {-1, 0, 1, 2, 3}
    assert float(star_class_loss(logits, classes, weights)) == pytest.approx(total / 72, rel=1e-5)
    nothing = star_classes(labels[:1], 2, [torch.zeros(3, dtype=torch.long)])
    assert set(nothing.unique().tolist()) == {-1, 0}


def random_polygons(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * 40
    distances = 3 + 6 * torch.rand(count, 16, generator=generator)
    return centres, distances, torch.rand(count, generator=generator)


def test_pixels_of_a_polygon_are_those_that_it_draws():
    size = (40, 44)
    for centre, distances in zip(*random_polygons(0, 20)[:2], strict=True):
        drawn = torch.zeros(size, dtype=torch.bool)
        x, y = polygon_pixels(centre, distances, size).unbind(1)
        drawn[y, x] = True
        corners = vertices(centre[None], distances[None])[0].flip(1).numpy() - 0.5
        expected = polygon2mask(size, corners)
        assert (drawn.numpy() != expected).sum() <= 1  # a pixel's centre on an edge


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([0.0, 0.3, 0.6]))
def test_suppression_is_that_of_a_slow_loop(seed, count, threshold):
    centres, distances, scores = random_polygons(seed, count)
    pixels = [{*map(tuple, polygon_pixels(c, d).tolist())} for c, d in zip(centres, distances, strict=True)]
    area = areas(distances).tolist()
    kept: list[int] = []
    for i in sorted(range(count), key=lambda i: -float(scores[i])):
        if all(len(pixels[i] & pixels[j]) <= threshold * min(area[i], area[j]) for j in kept):
            kept.append(i)
    assert suppress(centres, distances, scores, threshold).tolist() == kept


def test_areas_are_those_of_the_polygons():
    centres, distances, _ = random_polygons(1, 5)
    for corners, area in zip(vertices(centres, distances), areas(distances), strict=True):
        x, y = corners.double().unbind(1)
        assert float(area) == pytest.approx(float((x * y.roll(-1) - y * x.roll(-1)).sum()) / 2, rel=1e-4)


def test_a_large_polygon_is_sampled_and_still_suppresses():
    centres = torch.tensor([[100.0, 100.0], [104.0, 100.0], [180.0, 100.0]])
    distances = torch.full((3, 32), 80.0)
    kept = suppress(centres, distances, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    assert kept.tolist() == [0, 2]


def test_stars_that_reach_beyond_the_image_suppress_each_other():
    """By their whole overlap, of which a quarter lies within the image."""
    probability = torch.zeros(32, 32)
    probability[0, 0], probability[1, 1] = 0.9, 0.8
    cells = decode_stars(probability, torch.full((16, 32, 32), 8.0), 1, (32, 32), StarDecodingSettings())
    assert cells.scores.tolist() == pytest.approx([0.9])


def test_of_overlapping_stars_the_better_one_has_the_pixels():
    probability = torch.zeros(32, 32)
    probability[15, 10], probability[15, 18] = 0.7, 0.9
    classes = torch.ones(32, 32, dtype=torch.long)
    classes[15, 10], classes[15, 18] = 3, 2  # of the centres alone
    cells = decode_stars(probability, torch.full((16, 32, 32), 6.0), 1, (32, 30), StarDecodingSettings(), classes)
    assert cells.labels.tolist() == [2, 3]
    assert cells.scores.tolist() == pytest.approx([0.9, 0.7])
    first, second = cells.masks
    assert not (first & second).any() and first[15, 14] and second[15, 10]
    assert mask_iou(cells.masks.rle(), cells.masks.rle()).trace() == pytest.approx(2)
    assert first.shape == (32, 30)


def test_maps_without_candidates_give_no_cells():
    cells = decode_stars(torch.zeros(8, 8), torch.zeros(16, 8, 8), 2, (16, 16), StarDecodingSettings())
    assert len(cells) == 0 and cells.size == (16, 16) and cells.boxes.shape == (0, 4)

"""What happens to an image before the network sees it: levels, scale, padding; and the way back to its frame."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from builders import drawn_image, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.inference import load_model, predict
from kg_detectron.io.resize import resize_image
from kg_detectron.modeling import Preprocessing
from kg_detectron.modeling.cell_size import (
    FIRST_SCALES,
    _contrast,
    _finer,
    _Look,
    _look,
    common_diameter,
    estimate_scale,
    no_cell,
    weighted_median,
)
from kg_detectron.modeling.preprocessing import BLOCK, NetworkImage, block_side

PERCENTILE = Preprocessing(normalisation="percentile", percentiles=(2.0, 98.0))


def dim_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A 12-bit image of which most values are small."""
    return np.random.default_rng(seed).integers(0, 400, (height, width, 3)).astype(np.uint16)


def drawn_window(data: st.DataObject, seen: NetworkImage) -> tuple[slice, slice]:
    """Any rows and columns of an image."""
    first = [data.draw(st.integers(0, side - 1)) for side in seen.shape[:2]]
    last = [data.draw(st.integers(low + 1, side)) for low, side in zip(first, seen.shape, strict=False)]
    return slice(first[0], last[0]), slice(first[1], last[1])


# Windows of the image


@settings(max_examples=60)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    scale=st.floats(0.05, 9.0) | st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_windows_equal_the_whole(height, width, scale, seed, data):
    image = dim_image(height, width, seed)
    seen = NetworkImage(image, PERCENTILE.levels(image), scale)
    whole = seen[:, :]
    assert whole.shape == seen.shape and whole.dtype == np.float32
    assert whole.min() >= 0 and whole.max() <= 255
    rows, columns = drawn_window(data, seen)
    np.testing.assert_allclose(seen[rows, columns], whole[rows, columns], atol=1e-3)


@settings(max_examples=60)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    scale=st.floats(0.05, 9.0) | st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    border=st.integers(1, 40),
    data=st.data(),
)
def test_a_border_is_the_mirror_image(height, width, scale, border, data):
    image = dim_image(height, width, data.draw(st.integers(0, 100)))
    levels = PERCENTILE.levels(image)
    seen = NetworkImage(image, levels, scale, border)
    assert border <= seen.border * seen.scale[0] < border + max(1, seen.scale[0])
    sides = ((seen.border, seen.border),) * 2
    expected = NetworkImage(np.pad(image, (*sides, (0, 0)), "reflect"), levels, scale)
    assert seen.shape == expected.shape and seen.scale == expected.scale
    rows, columns = drawn_window(data, seen)
    np.testing.assert_allclose(seen[rows, columns], expected[rows, columns], atol=1e-3)


def test_a_border_reads_no_more_than_its_window():
    """So that of a large image a tile is read, not all of it."""
    image, read = drawn_image(400, 600), []

    class Image:
        shape = image.shape

        def __getitem__(self, window):
            part = image[window]
            read.append(part.shape[:2])
            return part

    seen = NetworkImage(Image(), Preprocessing().levels(image), 1.0, 16)
    whole = NetworkImage(image, Preprocessing().levels(image), 1.0, 16)[:, :]
    for y, x in ((0, 0), (100, 570), (400, 300)):
        assert np.array_equal(seen[y : y + 32, x : x + 62], whole[y : y + 32, x : x + 62])
    assert len(read) == 3 and all(rows <= 32 and columns <= 62 for rows, columns in read)


def test_only_isotropic_images_have_a_border():
    image = drawn_image(50, 70)
    seen = NetworkImage(image, Preprocessing().levels(image), (64, 96), 16)
    assert seen.border == 0 and seen.shape == (64, 96, 3)
    with pytest.raises(ValueError, match="border: expected 0 or more pixels, got -1"):
        Preprocessing(border=-1)


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.77, 1.0, 1.6, 2.0, 7.0])
def test_blocks_map_to_whole_pixels(scale):
    """The scale is rounded so that a block of the network's input is whole pixels of the image."""
    image = drawn_image(64, 96)
    seen = NetworkImage(image, Preprocessing().levels(image), scale)
    y, x = seen.scale
    assert y == x == BLOCK / block_side(scale)
    assert abs(block_side(scale) - BLOCK / scale) <= 0.5
    for side, limit in zip(seen.shape[:2], image.shape[:2], strict=True):
        assert limit * y <= side < limit * y + 1


def test_whole_blocks_are_resized_as_the_whole_image_is():
    image = drawn_image(128, 192)
    seen = NetworkImage(image, Preprocessing().levels(image), 0.5)
    np.testing.assert_allclose(seen[:, :], resize_image(image.astype(np.float32), (64, 96)), atol=1e-3)


def test_scale_1_keeps_the_pixels():
    image = drawn_image(50, 70)
    seen = NetworkImage(image, Preprocessing().levels(image), 1.0)
    assert seen.shape == (50, 70, 3) and np.array_equal(seen[:, :], image)


def test_a_size_squeezes_the_image():
    image = drawn_image(50, 70)
    seen = NetworkImage(image, Preprocessing().levels(image), (64, 96))
    assert seen.shape == (64, 96, 3) and seen.scale == (64 / 50, 96 / 70)
    np.testing.assert_allclose(seen[:, :], resize_image(image.astype(np.float32), (64, 96)), atol=1e-3)
    assert np.array_equal(seen[10:20, 5:9], seen[:, :][10:20, 5:9])


# Scale


def test_at_most_one_way_to_the_scale():
    preprocessing = Preprocessing(diameter=30.0, pixel_size=0.5)
    assert preprocessing.given_scale(None, None, None) is None
    assert preprocessing.given_scale(2.0, None, None).value == 2.0
    assert preprocessing.given_scale(None, 15.0, None).value == 2.0
    assert preprocessing.given_scale(None, None, 0.25).value == 0.5
    image = np.zeros((64, 64, 3), np.uint8)
    for limit, sizes in ((8.0, (8.0, None, None)), (8.0, (9.0, None, None)), (1 / 16, (None, 1e6, None))):
        scale = preprocessing.given_scale(*sizes)
        assert NetworkImage(image, preprocessing.levels(image), scale.value).scale[0] == limit
        assert ("the scale is 0.0625 to 8" in scale.source) == (scale.value != limit)
    with pytest.raises(ValueError, match="scale, diameter: expected one of these at most"):
        preprocessing.given_scale(2.0, 15.0, None)
    with pytest.raises(ValueError, match="diameter: expected a number above 0, got 0"):
        preprocessing.given_scale(None, 0.0, None)
    with pytest.raises(ValueError, match="does not know the pixel size"):
        Preprocessing().given_scale(None, None, 0.25)


def test_single_photons_are_no_cells(monkeypatch):
    """Unless the training images had cells as small."""
    assert estimate_of_cells(2.5, monkeypatch)[0] == no_cell(Preprocessing())
    assert estimate_of_cells(5.0, monkeypatch)[0].value == 4.0
    assert estimate_of_cells(2.5, monkeypatch, image_diameter=3.5)[0].value > 4


@pytest.mark.parametrize("photons", [0.05, 0.1, 0.3])
def test_a_dark_field_of_single_photons_has_no_cell(photons):
    model = load_model("nuclei")
    field = np.random.default_rng(7).poisson(photons, (256, 256)).astype(np.uint8)
    assert not len(predict(model, field, min_score=model.threshold))


def test_few_cells_at_the_first_scale_may_be_fragments(monkeypatch):
    """Where it shows hardly any, coarser and finer scales are tried, whatever the few are like."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, scales = drawn_image(600, 600), []

    def detect(seen, window, min_score, scores):
        scales.append(seen.scale[0])
        objects = [(0.0, 60.0, 0.8)] if seen.scale[0] < 0.8 else [(0.0, 9.0, 0.8)]
        cells = grid_of_cells(seen, window, objects)
        return cells if seen.scale[0] < 0.8 else cells[torch.arange(min(len(cells), 1))]

    monkeypatch.setattr(model, "detect_seen", detect)
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(28 / 60, rel=0.15) and scales[:5] == [1.0, 0.25, 0.5, 2.0, 4.0]


def test_predictions_enlarge_the_cells(monkeypatch):
    """Unless the scale is given as such."""
    preprocessing = Preprocessing(diameter=30.0, pixel_size=0.5, enlargement=1.5)
    scales = [preprocessing.given_scale(*given) for given in ((2, None, None), (None, 15, None), (None, None, 0.25))]
    assert [scale.value for scale in scales] == [2.0, 3.0, 0.75]
    for diameter, expected in ((25.0, 1.3 * 28 / 25), (7.5, 4.0)):  # not enlarged more than four times
        plain, looks = estimate_of_cells(diameter, monkeypatch)
        scale, the_same = estimate_of_cells(diameter, monkeypatch, enlargement=1.3)
        assert scale.value == pytest.approx(expected, rel=0.1) and the_same == looks
        assert scale.source == plain.source
    for image_diameter, expected in ((None, 1.0), (14.0, 2.6)):
        nothing = no_cell(Preprocessing(diameter=28.0, enlargement=1.3, image_diameter=image_diameter))
        assert nothing.value == pytest.approx(expected)
    with pytest.raises(ValueError, match="enlargement: expected a number above 0, got 0"):
        Preprocessing(enlargement=0.0)


def test_images_of_more_than_twice_the_training_size_keep_their_pixels():
    preprocessing = Preprocessing(size=(64, 96))
    assert preprocessing.training_scale((128, 192)).value == (64, 96)
    assert preprocessing.training_scale((129, 192)).value == 1.0
    assert dataclasses.replace(preprocessing, resize="isotropic").training_scale((10, 10)) is None


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [([], [], None), ([5.0], [0.0], None), ([3.0, 1.0, 2.0], [1, 1, 1], 2.0), ([1.0, 9.0], [1, 5], 9.0)],
)
def test_weighted_median(values, weights, expected):
    assert weighted_median(np.array(values), np.array(weights, float)) == expected


def test_a_few_fragments_in_a_fine_scale_do_not_outvote_the_cells(monkeypatch):
    """Enlarged, a large image of large cells shows nothing but textures, in which a model sees a few small cells."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    ramp = np.linspace(0, 1, 1300, dtype=np.float32)
    image = np.broadcast_to(ramp[None, :, None], (1000, 1300, 3))

    def detect(seen, window, min_score, scores):
        factor = 255 / 1299 / float(np.diff(seen[window][0, :, 0]).mean())
        side, count = (round(50 * factor), 30) if factor < 1.5 else (25, 6)
        windows = torch.tensor([[0, 0, side, side]] * count)
        masks = MaskCrops([torch.ones(side, side)] * count, windows, (2048, 2048))
        return Cells(windows.float(), torch.full((count,), 0.8), torch.ones(count, dtype=torch.long), masks)

    monkeypatch.setattr(model, "detect_seen", detect)
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(28 / (50 * 2 / math.sqrt(math.pi)), rel=0.1)


@pytest.mark.parametrize(
    ("diameter", "tried"),
    [(7.0, [1, 2, 4]), (14.0, [1, 2, 4]), (25.0, [1, 0.5, 2]), (56.0, [1, 0.5, 0.25]), (112.0, [1, 0.5, 0.25])],
)
def test_scale_is_estimated_from_the_cells(diameter, tried, monkeypatch):
    """A model that finds every cell at every scale: the estimate brings them to the trained diameter, and scales on the
    other side of it are not tried."""
    scale, scales = estimate_of_cells(diameter, monkeypatch)
    assert scale.value == pytest.approx(28 / diameter, rel=0.1)
    assert scale.source.startswith("estimated from cells of about")
    assert scales == [*tried, pytest.approx(28 / diameter, rel=0.1)]


@pytest.mark.parametrize(
    ("diameter", "tried"), [(7.0, [1]), (9.0, [1]), (3.0, [1, 2]), (14.0, [1, 0.5, 0.25]), (56.0, [1, 0.5, 0.25])]
)
def test_the_search_begins_at_the_scale_of_the_training_images(diameter, tried, monkeypatch):
    """And ends there, if the cells have about the trained diameter."""
    scale, scales = estimate_of_cells(diameter, monkeypatch, image_diameter=7.0)
    assert scales[: len(tried)] == [pytest.approx(4 * factor, rel=0.1) for factor in tried]
    assert scale.value == pytest.approx(min(4, 28 / diameter), rel=0.15)  # not enlarged more than four times


@pytest.mark.parametrize(
    ("diameters", "expected"),
    [([], None), ([30.0], 30.0), ([20.0, 30.0, 39.0], 30.0), ([10.0, 30.0], None), ([20.04, 22.0], 21.0)],
)
def test_training_images_are_alike_if_their_cells_are_about_as_large(diameters, expected):
    assert common_diameter(diameters) == expected


def estimate_of_cells(diameter, monkeypatch, **preprocessing):
    """The scale for an image of cells that are found at every scale, and the scales that were looked at."""
    model = tiny_network(resize="isotropic", diameter=28.0, **preprocessing).eval()
    image, scales = drawn_image(600, 600), []

    def detect(seen, window, min_score, scores):
        scales.append(seen.scale[0])
        return grid_of_cells(seen, window, [(0.0, diameter, 0.8)])

    monkeypatch.setattr(model, "detect_seen", detect)
    return estimate_scale(model, image, model.preprocessing.levels(image)), scales


def grid_of_cells(seen, window, objects, visible=(0.0, math.inf)):
    """The cells of a window of an image in which a group of objects is repeated all over.

    Objects are x from the middle of the group, diameter, both in pixels of the image, and score; those whose diameter
    in the network's input is beyond ``visible`` are not found.
    """
    scale, boxes, scores = seen.scale[0], [], []
    pitch = max(shift + size for shift, size, _ in objects) * 1.3
    (top, bottom), (left, right) = ((axis.start / scale, axis.stop / scale) for axis in window)
    places = (np.arange(first // pitch, last // pitch + 1) * pitch for first, last in ((top, bottom), (left, right)))
    for y, x in itertools.product(*places):
        for shift, size, score in objects:
            inside = left <= x + shift < right and top <= y < bottom
            if inside and visible[0] <= size * scale <= visible[1]:
                half = max(1.0, size * scale * math.sqrt(math.pi) / 2) / 2
                middle = (x + shift - left) * scale, (y - top) * scale
                boxes.append([middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half])
                scores.append(score)
    boxes = torch.tensor(boxes).reshape(-1, 4).float()
    sides = (boxes[:, 2] - boxes[:, 0]).round().long()
    low = boxes[:, :2].round().long().clamp(min=0)
    crops = [torch.ones(side, side) for side in sides.tolist()]
    masks = MaskCrops(crops, torch.cat((low, low + sides[:, None]), dim=1), (2048, 2048))
    return Cells(boxes, torch.tensor(scores), torch.ones(len(boxes), dtype=torch.long), masks)


def test_where_one_scale_shows_nothing_all_are_tried(monkeypatch):
    """Cells of 8 pixels, which the model does not see at their own scale."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, scales = drawn_image(300, 400), []

    def detect(seen, window, min_score, scores):
        scale = seen.scale[0]
        scales.append(scale)
        side, count = round(8 * scale), 5 if scale > 1.5 else 0
        windows = torch.tensor([[0, 0, side, side]] * count).reshape(-1, 4)
        masks = MaskCrops([torch.ones(side, side)] * count, windows, (2048, 2048))
        return Cells(windows.float(), torch.full((count,), 0.8), torch.ones(count, dtype=torch.long), masks)

    monkeypatch.setattr(model, "detect_seen", detect)
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scales[: len(FIRST_SCALES)] == [1.0, 0.25, 0.5, 2.0, 4.0]
    assert scale.value == pytest.approx(28 / (8 * 2 / math.sqrt(math.pi)), rel=0.15)


def test_without_cells_the_image_keeps_its_pixels():
    model = tiny_network(resize="isotropic", peak_threshold=1e6).eval()
    cells = predict(model, drawn_image(50, 70))
    assert len(cells) == 0 and cells.scale == (1.0, 1.0)
    assert cells.scale_source == "own pixels, for the model found no cell to estimate a diameter from"


@pytest.mark.parametrize(("nuclei", "score", "diameter"), [(2, 0.95, 9.0), (0, 0.95, 36.0), (2, 0.65, 36.0)])
def test_the_nuclei_of_cells_count_more_than_the_cells(nuclei, score, diameter, monkeypatch):
    """In a smear a model of nuclei may take whole cells for nuclei, if it sees these no larger than nuclei are. What it
    is not sure of may be grains in the cells, as in phase contrast."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image = drawn_image(600, 600)
    objects = [(0.0, 36.0, 0.3), (-8.0, 9.0, score), (8.0, 9.0, score)][: 1 + nuclei]

    def detect(seen, window, min_score, scores):
        return grid_of_cells(seen, window, objects, visible=(12.0, 40.0))

    monkeypatch.setattr(model, "detect_seen", detect)
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(28 / diameter, rel=0.15)


@pytest.mark.parametrize(
    ("density", "expected", "looks"),
    [
        ({1.0: 3.0, 0.5: 1.2, 0.25: 1.0}, 4, 0),  # far more at a far finer scale
        ({1.0: 2.5, 0.5: 1.2, 0.25: 1.0}, 1, 1),  # perhaps: the model looks, and finds nothing there
        ({0.5: 3.0, 0.25: 1.0}, 1, 1),
        ({1.0: 1.5, 0.5: 1.2, 0.25: 1.0}, 1, 0),
        ({0.5: 1.0, 0.25: 1.0, 0.125: 9.0}, 1, 0),  # coarser scales do not count
    ],
)
def test_far_more_cells_at_a_far_finer_scale_are_nuclei(density, expected, looks, monkeypatch):
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, seen = drawn_image(600, 600), []

    def detect(part, window, min_score, scores):
        seen.append(part.scale[0])
        return grid_of_cells(part, window, [(0.0, 28.0, 0.8)], visible=(0.0, 0.0))

    monkeypatch.setattr(model, "detect_seen", detect)
    levels = model.preprocessing.levels(image)
    assert _finer(model, image, levels, _contrast(image, levels), 288, 0.25, density) == expected
    assert len(seen) == looks


def test_one_cell_at_a_far_finer_scale_is_a_speck(monkeypatch):
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image = drawn_image(600, 600)
    monkeypatch.setattr(model, "detect_seen", None)
    levels = model.preprocessing.levels(image)
    density = {1.0: 3.0, 0.5: 1.2, 0.25: 1.0}
    assert _finer(model, image, levels, _contrast(image, levels), 288, 0.25, density, single={1.0}) == 1
    assert _finer(model, image, levels, _contrast(image, levels), 288, 0.25, density, single={0.25}) == 4


@pytest.mark.parametrize(("score", "diameter"), [(0.6, 120.0), (0.9, 15.0)])
def test_spots_that_the_model_is_not_sure_of_may_lie_in_large_cells(score, diameter, monkeypatch):
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, objects = drawn_image(800, 800), [(0.0, 120.0, 0.95)]
    objects += [(x, 15.0, score) for x in (-40.0, -20.0, 0.0, 20.0)]

    def detect(seen, window, min_score, scores):
        return grid_of_cells(seen, window, objects, visible=(12.0, 64.0))

    monkeypatch.setattr(model, "detect_seen", detect)
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(28 / diameter, rel=0.15)


@pytest.mark.parametrize(("found_again", "expected"), [(0, 44.0), (3, 25.0)])
def test_a_correction_that_shows_nothing_is_none_where_coarser_scales_show_less(found_again, expected, monkeypatch):
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image = drawn_image(600, 600)
    looks = [_Look(44.0, 7, 25.0, 25.0, 0.05), _Look(25.0, found_again, 25.0, 25.0, 0.01)]
    looks += [_Look(62.0, 1, 62.0, 62.0, 0.001)] * 2
    monkeypatch.setattr(model, "detect_seen", lambda seen, window, *_: grid_of_cells(seen, window, [(0.0, 44.0, 0.9)]))
    monkeypatch.setattr("kg_detectron.modeling.cell_size._look", lambda *_: looks.pop(0))
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(28 / expected, rel=0.05) and not looks


@pytest.mark.parametrize(("seen_again", "expected"), [(2, 44.0), (3, 27.0)])
def test_a_correction_that_shows_hardly_any_cell_is_none(seen_again, expected, monkeypatch):
    """A few large cells among debris: most of what the first look sees is debris, but the next sees hardly any."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, looks = drawn_image(600, 600), [_Look(44.0, 7, 25.0, 25.0, 0.02), _Look(25.0, seen_again, 27.0, 27.0, 0.015)]
    cells = [(0.0, 44.0, 0.9)]
    monkeypatch.setattr(model, "detect_seen", lambda seen, window, *_: grid_of_cells(seen, window, cells))
    monkeypatch.setattr("kg_detectron.modeling.cell_size._look", lambda *_: looks.pop(0))
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(28 / expected, rel=0.05) and not looks


@pytest.mark.parametrize(("large", "expected"), [(60.0, 28 / 30), (64.0, 28 / 30), (128.0, 0.5), (256.0, 0.25)])
def test_cells_that_cover_most_are_not_enlarged_beyond_what_is_seen(large, expected, monkeypatch):
    """As a nucleus among pieces of others, which the edges of the image cut."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, cells = drawn_image(600, 600), [(0.0, 30.0, 0.9)]
    monkeypatch.setattr(model, "detect_seen", lambda seen, window, *_: grid_of_cells(seen, window, cells))
    monkeypatch.setattr("kg_detectron.modeling.cell_size._look", lambda *_: _Look(30.0, 5, 30.0, large, 0.02))
    scale = estimate_scale(model, image, model.preprocessing.levels(image))
    assert scale.value == pytest.approx(expected, rel=0.05)


def test_a_look_tells_the_diameters_of_most_cells_and_of_most_of_their_area(monkeypatch):
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image, objects = drawn_image(600, 600), [(0.0, 60.0, 0.8), (50.0, 20.0, 0.9), (75.0, 20.0, 0.9)]
    monkeypatch.setattr(model, "detect_seen", lambda seen, window, *_: grid_of_cells(seen, window, objects))
    levels = model.preprocessing.levels(image)
    look = _look(model, image, levels, _contrast(image, levels), 28.0)
    assert look.corrected == pytest.approx(20.0, rel=0.1) and look.large == pytest.approx(60.0, rel=0.1)


def test_without_cells_the_image_gets_the_scale_of_the_training_images():
    model = tiny_network(resize="isotropic", diameter=28.0, image_diameter=14.0, peak_threshold=1e6).eval()
    cells = predict(model, drawn_image(50, 70))
    assert len(cells) == 0 and cells.scale == (2.0, 2.0)
    assert cells.scale_source.startswith("scale of the training images, for the model found no cell")


def test_cells_that_the_second_pass_does_not_see_again_count_for_nothing(monkeypatch):
    """As in noise, which a model may take for cells at one scale by chance."""
    model = tiny_network(resize="isotropic", diameter=28.0).eval()
    image = drawn_image(300, 400)
    passes = []

    def detect(seen, window, min_score, scores):
        passes.append(seen.scale[0])
        is_seen = seen.scale[0] in FIRST_SCALES and len(passes) <= 3
        return grid_of_cells(seen, window, [(0.0, 28.0, 0.8)], visible=(0.0, math.inf if is_seen else 0.0))

    monkeypatch.setattr(model, "detect_seen", detect)
    assert estimate_scale(model, image, model.preprocessing.levels(image)) == no_cell(model.preprocessing)
    assert len(passes) == 4 and no_cell(model.preprocessing).value == 1.0


# Padding


def test_padding_continues_the_image():
    preprocessing = Preprocessing()
    image = torch.rand(3, 5, 7) * 255
    batch = preprocessing.batch([image, torch.zeros(3, 16, 20)], 16)
    assert batch.shape == (2, 3, 16, 32)
    expected = (image - 127.5) / 255
    torch.testing.assert_close(batch[0, :, :5, :7], expected)
    torch.testing.assert_close(batch[0, :, :5, 7:], expected[:, :, -1:].expand(3, 5, 25))
    torch.testing.assert_close(batch[0, :, 5:, :7], expected[:, -1:, :].expand(3, 11, 7))
    assert (batch[0, :, 5:, 7:] == expected[:, -1:, -1:]).all()


@pytest.mark.parametrize("size", [(33, 47), (17, 96), (1, 1)])
def test_nothing_is_found_outside_the_image(size):
    """At any scale, although the padding may hold peaks."""
    model = tiny_network().eval()
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    detections = [model.detect([image])[0]]
    detections += [predict(model, drawn_image(*size), scale=scale) for scale in (0.7, 1.0, 1.6)]
    assert size == (1, 1) or all(len(cells) > 0 for cells in detections)
    for cells in detections:
        height, width = size
        assert cells.size == size
        assert (cells.boxes >= 0).all() and (cells.boxes <= torch.tensor([width, height, width, height])).all()
        assert (cells.boxes[:, 2:] > cells.boxes[:, :2]).all()
        windows = cells.masks.windows
        assert (windows >= 0).all() and (windows <= torch.tensor([width, height, width, height])).all()


# No way around the preprocessing


@pytest.mark.parametrize("changes", [{}, {"normalisation": "percentile"}, {"resize": "isotropic"}])
def test_a_called_model_does_all_that_predict_does(changes):
    """Of arrays and of tensors, with any levels that the normalisation takes."""
    model = tiny_network(**changes).eval()
    raw = dim_image(70, 90) if "normalisation" in changes else drawn_image(70, 90)
    expected = predict(model, raw)
    assert len(expected) > 0
    tensor = torch.from_numpy(raw.astype(np.int32) if raw.dtype == np.uint16 else raw).permute(2, 0, 1)
    for cells in model([raw, tensor]):
        assert torch.equal(cells.boxes, expected.boxes) and torch.equal(cells.scores, expected.scores)
        assert cells.masks.rle() == expected.masks.rle()
        assert (cells.scale, cells.scale_source) == (expected.scale, expected.scale_source)


def test_a_percentile_model_sees_the_same_cells_at_any_level():
    model = tiny_network(normalisation="percentile").eval()
    image = dim_image(64, 96)
    (cells,), (brighter,) = model([image]), model([image.astype(np.float32) * 37 + 1000])
    assert len(cells) > 0
    torch.testing.assert_close(cells.boxes, brighter.boxes)
    torch.testing.assert_close(cells.scores, brighter.scores)


# The way back


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    scale=st.floats(0.1, 6.0),
    seed=st.integers(0, 100),
)
def test_cells_return_to_the_frame_of_the_image(height, width, scale, seed):
    """Boxes are divided by the scale and clipped; masks cover what their windows cover."""
    image = drawn_image(height, width)
    seen = NetworkImage(image, Preprocessing().levels(image), scale)
    size = seen.shape[:2]
    rng = np.random.default_rng(seed)
    low = np.stack([rng.integers(0, side, 6) for side in size[::-1]], axis=1)
    high = np.stack([rng.integers(low[:, i] + 1, side + 1) for i, side in enumerate(size[::-1])], axis=1)
    windows = torch.from_numpy(np.concatenate((low, high), axis=1))
    crops = [torch.ones(y2 - y1, x2 - x1) for x1, y1, x2, y2 in windows.tolist()]
    cells = Cells(
        windows.float(), torch.linspace(1, 0.5, 6), torch.ones(6, dtype=torch.long), MaskCrops(crops, windows, size)
    )
    returned = cells.in_frame((height, width), seen.scale)
    assert returned.size == (height, width) and returned.scale == seen.scale
    exact = windows / torch.tensor([seen.scale[1], seen.scale[0]] * 2)
    exact = exact.minimum(torch.tensor([width, height] * 2))
    inside = (exact[:, 2:] > exact[:, :2]).all(1)
    torch.testing.assert_close(returned.boxes, exact[inside].float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(returned.scores, cells.scores[inside])
    # Windows are boxes rounded to pixels, at least one. Masks are resized by whole pixels of the image, which may be
    # half a pixel off where the network's input goes beyond it.
    sides = (returned.boxes[:, 2:] - returned.boxes[:, :2]).repeat(1, 2)
    distance = (returned.masks.windows - returned.boxes).abs()
    assert (distance <= torch.where(sides >= 1, 1.001, 2.001)).all()


def test_a_frame_of_the_same_size_changes_nothing():
    masks = MaskCrops([torch.rand(3, 4)], torch.tensor([[2, 1, 6, 4]]), (20, 30))
    cells = Cells(torch.tensor([[2.0, 1, 6, 4]]), torch.ones(1), torch.ones(1, dtype=torch.long), masks)
    same = cells.in_frame((20, 30), (1.0, 1.0))
    assert torch.equal(same.boxes, cells.boxes) and same.masks is masks


@given(height=st.integers(1, 12), width=st.integers(1, 12), border=st.integers(1, 5), seed=st.integers(0, 1000))
def test_what_lies_in_the_border_is_left_out(height, width, border, seed):
    """Boxes are cut at the image; a cell without any pixel in it is none of its cells."""
    rng = np.random.default_rng(seed)
    whole = height + 2 * border, width + 2 * border
    low = np.stack([rng.integers(0, side, 8) for side in whole[::-1]], axis=1)
    high = np.stack([rng.integers(low[:, i] + 1, side + 1) for i, side in enumerate(whole[::-1])], axis=1)
    windows = torch.from_numpy(np.concatenate((low, high), axis=1))
    crops = [torch.from_numpy(rng.random((y2 - y1, x2 - x1))) for x1, y1, x2, y2 in windows.tolist()]
    for crop in crops:
        crop.view(-1)[rng.integers(crop.numel())] = 1  # every cell has a pixel
    masks = MaskCrops(crops, windows, whole, threshold=0.8)
    cells = Cells(windows.float(), torch.linspace(1, 0.3, 8), torch.arange(8), masks)
    returned = cells.in_frame((height, width), (1.0, 1.0), border)
    dense = np.stack([mask.numpy() for mask in masks])[:, border : border + height, border : border + width]
    inside = np.flatnonzero(dense.any((1, 2)))
    assert returned.labels.tolist() == inside.tolist()
    assert len(inside) == len(returned.masks) and returned.size == (height, width)
    for mask, box, i in zip(returned.masks, returned.boxes.numpy(), inside, strict=True):
        assert np.array_equal(mask, dense[i])
        assert np.array_equal(box, (windows[i].numpy() - border).clip(0, [width, height] * 2))


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 1000))
def test_cropped_masks_are_the_dense_masks_cropped(height, width, seed):
    rng = np.random.default_rng(seed)
    dense = np.zeros((4, 12, 12), bool)
    for mask in dense:
        y, x = rng.integers(0, 12, 2)
        mask[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = True
    low, high = [], []
    for mask in dense:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        low.append((columns[0], rows[0]))
        high.append((columns[-1] + 1, rows[-1] + 1))
    windows = np.concatenate((low, high), axis=1)
    crops = [torch.from_numpy(mask[y1:y2, x1:x2]) for mask, (x1, y1, x2, y2) in zip(dense, windows, strict=True)]
    masks = MaskCrops(crops, torch.from_numpy(windows), (12, 12)).cropped((height, width))
    assert masks.size == (height, width) and len(masks) == 4
    for mask, expected in zip(masks, dense, strict=True):
        assert np.array_equal(mask, expected[:height, :width])
    assert np.array_equal(np.stack([mask.numpy() for mask in masks]), dense[:, :height, :width])

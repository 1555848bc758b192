"""Windows and colours: images, masks and boxes stay together."""

import dataclasses

import numpy as np
import pytest
import torch

from kg_detectron.modeling import Preprocessing
from kg_detectron.training import (
    ColourSettings,
    GeometrySettings,
    Sample,
    TrainingSamples,
    random_colours,
    random_window,
    target_of_labels,
)
from kg_detectron.training.dataset import labelled_image

PLAIN = GeometrySettings(window=96, wide_share=0, narrow=0, rotation=0, stretch_share=0, smallest_side=1)


def scene(side: int = 160, diameter: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bright discs on black: image (side, side, 3) uint8, labels, centres."""
    y, x = np.mgrid[:side, :side] + 0.5
    labels, centres = np.zeros((side, side), np.uint16), []
    for cx in range(diameter, side - diameter // 2, 2 * diameter):
        for cy in range(diameter, side - diameter // 2, 2 * diameter):
            labels[(x - cx) ** 2 + (y - cy) ** 2 <= diameter**2 / 4] = len(centres) + 1
            centres.append((cx, cy))
    return np.repeat((labels > 0)[..., None] * np.uint8(200), 3, axis=2), labels, np.array(centres)


@pytest.mark.parametrize("seed", range(12))
def test_labels_lie_on_their_cells(seed: int) -> None:
    image, labels, centres = scene()
    settings = dataclasses.replace(GeometrySettings(), window=96, rotation=1, stretch_share=1)
    window, found, _ = random_window(image, labels, 1.0, centres, settings, np.random.default_rng(seed))
    assert window.shape == (96, 96, 3) and window.dtype == np.float32
    if settings.reflection and (found == 0).all():
        return
    cells, bright = found > 0, window[..., 0] > 100
    assert (cells & bright).sum() / (cells | bright).sum() > 0.85
    assert bright.any()


@pytest.mark.parametrize("diameter", [8, 20, 45])
def test_cells_come_to_the_target_diameter(diameter: int) -> None:
    image, labels, centres = scene(8 * diameter, diameter)
    areas = []
    for seed in range(5):
        _, found, _ = random_window(image, labels, 20 / diameter, centres, PLAIN, np.random.default_rng(seed))
        inside = np.setdiff1d(found, np.concatenate([found[0], found[-1], found[:, 0], found[:, -1], [0]]))
        areas += [(found == i).sum() for i in inside]
    assert 2 * np.sqrt(np.median(areas) / np.pi) == pytest.approx(20, rel=0.08)


def test_the_jitter_stays_in_its_range() -> None:
    image, labels, centres = scene(400, 20)
    settings = dataclasses.replace(PLAIN, window=64, wide=1.0, wide_share=1)
    seen = []
    for seed in range(40):
        _, found, _ = random_window(image, labels, 1.0, centres, settings, np.random.default_rng(seed))
        seen += [np.sqrt((found == i).sum() * 4 / np.pi) / 20 for i in np.unique(found)[1:]]
    assert max(seen) < 2.1 and max(seen) > 1.5


def test_beyond_the_image_there_are_reflections_or_no_cells() -> None:
    image, labels, centres = scene(60, 20)
    for reflection in (0, 1):
        settings = dataclasses.replace(PLAIN, window=160, reflection=reflection)
        window, found, _ = random_window(image, labels, 1.0, centres, settings, np.random.default_rng(0))
        count = len(np.unique(found)) - 1
        assert count > len(centres) if reflection else count == len(centres)
        if reflection:
            assert ((found > 0) == (window[..., 0] > 100)).mean() > 0.97


def test_a_window_depends_on_its_sample_only() -> None:
    image, labels, _ = scene()
    source = labelled_image("a", image, labels, Preprocessing())
    samples = TrainingSamples([source] * 3, 20, GeometrySettings(window=64))
    first = samples[Sample(1, 4, 17)]
    samples[Sample(2, 4, 18)]
    again = samples[Sample(1, 4, 17)]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["masks"], again[1]["masks"])
    assert not torch.equal(first[0], samples[Sample(1, 4, 18)][0])


def test_boxes_are_those_of_the_masks() -> None:
    labels = np.zeros((20, 30), np.int32)
    labels[3:9, 4:15] = 1
    labels[12:13, 2:20] = 2  # too thin
    labels[15:20, 25:30] = 7
    target = target_of_labels(labels)
    assert target["boxes"].tolist() == [[4, 3, 15, 9], [25, 15, 30, 20]]
    assert target["masks"].shape == (2, 20, 30)
    assert torch.equal(target["masks"][0], torch.from_numpy(labels == 1))
    empty = target_of_labels(np.zeros((5, 6), np.int32))
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 5, 6)


@pytest.mark.parametrize("grey", [True, False])
def test_colours_stay_in_range_and_shapes_stay(grey: bool) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (32, 40, 1 if grey else 3)).astype(np.float32)
    image = np.repeat(image, 3, axis=2) if grey else image
    names = [f.name for f in dataclasses.fields(ColourSettings)]
    always = ColourSettings(**{n: 1.0 for n in names if n not in ("contrast", "brightness", "gamma")})
    for seed in range(10):
        for settings in (always, ColourSettings()):
            before = image.copy()
            result = random_colours(image, settings, np.random.default_rng(seed))
            assert result.shape == image.shape and result.dtype == np.float32
            assert 0 <= result.min() and result.max() <= 255 and np.isfinite(result).all()
            assert np.array_equal(image, before)


def test_without_changes_colours_stay() -> None:
    image = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.float32)
    none = ColourSettings(**{f.name: 0.0 for f in dataclasses.fields(ColourSettings)})
    assert np.allclose(random_colours(image, none, np.random.default_rng(0)), image, atol=1e-3)


def test_images_are_measured() -> None:
    image, labels, centres = scene()
    source = labelled_image("a", image, labels.astype(np.int64) * 3, Preprocessing(normalisation="percentile"))
    assert source.diameter == pytest.approx(20, rel=0.03)
    assert np.allclose(source.centres[:, ::-1][np.lexsort(source.centres.T)], centres[:, ::-1][np.lexsort(centres.T)])
    assert source.kind == "fluorescence small"
    empty = labelled_image("b", image, np.zeros((160, 160), int), Preprocessing())
    assert empty.diameter is None and empty.centres.shape == (0, 2)


def only(name: str) -> ColourSettings:
    return ColourSettings(**{f.name: float(f.name == name) for f in dataclasses.fields(ColourSettings)})


@pytest.mark.parametrize("seed", range(8))
def test_a_section_has_dark_cells_in_coloured_tissue(seed: int) -> None:
    image, labels, _ = scene()
    section = random_colours(image.astype(np.float32), only("section"), np.random.default_rng(seed))
    cells, tissue = section[labels > 0], section[labels == 0]
    assert cells[:, 1].mean() < tissue[:, 1].mean() - 10  # both dyes absorb green; the cells' one is added
    assert np.ptp(tissue.mean(0)) > 1  # the tissue has a colour
    assert 0 <= section.min() and section.max() <= 255


def test_only_images_of_bright_cells_become_sections() -> None:
    image, _, _ = scene()
    for other in (255 - image, np.maximum(image, (90, 0, 0)).astype(np.uint8)):
        same = random_colours(other.astype(np.float32), only("section"), np.random.default_rng(0))
        assert np.allclose(same, other, atol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_other_dyes_change_colours_by_their_density_alone(seed: int) -> None:
    image, labels, _ = scene()
    picture = np.where(labels[..., None] > 0, (150, 60, 90), 255).astype(np.float32)
    changed = random_colours(picture, only("dyes"), np.random.default_rng(seed))
    assert np.allclose(changed[labels == 0], 255)  # where no dye is, there is light
    assert np.ptp(changed[labels > 0], axis=0).max() == 0  # pixels of one colour keep one colour
    assert np.abs(changed[labels > 0][0] - (150, 60, 90)).max() > 1

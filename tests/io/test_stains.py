"""Stained images: the density of haematoxylin is what was put there; pictures of several dyes: each colour alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import rgb2hed

from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.stains import DYES, colours_of_dyes, haematoxylin_density, haematoxylin_levels, single_colour


def section(height: int = 60, width: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A drawn section (H, W, 3) BGR of 0..1, and its density of haematoxylin (H, W): nuclei in it, eosin between."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    nuclei = ((y % 20 - 10) ** 2 + (x % 20 - 10) ** 2 < 36) * generator.uniform(0.5, 1.2)
    eosin = generator.uniform(0.1, 0.6, (height, width))
    eosin[:2], nuclei[:2] = 0, 0  # glass
    densities = np.stack((nuclei, eosin, np.zeros_like(eosin)), axis=2)
    return np.exp(-densities @ DYES), nuclei


@given(st.integers(0, 2**32 - 1))
def test_the_density_is_that_of_the_dye(seed):
    image, nuclei = section(seed=seed)
    np.testing.assert_allclose(haematoxylin_density(image, np.ones(3)), nuclei, atol=1e-5)
    white = np.array([200.0, 250.0, 90.0])
    np.testing.assert_allclose(haematoxylin_density(image * white, white), nuclei, atol=1e-5)


def test_it_is_the_deconvolution_of_scikit_image():
    """Up to a factor: its dyes have the length 1, and its logarithm is another."""
    image = (section()[0] * 255).round().astype(np.uint8)
    expected = rgb2hed(image[..., ::-1])[..., 0]
    density = haematoxylin_density(image, np.full(3, 255.0))
    assert np.corrcoef(expected.ravel(), density.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_nuclei_are_dark_on_bright_and_grey(dtype):
    image, nuclei = section()
    top = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    levels = haematoxylin_levels((image * top).astype(dtype), np.full(3, top))
    shown = levels((image * top).astype(dtype))
    assert shown.dtype == np.float32 and shown.shape == image.shape and (np.ptp(shown, axis=2) == 0).all()
    assert shown[nuclei > 0].max() < 40 and shown[nuclei == 0].min() > 200


def test_any_part_is_as_in_the_whole(tmp_path):
    image = (section(300, 400)[0] * 255).astype(np.uint8)
    mapped = np.memmap(tmp_path / "image", np.uint8, "w+", shape=image.shape)
    mapped[:] = image
    levels, white = haematoxylin_levels(image, np.full(3, 255.0)), np.full(3, 255.0)
    assert np.array_equal(haematoxylin_levels(mapped, white)(image), levels(image))
    assert np.array_equal(levels(image)[37:111, 200:257], levels(image[37:111, 200:257]))


def test_other_images_are_told_apart():
    image = section()[0]
    white = np.ones(3)
    assert haematoxylin_levels(image, white) is not None
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    fluorescence = (1 - image) ** 4 * [0.1, 1.0, 0.3]  # coloured, on black
    for other in (grey, fluorescence, np.ones_like(image), np.zeros_like(image), np.full_like(image, np.nan)):
        assert haematoxylin_levels(other, white) is None
    assert haematoxylin_levels(np.broadcast_to(image[..., :1], image.shape), white) is None
    assert haematoxylin_levels(image, np.array([1.0, 0.0, 1.0])) is None


def merged(height: int = 60, width: int = 80) -> np.ndarray:
    """(H, W, 3) BGR of 0..1: nuclei in blue, something else in red, little of both in green."""
    nuclei = section(height, width)[1]
    other = np.random.default_rng(1).uniform(0, 1, (height, width)) ** 4
    return np.stack((nuclei, 0.05 * (nuclei + other), other), axis=2) / 1.2


@pytest.mark.parametrize("kind", ["fixed", "percentile"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_each_colour_of_several_dyes_is_shown_alone(kind, dtype, tmp_path):
    image = (merged() * {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]).astype(dtype)
    levels = Normalisation(kind).levels(image)
    mapped = np.memmap(tmp_path / "image", dtype, "w+", shape=image.shape)
    mapped[:] = image
    assert colours_of_dyes(image) == colours_of_dyes(mapped) == ["blue", "red"]  # hardly any green
    for channel, name in ((0, "blue"), (2, "red")):
        colour = single_colour(name, levels)
        shown = colour(image)
        assert shown.dtype == np.float32 and (np.ptp(shown, axis=2) == 0).all()
        assert colour.name == name and np.array_equal(shown[..., 0], levels(image)[..., channel])
        assert np.array_equal(colour(mapped[7:31, 20:57]), shown[7:31, 20:57])


def test_pictures_of_several_dyes_are_told_apart():
    image = merged()
    assert colours_of_dyes(image) == ["blue", "red"] and colours_of_dyes(image[..., ::-1]) == ["blue", "red"]
    assert colours_of_dyes(np.where(image > 0.9, np.nan, image)) == ["blue", "red"]
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    others = (grey, grey * [0.1, 1.0, 0.3], image * [1, 0, 0], 1 - image, section()[0])
    for other in (*others, np.zeros_like(image), np.ones_like(image), np.full_like(image, np.nan)):
        assert colours_of_dyes(other) == []
    assert colours_of_dyes(np.broadcast_to(image[..., :1], image.shape)) == []
    assert colours_of_dyes(np.ones((1, 1, 3))) == []

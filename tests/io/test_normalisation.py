"""The levels of images, brought to 0..255."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kg_detectron.io import normalisation
from kg_detectron.io.grey import distinct_channels
from kg_detectron.io.normalisation import Normalisation, NormalisedImage, UnknownWhiteLevel, has_finite_value

FIXED, PERCENTILE = Normalisation(), Normalisation("percentile", (10.0, 90.0))
TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64, np.float16, np.float32, np.float64]
TYPES += [">u2", ">i4", ">f4"]  # TIFF files have them


def test_fixed_levels():
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    for image in (eight, eight.astype(np.uint16) * 257, eight / 255):
        normalised = FIXED(image)
        assert normalised.dtype == np.float32
        np.testing.assert_allclose(normalised, eight, atol=1e-4)
    assert FIXED(np.array([[[False], [True]]])).tolist() == [[[0], [255]]]
    sixteen = np.arange(2**16, dtype=np.uint16).reshape(256, 256, 1)
    assert len(np.unique(FIXED(sixteen))) == 2**16  # no level is lost


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))), st.sampled_from([1, 300]))
def test_8_bits_and_16_bits_come_out_equal(image: np.ndarray, repeats: int):
    image = np.tile(image, (repeats, repeats, 1))[:300, :300]
    for rule in (FIXED, PERCENTILE, Normalisation("percentile")):
        np.testing.assert_array_equal(rule(image), rule(image.astype(np.uint16) * 257))
    np.testing.assert_array_equal(FIXED(image), image)


@given(
    st.sampled_from(TYPES).flatmap(
        lambda dtype: npst.arrays(dtype, st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3)))
    ),
    st.floats(0, 99),
)
def test_percentiles_of_any_type_are_exact(image: np.ndarray, low: float):
    """Against sorting: of n finite values the one of number ceil(n * percentile / 100)."""
    levels = Normalisation("percentile", (low, 100.0)).levels(image)
    for c in range(image.shape[2]):
        values = image[..., c]
        ordered = np.sort(values[np.isfinite(values)]) if values.size else values
        if len(ordered):
            place = max(0, int(np.ceil(len(ordered) * low / 100)) - 1)
            assert (levels.low[c], levels.high[c]) == (float(ordered[place]), float(ordered[-1]))
    normalised = Normalisation("percentile", (low, 100.0))(image)
    assert normalised.dtype == np.float32 and normalised.min() >= 0 and normalised.max() <= 255


def test_percentiles_are_of_each_channel_and_clip():
    image = np.stack([np.arange(100), np.arange(100) * 40 + 7], axis=1).reshape(10, 10, 2).astype(np.int32)
    flat = PERCENTILE(image).reshape(100, 2)
    expected = np.clip((np.arange(100) - 9) / 80 * 255, 0, 255)
    np.testing.assert_allclose(flat, np.stack([expected, expected], axis=1), atol=1e-4)


@given(
    st.sampled_from(TYPES).flatmap(lambda dtype: npst.arrays(dtype, st.tuples(*[st.integers(1, 9)] * 2, st.just(1)))),
    st.floats(0, 50),
    st.floats(50.5, 100),
)
def test_levels_of_a_memory_map_are_those_in_memory(image: np.ndarray, low: float, high: float):
    """Sorting in memory, and histograms block by block, find the same values."""
    rule = Normalisation("percentile", (low, high))
    in_memory = rule.levels(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalisation, "_IN_MEMORY", 0)
        patch.setattr(normalisation, "_BLOCK", 10)
        by_blocks = rule.levels(image)
    assert (in_memory.low, in_memory.high) == (by_blocks.low, by_blocks.high)


def test_only_memory_maps_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = np.random.default_rng(0).integers(0, 2**16, (40, 30, 3), dtype=np.uint16)
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    expected, calls = PERCENTILE.levels(image), []
    by_rank = normalisation._value_of_rank
    monkeypatch.setattr(normalisation, "_value_of_rank", lambda *args: calls.append(args) or by_rank(*args))
    for view in (mapped, mapped[..., ::-1], mapped.swapaxes(0, 1)):
        levels = PERCENTILE.levels(view)
        np.testing.assert_array_equal(np.sort([levels.low, levels.high]), np.sort([expected.low, expected.high]))
    assert len(calls) == 3 * 2 * 3
    PERCENTILE.levels(image)
    assert len(calls) == 3 * 2 * 3


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int16])
@pytest.mark.parametrize("repeats", [1, 40])
def test_the_byte_order_does_not_matter(dtype: type, repeats: int):
    """TIFFs of ImageJ and of many microscopes are big-endian."""
    little = np.tile(np.arange(60).reshape(5, 12, 1) / 59, (repeats, repeats, 3))
    little = (little * (1 if dtype == np.float32 else 30000)).astype(dtype)
    big = little.astype(little.dtype.newbyteorder(">"))
    for rule in (PERCENTILE, *([] if dtype == np.int16 else [FIXED])):
        np.testing.assert_array_equal(rule(big), rule(little))
        np.testing.assert_array_equal(NormalisedImage(big, rule)[1:4, 2:5], rule(little)[1:4, 2:5])


@pytest.mark.parametrize("rule", [FIXED, PERCENTILE])
def test_parts_are_normalised_as_in_the_whole(rule: Normalisation):
    image = np.random.default_rng(0).integers(0, 2**16, (400, 300, 3), dtype=np.uint16)
    lazy = NormalisedImage(image, rule)
    assert lazy.shape == image.shape
    for part in (np.s_[:, :], np.s_[100:110, 3:9], np.s_[390:400, 280:300]):
        np.testing.assert_array_equal(lazy[part], rule(image)[part])


def test_a_grey_image_of_three_channels_is_that_of_one():
    grey = np.random.default_rng(0).integers(0, 4000, (20, 30), dtype=np.uint16)
    view = np.broadcast_to(grey[..., None], (20, 30, 3))
    np.testing.assert_array_equal(PERCENTILE(view), PERCENTILE(np.stack([grey] * 3, axis=2)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("value", [0, 1, 255])
@pytest.mark.filterwarnings("error")
def test_constant_images_are_finite(dtype: type, value: int):
    image = np.full((4, 5, 3), value, dtype)
    assert (PERCENTILE(image) == 0).all()
    image[1, 2] += 7  # a spot that no percentile sees is white
    assert np.unique(Normalisation("percentile", (5, 90))(image)).tolist() == [0, 255]


@pytest.mark.filterwarnings("error")
def test_what_is_no_number_is_black_and_does_not_count():
    image = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10, 1)
    holes = image.copy()
    holes[0, 0] = np.nan  # in the place of 0
    assert FIXED(holes)[0, 0] == 0
    np.testing.assert_array_equal(FIXED(holes)[1:], FIXED(image)[1:])
    holes[9, 9], holes[0, 1] = np.inf, -np.inf
    levels = Normalisation("percentile", (0, 100)).levels(holes)
    assert (levels.low, levels.high) == (image[0, 2], image[9, 8])
    normalised = Normalisation("percentile", (0, 100))(holes)
    assert (normalised[0, 0], normalised[9, 9], normalised[0, 1]) == (0, 255, 0)
    nothing = np.full((3, 4, 1), np.nan)
    assert (FIXED(nothing) == 0).all() and (PERCENTILE(nothing) == 0).all()


def test_a_finite_value_is_found_in_any_block(monkeypatch):
    monkeypatch.setattr(normalisation, "_BLOCK", 8)
    for image in (np.full((3, 4, 2), np.nan), np.full((5, 4), -np.inf, np.float32)):
        assert not has_finite_value(image)
        image[-1, -1] = 0
        assert has_finite_value(image)
    assert has_finite_value(np.zeros((3, 4, 1), np.uint8))


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (np.full((4, 5, 3), 300, np.int32), "int32"),
        (np.full((4, 5, 3), 3, np.int16), "int16"),
        (np.full((4, 5, 3), 3, np.uint32), "uint32"),
        (np.full((4, 5, 3), 1.01, np.float32), r"1\.01.*expected 0\.\.1"),
        (np.full((4, 5, 3), -0.01), "expected 0..1"),
        (np.full((4, 5, 3), np.inf), "inf.*expected 0..1"),
        (np.full((4, 5, 3), 4095, np.uint16), "12 bits.*4095"),
    ],
)
def test_fixed_levels_need_a_type_that_tells_what_is_white(image: np.ndarray, what: str):
    for stored in (image, image.astype(image.dtype.newbyteorder(">"))):
        with pytest.raises(UnknownWhiteLevel, match=what + ".*percentile normalisation") as error:
            FIXED(stored)
        assert "--" not in str(error.value)  # this is said in training, too, where options have other names
    assert np.isfinite(PERCENTILE(image)).all()


def test_dark_images_of_16_bits_are_not_taken_for_12():
    for value in (0, 257, 15 * 257, 4096):
        assert FIXED(np.full((2, 2, 3), value, np.uint16)).max() == np.float32(value / 257)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(("z-score",), "z-score"), (("percentile", (5.0, 5.0)), "rising"), (("percentile", (-1.0, 5.0)), "0..100")],
)
def test_bad_rules_are_refused(arguments: tuple, what: str):
    with pytest.raises(ValueError, match=what):
        Normalisation(*arguments)


@pytest.mark.parametrize("image", [np.zeros((3, 4)), np.zeros((0, 4, 3)), np.zeros((3, 4, 3), complex)])
def test_bad_images_are_refused(image: np.ndarray):
    with pytest.raises(ValueError, match="image"):
        FIXED(image)


def test_equal_channels_are_looked_at_once(tmp_path: Path):
    grey = np.random.default_rng(0).integers(0, 200, (40, 50, 1), np.uint8)
    three = grey.repeat(3, axis=2)
    assert distinct_channels(three).shape == distinct_channels(np.broadcast_to(grey, (40, 50, 3))).shape == (40, 50, 1)
    np.testing.assert_array_equal(PERCENTILE(three), PERCENTILE(grey).repeat(3, axis=2))
    for y, x in ((0, 0), (7, 9), (39, 49)):
        colour = three.copy()
        colour[y, x, 2] ^= 1
        assert distinct_channels(colour) is colour
    mapped = np.memmap(tmp_path / "image", np.uint8, "w+", shape=three.shape)
    mapped[:] = three
    assert distinct_channels(mapped) is mapped

"""Scale bars that are drawn into images: neither the grey levels nor the network see them."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kg_detectron import load_model, predict
from kg_detectron.export.overlay import stretched
from kg_detectron.inference.predictor import SCALE_BAR_NOTE
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.scale_bars import scale_bars, without_scale_bars
from kg_detectron.synthetic import nuclei_image


def dim_nuclei(side: int = 256, cells: int = 20) -> np.ndarray:
    """(H, W, 3) uint8, nuclei far below white."""
    return (nuclei_image(np.random.default_rng(9), side, side, cells)[0] // 4).astype(np.uint8)


def with_bar(image: np.ndarray, colour: tuple[float, ...] = (255, 255, 255), text: bool = True) -> np.ndarray:
    """A bar of a quarter of the width at the lower right, and its length above it, with smooth letters."""
    height, width = image.shape[:2]
    ink = np.zeros((height, width), np.uint8)
    left, top = int(0.7 * width), int(0.93 * height)
    cv2.rectangle(ink, (left, top), (left + width // 4, top + height // 50), 255, -1)
    if text:
        cv2.putText(ink, "20 um", (left, top - 6), cv2.FONT_HERSHEY_SIMPLEX, width / 600, 255, 1, cv2.LINE_AA)
    opaque = ink[..., None] / 255
    return (image * (1 - opaque) + np.array(colour) * opaque).astype(image.dtype)


def jpeg(image: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1], cv2.IMREAD_COLOR)


def inverted(image: np.ndarray) -> np.ndarray:
    return -image if image.dtype.kind == "f" else ~image


MARKED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "white": with_bar,
    "without text": lambda image: with_bar(image, text=False),
    "upright": lambda image: np.ascontiguousarray(with_bar(image.transpose(1, 0, 2)).transpose(1, 0, 2)),
    "in JPEG": lambda image: jpeg(with_bar(image)),
    "16 bits": lambda image: with_bar(image.astype(np.uint16), (65535, 65535, 65535)),
    "real numbers": lambda image: with_bar(image.astype(np.float32), (1e4, 1e4, 1e4)),
    "yellow": lambda image: with_bar(image, (0, 255, 255)),
}


@pytest.mark.parametrize("marks", MARKED.values(), ids=MARKED)
def test_a_scale_bar_changes_no_levels(marks: Callable) -> None:
    image, rule = dim_nuclei(), Normalisation("percentile")
    expected, levels = rule.levels(image), rule.levels(marks(image))
    np.testing.assert_allclose(levels.high, expected.high, rtol=0.05)
    np.testing.assert_allclose(levels.low, expected.low, atol=2)


@pytest.mark.parametrize("marks", MARKED.values(), ids=MARKED)
def test_a_scale_bar_and_its_text_are_painted_over_and_nothing_else(marks: Callable) -> None:
    image = dim_nuclei()
    marked = marks(image)
    before = marked.copy()
    painted = without_scale_bars(marked)
    assert np.array_equal(marked, before) and painted.dtype == marked.dtype
    assert float(painted.max()) <= float(image.max()) + 8  # noise of JPEG
    drawn = (np.abs(marked.astype(float) - image) > 8).any(2)
    around = cv2.dilate(drawn.astype(np.uint8), np.ones((7, 7))) > 0
    assert drawn.any() and not ((painted != marked).any(2) & ~around).any()


@pytest.mark.parametrize("marks", MARKED.values(), ids=MARKED)
def test_a_dark_bar_on_a_bright_image_is_treated_alike(marks: Callable) -> None:
    image, rule = dim_nuclei(), Normalisation("percentile")
    marked = inverted(marks(image))
    painted = without_scale_bars(marked)
    np.testing.assert_allclose(painted, inverted(without_scale_bars(marks(image))), atol=4)  # float32
    expected, levels = rule.levels(inverted(without_scale_bars(marks(image)))), rule.levels(marked)
    np.testing.assert_allclose((levels.low, levels.high), (expected.low, expected.high), atol=4)
    assert (painted != marked).any()


def saturated(rng: np.random.Generator) -> np.ndarray:
    return np.clip(nuclei_image(rng, 256, 256, 20)[0].astype(float) * 4, 0, 255).astype(np.uint8)


def rods(rng: np.random.Generator) -> np.ndarray:
    """Three straight bright rods."""
    image = rng.integers(0, 30, (200, 200, 1), np.uint8).repeat(3, 2)
    for top in (20, 90, 160):
        image[top : top + 8, 60:120] = 255
    return image


def round_rod(rng: np.random.Generator) -> np.ndarray:
    image = np.ascontiguousarray(rng.integers(0, 30, (200, 200, 1), np.uint8).repeat(3, 2))
    cv2.ellipse(image, (100, 100), (40, 6), 0, 0, 360, (255, 255, 255), -1)
    return image


def bright_strip(rng: np.random.Generator) -> np.ndarray:
    """Nearly empty bright field, four times as wide as high."""
    image = rng.integers(250, 256, (64, 400, 1), np.uint8).repeat(3, 2)
    image[30:34, 200:204] = 90
    return image


def slope(rng: np.random.Generator) -> np.ndarray:
    """Brighter to the right, in even columns."""
    return np.broadcast_to(np.linspace(0, 255, 300).astype(np.uint8)[:, None], (200, 300, 3))


@pytest.mark.parametrize(
    "draw",
    [
        saturated,
        slope,
        rods,
        round_rod,
        bright_strip,
        lambda rng: np.full((64, 64, 3), 7, np.uint8),
        lambda rng: np.full((64, 64, 3), np.nan, np.float32),
        lambda rng: rng.integers(0, 256, (1, 9, 3), np.uint8),
        lambda rng: rng.random((64, 64, 3)) < 0.1,
    ],
)
def test_what_is_no_scale_bar_stays(draw: Callable) -> None:
    image = draw(np.random.default_rng(2))
    for seen in (image, inverted(image)):
        assert scale_bars(seen[..., 0]) is None and without_scale_bars(seen) is seen


def test_a_dark_line_of_one_pixel_is_no_scale_bar() -> None:
    image = np.full((100, 100, 3), 200, np.uint8)
    image[40:70, 50] = 20
    assert scale_bars(image[..., 0]) is None
    assert scale_bars(inverted(image)[..., 0]) is not None


def test_what_is_no_image_is_left_to_those_who_say_so() -> None:
    image = np.zeros((40, 40, 3), complex)
    assert without_scale_bars(image) is image
    with pytest.raises(ValueError, match="image: expected shape .* of type complex128"):
        Normalisation("percentile").levels(image)
    with pytest.raises(ValueError, match="image: expected shape .* of type complex128"):
        predict(load_model("nuclei"), image)


def test_a_bright_nucleus_away_from_the_text_stays() -> None:
    image = dim_nuclei()
    cv2.circle(image, (60, 60), 12, (255, 255, 255), -1)
    cv2.circle(image, (60, 60), 3, (0, 0, 0), -1)
    painted = without_scale_bars(with_bar(image))
    assert (painted[50:70, 50:70] == image[50:70, 50:70]).all() and (painted[235:] < 255).all()


def test_grey_images_stay_one_channel_in_memory() -> None:
    grey = with_bar(dim_nuclei())[..., 0]
    image = np.broadcast_to(grey[..., None], (*grey.shape, 3))
    painted = without_scale_bars(image)
    assert painted.shape == image.shape and painted.strides[2] == 0 and painted.max() < 100


def test_maps_are_taken_as_they_are(tmp_path: Path) -> None:
    image = with_bar(dim_nuclei())
    mapped = np.memmap(tmp_path / "image", image.dtype, "w+", shape=image.shape)
    mapped[:] = image
    view = np.broadcast_to(mapped[..., :1], mapped.shape)  # no memmap by its type
    assert without_scale_bars(mapped) is mapped and without_scale_bars(view) is view
    assert Normalisation("percentile").levels(mapped).high.max() == 255


def test_bars_of_large_images_are_found() -> None:
    image = with_bar(np.tile(dim_nuclei(), (9, 9, 1)))
    assert max(image.shape) > 2048 and without_scale_bars(image).max() < 100


@pytest.mark.parametrize("marks", MARKED.values(), ids=MARKED)
def test_overlays_are_as_bright_as_without_it(marks: Callable) -> None:
    image = dim_nuclei()
    plain, beside = stretched(image), stretched(marks(image))
    away = np.abs(plain.astype(int) - beside)[:150, :150]
    assert plain[:150, :150].max() > 200 and away.mean() < 16  # noise of JPEG


def test_cells_are_found_beside_a_scale_bar() -> None:
    model, image = load_model("nuclei"), dim_nuclei()
    plain = predict(model, image, min_score=model.threshold)
    marked = predict(model, with_bar(image), min_score=model.threshold)
    assert len(plain) >= 15 and abs(len(marked) - len(plain)) <= 2
    assert marked.scale[0] == pytest.approx(plain.scale[0], rel=0.1)
    assert SCALE_BAR_NOTE in marked.notes and SCALE_BAR_NOTE not in plain.notes

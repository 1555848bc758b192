"""Overlays: who gets which colour, which pixels are drawn, how images are shown."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.export.overlay import PALETTE, colour_indices, draw_cells, stretched


def touching(labels: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of ids with pixels side by side or corner to corner."""
    pairs = set()
    for y, x in zip(*np.nonzero(labels), strict=True):
        around = labels[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        pairs |= {(labels[y, x], other) for other in np.unique(around) if other not in (0, labels[y, x])}
    return pairs


@given(
    seed=st.integers(0, 2**31),
    colours=st.integers(1, 40),
    size=st.integers(1, 20),
    background=st.sampled_from([0, 0.4]),
)
def test_cells_that_touch_never_share_a_colour(seed, colours, size, background):
    """In the most crowded images there are: every pixel, or nearly, belongs to a cell of one or a few."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(1, colours + 1, (size, size + 3))
    labels = np.zeros(patches.shape, np.int64)
    for value in range(1, colours + 1):  # each 4-connected patch of one value is a cell
        pieces, _ = ndimage.label(patches == value)
        labels[pieces > 0] = pieces[pieces > 0] + labels.max()
    labels[np.isin(labels, np.flatnonzero(generator.random(labels.max() + 1) < background))] = 0
    indices = colour_indices(labels)
    assert len(indices) == labels.max(initial=0) and (indices < len(PALETTE)).all()
    assert all(indices[a - 1] != indices[b - 1] for a, b in touching(labels))
    np.testing.assert_array_equal(indices, colour_indices(labels.astype(np.uint32)))


def test_cells_close_to_each_other_differ_where_eight_colours_are_enough():
    labels = np.zeros((40, 40), np.uint16)
    for id in range(1, 10):
        y, x = divmod(id - 1, 3)
        labels[13 * y : 13 * y + 10, 13 * x : 13 * x + 10] = id  # gaps of 3 pixels
    indices = colour_indices(labels).reshape(3, 3)
    assert (indices[1:] != indices[:-1]).all() and (indices[:, 1:] != indices[:, :-1]).all()


def test_palette_is_of_distinct_colours():
    assert PALETTE.shape == (8, 3) and len(np.unique(PALETTE, axis=0)) == 8


def two_cells() -> MaskCrops:
    return MaskCrops(
        [torch.ones(600, 20, dtype=torch.bool)] * 2, torch.tensor([[4, 3, 24, 603], [14, 0, 34, 600]]), (610, 40)
    )


@pytest.mark.parametrize("width", [1, 3])
def test_contours_and_tints(width):
    """Cells longer than the bands in which they are drawn; the first one lies on top."""
    image = np.full((610, 40), 7, np.uint8)
    image[0, 0], image[-1, -1] = 0, 255
    plain = stretched(image)
    contour = draw_cells(image, two_cells(), width=width)
    fill = draw_cells(image, two_cells(), width=width, mode="fill", opacity=0.5)
    labels = two_cells().label_image()
    assert labels[300, 20] == 1 and labels[300, 30] == 2
    first, second = PALETTE[colour_indices(labels)]
    for id, colour in ((1, first), (2, second)):
        inside = ndimage.binary_erosion(labels == id, iterations=width)
        edge = (labels == id) & ~inside
        assert (contour[edge] == colour).all() and (fill[edge] == colour).all()
        np.testing.assert_array_equal(contour[inside], plain[inside])
        np.testing.assert_allclose(fill[inside], (plain[inside].astype(float) + colour) / 2, atol=1)
    np.testing.assert_array_equal(contour[labels == 0], plain[labels == 0])
    np.testing.assert_array_equal(fill[labels == 0], plain[labels == 0])
    np.testing.assert_array_equal(contour, draw_cells(image, labels, width=width))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_any_depth_is_stretched_alike(dtype):
    ramp = np.tile(np.linspace(0, 250, 126).round(), (70, 1))
    shown = stretched((ramp * {2: 250, 4: 1000}.get(np.dtype(dtype).itemsize, 1)).astype(dtype))
    assert shown.shape == (70, 126, 3) and shown.dtype == np.uint8
    assert shown.min() == 0 and shown.max() == 255
    np.testing.assert_allclose(shown[..., 0].astype(int), ramp * 255 / 250, atol=3)


def test_colours_of_an_image_stay_and_other_channels_are_averaged():
    colour = np.zeros((20, 20, 3), np.uint16)
    colour[..., 2] = np.linspace(0, 4000, 20)
    colour[..., 0] = colour[..., 2] // 2
    shown = stretched(colour).astype(int)
    np.testing.assert_allclose(shown[..., 0], shown[..., 2] / 2, atol=2)
    assert (shown[..., 1] == 0).all()
    two = np.stack((np.full((20, 20), 5), colour[..., 2]), axis=2)
    assert np.ptp(stretched(two).reshape(-1, 3), axis=1).max() == 0
    gap = np.where(np.eye(20), np.nan, colour[..., 2]).astype(np.float32)
    assert (stretched(gap)[np.eye(20, dtype=bool)] == 0).all() and stretched(gap).max() == 255
    assert stretched(np.full((9, 9), 100, np.uint8)).max() == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3), (9, 8, 2)])
def test_an_image_without_a_number_is_black(shape):
    assert stretched(np.full(shape, np.nan, np.float32)).max() == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="mode.*'outline'"):
        draw_cells(np.zeros((610, 40)), two_cells(), mode="outline")
    with pytest.raises(ValueError, match=r"image.*\(610, 40\).*\(40, 610\)"):
        draw_cells(np.zeros((40, 610)), two_cells())

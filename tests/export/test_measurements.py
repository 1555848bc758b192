"""Shapes of cells against those of scikit-image."""

import warnings

import numpy as np
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.measure import regionprops

from kg_detectron.cells import MaskCrops
from kg_detectron.export.measurements import measure

ATTRIBUTES = {
    "perimeter_px": "perimeter_crofton",
    "axis_major_length_px": "axis_major_length",
    "axis_minor_length_px": "axis_minor_length",
    "feret_diameter_max_px": "feret_diameter_max",
    "equivalent_diameter_area_px": "equivalent_diameter_area",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "orientation_rad": "orientation",
}
SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14)


@given(arrays(bool, SHAPES).filter(np.any))
def test_any_shape_is_measured_as_by_regionprops(crop: np.ndarray) -> None:
    """Single pixels, lines, pieces and holes too."""
    height, width = crop.shape
    masks = MaskCrops([torch.from_numpy(crop)], torch.tensor([[2, 3, 2 + width, 3 + height]]), (30, 30))
    columns = measure(masks, np.zeros((1, 4)), np.ones(1), np.zeros((30, 30)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (region,) = regionprops(np.pad(crop, 1).view(np.uint8))
        expected = {name: getattr(region, attribute) for name, attribute in ATTRIBUTES.items()}
    assert columns["area_px"][0] == crop.sum()
    for name, value in expected.items():
        got = columns[name][0]
        if name == "orientation_rad":  # an axis has no direction, and a circle no axis
            if expected["eccentricity"] > 1e-6:
                assert abs(np.sin(got - value)) < 1e-6
        else:
            assert np.isclose(got, value, rtol=1e-6, atol=1e-6), name


def test_an_image_without_cells_has_empty_columns() -> None:
    columns = measure(MaskCrops([], torch.zeros(0, 4).long(), (8, 8)), np.zeros((0, 4)), np.zeros(0), np.zeros((8, 8)))
    assert {len(column) for column in columns.values()} == {0} and "solidity" in columns


def test_a_cell_without_pixels_has_an_area_alone() -> None:
    """Masks as predicted, before they are separated, may have none."""
    crops = [torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)]
    masks = MaskCrops(crops, torch.tensor([[0, 0, 3, 2], [1, 1, 4, 3]]), (8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        columns = measure(masks, np.zeros((2, 4)), np.ones(2), np.ones((8, 8)), pixel_size=0.5)
    assert columns["area_px"].tolist() == [6, 0] and columns["equivalent_diameter_area_px"][1] == 0
    for name in ("centroid_x_um", "perimeter_px", "axis_major_length_px", "eccentricity", "solidity", "max_intensity"):
        assert np.isfinite(columns[name][0]) and np.isnan(columns[name][1]), name

"""Windows without a cell, as a part of the training."""

import numpy as np
import pytest

from kg_detectron.training import ColourSettings, GeometrySettings
from kg_detectron.training.dataset import LabelledImage, augmented
from kg_detectron.training.empty_fields import empty_field


@pytest.mark.parametrize("side", [32, 100, 256])
def test_fields_are_normalised_and_of_many_kinds(side):
    fields = [empty_field(side, np.random.default_rng(seed)) for seed in range(60)]
    for field in fields:
        assert field.shape == (side, side, 3) and field.dtype == np.float32
        assert np.isfinite(field).all() and field.min() >= 0 and field.max() < 255.001 and field.std() > 1
    grey = sum(np.array_equal(field[..., 0], field[..., 1]) for field in fields)
    assert 20 < grey < 60
    # Neighbours are alike where noise is enlarged or smooth, and not where it keeps its pixels.
    alike = [np.corrcoef(field[:, 1:, 0].ravel(), field[:, :-1, 0].ravel())[0, 1] for field in fields]
    assert min(alike) < 0.2 and max(alike) > 0.9


def test_a_field_depends_on_its_generator_alone():
    first, second, other = (empty_field(64, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_samples_are_empty_as_often_as_asked():
    labels = np.zeros((80, 80), np.uint16)
    labels[10:70, 10:70] = 1
    image = np.zeros((80, 80, 3), np.uint8)
    image[labels > 0] = 200
    source = LabelledImage("a", image, labels, np.array([[40.0, 40.0]]), np.array([67.7]), "", np.array([1]))

    def cells(empty: float, count: int) -> list[int]:
        geometry = GeometrySettings(window=64, on_cell=1, narrow=0.2, wide_share=0, empty=empty)
        samples = (
            augmented(source, 40.0, geometry, ColourSettings(), np.random.default_rng(seed)) for seed in range(count)
        )
        return [len(target["boxes"]) for picture, target in samples if picture.shape == (3, 64, 64)]

    assert all(cells(0, 20)) and not any(cells(1, 20))
    share = np.mean([count == 0 for count in cells(0.3, 200)])
    assert 0.2 < share < 0.4

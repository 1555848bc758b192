"""Synthetic images: what holds for every one of them."""

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kg_detectron.synthetic import classes_image, neural_image, nuclei_image

BOTH = pytest.mark.parametrize("draw", [nuclei_image, neural_image])


def components(mask: np.ndarray, connectivity: int) -> int:
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity)[0] - 1


@BOTH
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), height=st.integers(32, 150), width=st.integers(32, 150), n=st.integers(0, 40))
def test_invariants(draw, seed: int, height: int, width: int, n: int):
    image, masks = draw(np.random.default_rng(seed), height, width, n)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    assert len(masks) <= n
    for mask in masks:
        assert mask.shape == (height, width)
        assert mask.dtype == bool
        assert components(mask, 4 if draw is nuclei_image else 8) == 1
    if draw is nuclei_image and masks:
        assert np.sum(masks, axis=0).max() == 1


@BOTH
def test_seed_decides(draw):
    (image, masks), (same, same_masks), (other, _) = (
        draw(np.random.default_rng(seed), 64, 80, 5) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(image, same)
    np.testing.assert_array_equal(masks, same_masks)
    assert (image != other).any()


@BOTH
def test_all_cells_where_there_is_room(draw):
    for seed in range(5):
        assert len(draw(np.random.default_rng(seed), 256, 256, 40)[1]) == 40


def test_nuclei_touch_and_differ_in_size():
    touching, spreads, total = 0, [], 0
    for seed in range(10):
        _, masks = nuclei_image(np.random.default_rng(seed), 256, 256, 20)
        areas = np.array([mask.sum() for mask in masks])
        spreads.append(areas.max() / areas.min())
        for i, mask in enumerate(masks):
            grown = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            touching += any((grown & other).any() for j, other in enumerate(masks) if j != i)
            total += 1
    assert 0.4 < touching / total < 0.95
    assert np.median(spreads) > 10  # in area, so more than three in radius


def test_neural_processes_are_long_thin_and_cross():
    slender, total, crossings = 0, 0, 0
    for seed in range(10):
        _, masks = neural_image(np.random.default_rng(seed), 256, 256, 12)
        for mask in masks:
            x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
            slender += mask.sum() < 0.4 * width * height
            total += 1
        crossings += np.sum(masks, axis=0).max() > 1
    assert slender / total > 0.7
    assert crossings >= 7


@BOTH
def test_cells_can_be_seen_and_debris_is_no_cell(draw):
    """Cells are brighter than the ground about them, and some of the ground is as bright as cells."""
    debris = 0
    for seed in range(10):
        image, masks = draw(np.random.default_rng(seed), 256, 256, 10)
        grey, cell = image[..., 0].astype(float), np.any(masks, axis=0)
        near = cv2.dilate(cell.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert grey[cell].mean() > grey[~near].mean() + 3
        debris += (grey[~near] > np.percentile(grey[cell], 90)).sum() > 3
    assert debris >= 5


@BOTH
def test_speed(draw):
    rng = np.random.default_rng(0)
    durations = []
    for _ in range(10):
        start = time.process_time()
        draw(rng, 256, 256, 20)
        durations.append(time.process_time() - start)
    assert min(durations) < 0.1  # seconds; about 0.01 and 0.03 on an idle processor


@BOTH
@pytest.mark.parametrize(
    ("height", "width", "n", "message"),
    [
        (31, 64, 3, "at least 32 pixels, got 31 x 64"),
        (64, 0, 3, "got 64 x 0"),
        (64, 64, -1, "n must be 0 or more cells, got -1"),
    ],
)
def test_refuses(draw, height: int, width: int, n: int, message: str):
    with pytest.raises(ValueError, match=message):
        draw(np.random.default_rng(0), height, width, n)


def test_classes_differ_and_touch():
    """Round cells are brighter than the ground, dark ones darker and smaller; long ones fill little of their boxes."""
    levels, areas, fills = ({0: [], 1: [], 2: []} for _ in range(3))
    touching = 0
    for seed in range(4):
        image, masks, classes = classes_image(np.random.default_rng(seed), 192, 192, 24)
        assert len(masks) == len(classes) > 15
        ground = np.median(image[~np.any(masks, axis=0)])
        for mask, kind in zip(masks, classes, strict=True):
            levels[kind].append(float(image[mask].mean()) - float(ground))
            areas[kind].append(mask.sum())
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            fills[kind].append(mask.sum() / (np.ptp(rows) + 1) / (np.ptp(columns) + 1))
        grown = [cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0 for mask in masks]
        touching += sum(
            (grown[i] & masks[j]).any() for i in range(len(masks)) for j in range(i) if classes[i] != classes[j]
        )
    assert min(levels[0]) > 0 > max(levels[1]) and np.median(areas[1]) < 0.6 * np.median(areas[0])
    assert np.median(fills[2]) < 0.5 < np.median(fills[0]) and touching > 10

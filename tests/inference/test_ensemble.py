"""Mirror images are predicted and joined."""

import numpy as np
import pytest
import torch
from builders import TRAINABLE, nuclei_example, tiny_network, train
from hypothesis import given
from hypothesis import strategies as st

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.inference import predict
from kg_detectron.inference.ensemble import MIRRORS, join_cells
from kg_detectron.synthetic import nuclei_image


def cells_of(masks: list[np.ndarray], scores: list[float]) -> Cells:
    """Cells (H, W) bool, each a crop of probabilities 0 and 1 in the box of its pixels."""
    crops, windows = [], []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        y1, y2, x1, x2 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        crops.append(torch.from_numpy(mask[y1:y2, x1:x2].astype(np.float32)))
        windows.append([x1, y1, x2, y2])
    places = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
    size = masks[0].shape if masks else (20, 30)
    labels = torch.ones(len(masks), dtype=torch.long)
    return Cells(places.float(), torch.tensor(scores), labels, MaskCrops(crops, places, size))


def rectangle(x1: int, y1: int, x2: int, y2: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.mark.parametrize("mirror", MIRRORS)
@given(x=st.integers(0, 25), y=st.integers(0, 15), width=st.integers(1, 5), height=st.integers(1, 5))
def test_a_mirror_image_is_undone(mirror, x, y, width, height):
    mask = rectangle(x, y, x + width, y + height)
    mask[y, x] = x % 2 == 0 or width * height == 1  # no symmetry
    if not mask.any():
        mask[y, x] = True
    seen = cells_of([mirror.apply(mask[..., None])[..., 0]], [0.5])
    (dense,) = mirror.undo(seen).masks
    assert np.array_equal(dense.numpy(), mask)
    assert torch.equal(mirror.undo(seen).boxes, cells_of([mask], [0.5]).boxes)


def test_detections_of_one_cell_become_one():
    """The mask where the mean is 0.5 or more, the box by score, the score as a sum over all versions."""
    first = cells_of([rectangle(0, 0, 10, 10)], [0.9])
    second = cells_of([rectangle(0, 0, 10, 8), rectangle(20, 5, 28, 12)], [0.6, 0.4])
    joined = join_cells([first, second, cells_of([], []), cells_of([rectangle(0, 0, 10, 8)], [0.3])])
    assert joined.scores.tolist() == pytest.approx([1.8 / 4, 0.4 / 4])
    one, other = joined.masks
    assert torch.equal(one, torch.from_numpy(rectangle(0, 0, 10, 8)))  # two of three saw no more
    assert torch.equal(other, torch.from_numpy(rectangle(20, 5, 28, 12)))
    assert joined.boxes[0].tolist() == pytest.approx([0, 0, 10, (0.9 * 10 + 0.9 * 8) / 1.8])


def test_detections_of_one_version_stay_apart():
    """Two masks of one version that overlap are two cells, and each takes one of the other version."""
    a, b = rectangle(0, 0, 10, 10), rectangle(0, 0, 10, 9)
    joined = join_cells([cells_of([a, b], [0.9, 0.8]), cells_of([a, b], [0.7, 0.6])])
    assert joined.scores.tolist() == pytest.approx([0.8, 0.7])
    assert [int(mask.sum()) for mask in joined.masks] == [100, 90]


def test_neighbours_stay_apart():
    left, right = rectangle(0, 0, 10, 10), rectangle(7, 0, 17, 10)  # an IoU of 0.18
    joined = join_cells([cells_of([left], [0.9]), cells_of([right], [0.8])])
    assert joined.scores.tolist() == pytest.approx([0.45, 0.4])


@pytest.fixture(scope="module")
def model():
    network, rng = tiny_network(**TRAINABLE), np.random.default_rng(0)
    train(network, lambda: nuclei_example(rng), steps=40)
    return network.eval()


def test_a_symmetric_model_is_not_needed(model):
    """All mirror images of an image have the same cells, with and without tiles; without an ensemble they differ."""
    image, _ = nuclei_image(np.random.default_rng(1), 96, 128, 10)
    steps: list[tuple[int, int]] = []
    cells = predict(model, image, scale=1, ensemble=True, progress=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] and len(cells) > 3
    assert (cells.scores.diff() <= 0).all() and cells.scale == (1, 1) and cells.scale_source == "given"
    for mirror in MIRRORS[1:]:
        other = mirror.undo(predict(model, mirror.apply(image), scale=1, ensemble=True))
        assert len(other) == len(cells)
        torch.testing.assert_close(other.scores, cells.scores, rtol=0, atol=1e-5)
    alone = predict(model, image, scale=1)
    assert len(alone) != len(cells) or not torch.allclose(alone.scores, cells.scores, atol=1e-3)
    tiled = predict(model, image, scale=1, ensemble=True, tile=64, overlap=64)
    assert len(tiled) == len(cells)
    torch.testing.assert_close(tiled.scores, cells.scores, rtol=0, atol=1e-4)

"""Separate cells against a slow definition, pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from kg_detectron.cells import Cells, MaskCrops, label_plane
from kg_detectron.cells.separation import separate_cells


def cells_of(masks: list[np.ndarray], scores: list[float], size: tuple[int, int]) -> Cells:
    """Cells whose masks are probabilities in windows with empty margins, as the network's are."""
    crops, windows = [], []
    for mask in masks:
        crops.append(torch.from_numpy(np.where(mask, 0.8, 0.3)).float())
        windows.append([0, 0, size[1], size[0]])
    places = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
    return cells_of_masks(torch.tensor(scores, dtype=torch.float32), MaskCrops(crops, places, size))


def cells_of_masks(scores: torch.Tensor, masks: MaskCrops) -> Cells:
    """Cells whose boxes and labels tell which they are."""
    count = len(masks)
    return Cells(torch.arange(4.0 * count).reshape(-1, 4), scores, torch.arange(count), masks)


def slow_separation(masks: list[np.ndarray], scores: list[float]) -> list[tuple[int, np.ndarray]]:
    """The definition: (row, mask) of each cell that is left, by falling score."""
    order = sorted(range(len(masks)), key=lambda i: (-np.float32(scores[i]), i))
    taken = np.zeros(masks[0].shape if masks else (1, 1), bool)
    result = []
    for i in order:
        free = masks[i] & ~taken
        taken |= masks[i]
        best: set[tuple[int, int]] = set()
        seen: set[tuple[int, int]] = set()
        for start in zip(*np.nonzero(free), strict=True):
            if start in seen:
                continue
            piece, todo = {start}, [start]
            while todo:
                y, x = todo.pop()
                for pixel in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= pixel[0] < free.shape[0] and 0 <= pixel[1] < free.shape[1]
                    if inside and free[pixel] and pixel not in piece:
                        piece.add(pixel)
                        todo.append(pixel)
            seen |= piece
            if len(piece) > len(best):
                best = piece
        if best:
            mask = np.zeros_like(free)
            mask[tuple(np.array(sorted(best)).T)] = True
            result.append((i, mask))
    return result


@given(seed=st.integers(0, 2**31), count=st.integers(0, 6), density=st.sampled_from([0.1, 0.5, 0.7, 0.95]))
def test_equals_the_definition(seed: int, count: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(1, 12, 2).tolist())
    masks = [generator.random(size) < density for _ in range(count)]
    scores = generator.choice([0.1, 0.2, 0.7], count).tolist()  # with ties
    cells = separate_cells(cells_of(masks, scores, size))
    expected = slow_separation(masks, scores)
    assert cells["labels"].tolist() == [i for i, _ in expected]
    assert cells["boxes"][:, 0].tolist() == [4 * i for i, _ in expected]
    assert cells["scores"].tolist() == [np.float32(scores[i]) for i, _ in expected]
    for own, (_, mask) in zip(cells["masks"], expected, strict=True):
        np.testing.assert_array_equal(own.numpy(), mask)
    for crop in cells["masks"].crops:  # bool, without empty margins
        assert crop.dtype == torch.bool and crop[[0, -1]].any(dim=1).all() and crop[:, [0, -1]].any(dim=0).all()


def test_separating_twice_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    masks = [ndimage.binary_dilation(generator.random((40, 50)) < 0.02, iterations=3) for _ in range(9)]
    once = separate_cells(cells_of(masks, generator.random(9).tolist(), (40, 50)))
    twice = separate_cells(once)
    np.testing.assert_array_equal(once["masks"].label_image(), twice["masks"].label_image())
    assert torch.equal(once["scores"], twice["scores"])


def test_a_large_image_is_separated_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    masks = [ndimage.binary_dilation(generator.random((40, 50)) < 0.02, iterations=3) for _ in range(9)]
    cells = cells_of(masks, generator.random(9).tolist(), (40, 50))
    expected = separate_cells(cells)
    monkeypatch.setattr(label_plane, "_LARGE", 0)
    pieces = separate_cells(cells)
    np.testing.assert_array_equal(pieces["masks"].label_image(), expected["masks"].label_image())
    assert torch.equal(pieces["scores"], expected["scores"]) and len(expected["scores"]) > 4


def test_70_000_cells() -> None:
    """Pairs of a cell of 3 x 3 and one of 2 x 2 over its corner, which has the higher score."""
    count = 70_000
    place = torch.arange(count // 2)
    corner = torch.stack((place % 192 * 4, place // 192 * 4), dim=1)
    size = torch.tensor([[3, 3]] * (count // 2) + [[2, 2]] * (count // 2))
    windows = torch.cat((corner.repeat(2, 1), corner.repeat(2, 1) + size), dim=1)
    crops = [torch.ones(shape, dtype=torch.bool) for shape in size.tolist()]
    masks = MaskCrops(crops, windows, (768, 768))
    scores = torch.tensor([0.3] * (count // 2) + [0.6] * (count // 2))
    labels = separate_cells(cells_of_masks(scores, masks))["masks"].label_image()
    assert labels.dtype == np.uint32
    # Ids 1..N without gaps; the better cells come first and are whole, the others keep the corner that is left.
    assert np.bincount(labels.ravel())[1:].tolist() == [4] * (count // 2) + [5] * (count // 2)
    assert ndimage.label(labels > 0)[1] == count // 2

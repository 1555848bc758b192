"""Mask crops against dense masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from kg_detectron.masks import MaskCrops


def random_crops(seed: int, count: int = 6, height: int = 23, width: int = 31) -> MaskCrops:
    generator = np.random.default_rng(seed)
    crops, windows = [], []
    for _ in range(count):
        x1, y1 = int(generator.integers(width)), int(generator.integers(height))
        x2, y2 = int(generator.integers(x1 + 1, width + 1)), int(generator.integers(y1 + 1, height + 1))
        windows.append([x1, y1, x2, y2])
        crops.append(torch.from_numpy(generator.random((y2 - y1, x2 - x1)) ** float(generator.choice([0.1, 1, 4]))))
    crops.append(torch.ones(height, width))  # everything: one run over all columns
    windows.append([0, 0, width, height])
    crops.append(torch.zeros(2, 2))  # nothing
    windows.append([3, 3, 5, 5])
    return MaskCrops(crops, torch.tensor(windows), (height, width))


@given(seed=st.integers(0, 2**31))
def test_run_lengths_equal_those_of_dense_masks(seed):
    masks = random_crops(seed)
    for own, dense in zip(masks.rle(), masks, strict=True):
        assert own == coco_mask.encode(np.asfortranarray(dense.numpy().astype(np.uint8)))


def test_container():
    masks = random_crops(0)
    assert len(masks) == 8 and len(list(masks)) == 8
    assert masks[0].shape == (23, 31) and masks[0].dtype == torch.bool
    assert torch.equal(masks[-1], masks[7])
    for chosen in (slice(2, 4), [2, 3], torch.tensor([2, 3]), torch.isin(torch.arange(8), torch.tensor([2, 3]))):
        part = masks[chosen]
        assert len(part) == 2 and torch.equal(part[0], masks[2]) and torch.equal(part[1], masks[3])
    assert torch.equal(masks.to(torch.float64)[0], masks[0])
    with pytest.raises(IndexError):
        masks[8]


def test_resizing_samples_pixel_centres():
    """Twice the size: each output pixel lies a quarter pixel off an input centre; bilinear between, nothing shifted."""
    crop = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    masks = MaskCrops([crop], torch.tensor([[4, 6, 6, 8]]), (16, 16)).resized((32, 32))
    assert masks.windows.tolist() == [[8, 12, 12, 16]] and masks.size == (32, 32)
    torch.testing.assert_close(masks.crops[0], torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(4, 4))
    back = masks.resized((16, 16))
    assert torch.equal(back[0], MaskCrops([crop], torch.tensor([[4, 6, 6, 8]]), (16, 16))[0])


@given(seed=st.integers(0, 2**31), height=st.integers(1, 60), width=st.integers(1, 60))
def test_resizing_keeps_every_cell_inside_the_image(seed, height, width):
    resized = random_crops(seed).resized((height, width))
    assert all(mask.shape == (height, width) for mask in resized)
    assert all(crop.numel() for crop in resized.crops)


def test_crops_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="windows"):
        MaskCrops([torch.zeros(2, 2)], torch.zeros(2, 4), (8, 8))
    with pytest.raises(ValueError, match=r"crops\[0\].*\(3, 2\)"):
        MaskCrops([torch.zeros(2, 2)], torch.tensor([[0, 0, 2, 3]]), (8, 8))
    with pytest.raises(ValueError, match=r"windows\[0\].*8 x 8"):
        MaskCrops([torch.zeros(2, 2)], torch.tensor([[7, 0, 9, 2]]), (8, 8))

"""Mask crops against dense masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.cells.run_lengths import decode_runs, encode_mask


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
    for rle, dense in zip(masks.rle(), masks, strict=True):
        expected = coco_mask.encode(np.asfortranarray(dense.numpy().astype(np.uint8)))
        assert rle == encode_mask(dense.numpy()) == expected | {"counts": expected["counts"].decode()}


@given(seed=st.integers(0, 2**31))
def test_extents_are_those_of_dense_masks(seed):
    masks = random_crops(seed)
    for extent, window, dense in zip(masks.extents(), masks.windows, masks, strict=True):
        y, x = dense.nonzero().T
        expected = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)) if len(x) else window
        assert torch.equal(extent, expected)
    assert masks[:0].extents().shape == (0, 4)


def test_extents_of_many_masks_are_found_in_parts(monkeypatch):
    masks = random_crops(0, count=30)
    together = masks.extents()
    monkeypatch.setattr("kg_detectron.cells.masks._PIXELS_TOGETHER", 50)
    assert torch.equal(masks.extents(), together)


@given(seed=st.integers(0, 2**31))
def test_masks_come_back_from_run_lengths(seed):
    masks = random_crops(seed)
    encoded = masks.rle()
    as_lists = [{"size": [23, 31], "counts": decode_runs(rle["counts"]).tolist()} for rle in encoded]
    for back in (MaskCrops.from_rle(encoded), MaskCrops.from_rle(as_lists)):
        assert len(back) == len(masks) and back.size == masks.size
        assert all(torch.equal(own, mask) for own, mask in zip(back, masks, strict=True))


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.uint32, np.int64]))
def test_masks_come_back_from_a_label_image(seed, dtype):
    masks = random_crops(seed)[:-1]  # without the empty one
    labels = np.zeros(masks.size, np.int64)
    for i in reversed(range(len(masks))):
        labels[masks[i].numpy()] = i + 1  # the first one is on top
    np.testing.assert_array_equal(masks.label_image(), labels)
    assert masks.label_image().dtype == np.uint16
    ids = np.unique(labels[labels > 0])
    name = np.sort(np.random.default_rng(seed).choice(min(np.iinfo(dtype).max, 2**40), len(masks) + 1, replace=False))
    gaps = np.where(labels > 0, name[labels] + 1, 0).astype(dtype)  # ids with gaps, in the same order
    back = MaskCrops.from_label_image(gaps)
    assert len(back) == len(ids)
    for id, mask in zip(ids, back, strict=True):
        np.testing.assert_array_equal(mask.numpy(), labels == id)


def test_label_images_count_beyond_16_bits(tmp_path):
    count = 65_536
    place = torch.arange(count)
    window = torch.stack((place % 300, place // 300), dim=1)
    masks = MaskCrops([torch.ones(1, 1, dtype=torch.bool)] * count, torch.cat((window, window + 1), dim=1), (300, 300))
    out = np.memmap(tmp_path / "labels", np.uint32, "w+", shape=(300, 300))
    out[:] = 5
    assert masks.label_image(out) is out
    np.testing.assert_array_equal(out.ravel(), np.r_[1 : count + 1, np.zeros(90_000 - count)])
    assert masks.label_image().dtype == np.uint32 and masks[1:].label_image().dtype == np.uint16
    with pytest.raises(ValueError, match="out: .* 65536 ids.*uint16"):
        masks.label_image(np.zeros((300, 300), np.uint16))


def test_what_is_no_encoding_or_label_image_is_named():
    with pytest.raises(ValueError, match="size"):
        MaskCrops.from_rle([])
    assert len(MaskCrops.from_rle([], (4, 5))) == 0 and MaskCrops.from_rle([], (4, 5)).size == (4, 5)
    good = {"size": [4, 5], "counts": [3, 17]}
    for bad in ({"size": [5, 4], "counts": [3, 17]}, {"size": [4, 5], "counts": [3, 16]}):
        with pytest.raises(ValueError, match=r"rles\[1\].*4 x 5"):
            MaskCrops.from_rle([good, bad])
    for labels, message in (
        (np.zeros((4, 5)), "float64"),
        (np.zeros((4, 5, 3), int), r"\(4, 5, 3\)"),
        (-np.eye(4, dtype=int), "-1"),
    ):
        with pytest.raises(ValueError, match=f"labels.*{message}"):
            MaskCrops.from_label_image(labels)
    many = random_crops(0)
    for out in (np.zeros((23, 30), int), np.zeros((23, 31)), np.zeros((23, 31), bool)):
        with pytest.raises(ValueError, match="out: .*23, 31.* 8 ids"):
            many.label_image(out)


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

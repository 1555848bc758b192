"""The segmentation branch for many crops at once against one crop at a time, as the paper defines it."""

import pytest
import torch
from benchmark.measure import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from kg_detectron.cells import MaskCrops
from kg_detectron.modeling import SegmentationBranch, SegmentationSettings, mask_loss

CHANNELS, WIDTHS = (6, 8, 8, 10, 12), (6, 8, 8, 10)
HEIGHT, WIDTH = 112, 144


def branch_of(channels: tuple = CHANNELS, widths: tuple = WIDTHS, **values) -> SegmentationBranch:
    return SegmentationBranch(channels, widths, SegmentationSettings(**values))


def one_by_one(branch: SegmentationBranch, features: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
    """Mask logits (h, w) of all boxes, image after image, by the specification."""
    return [
        branch.segment_crop([feature[image] for feature in features], box)
        for image, boxes_of_image in enumerate(boxes)
        for box in boxes_of_image
    ]


def scene(levels: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(2, c, HEIGHT // 2**i, WIDTH // 2**i, generator=generator, requires_grad=True)
        for i, c in enumerate(CHANNELS[:levels])
    ]
    corner = torch.rand(30, 2, generator=generator) * torch.tensor([WIDTH - 12, HEIGHT - 12])
    size = torch.rand(30, 2, generator=generator) ** 2 * 90 + 0.3
    boxes = torch.cat((corner, torch.minimum(corner + size, torch.tensor([WIDTH, HEIGHT]))), dim=1)
    special = [
        [0, 0, WIDTH, HEIGHT],
        [1, 2, WIDTH, 14],  # too long to be padded
        [0, 0, 6, 100],
        [5, 5, 7, 7],
        [5, 5, 5.2, 95],
        [WIDTH - 0.3, HEIGHT - 0.2, WIDTH, HEIGHT],
        [3, 4, 4, 5],
        [0, 40, WIDTH, 42],
    ]
    return features, [torch.cat((torch.tensor(special), boxes[:15])), boxes[15:]]


@pytest.mark.parametrize("chunk_pixels", [1, 5_000, 2**19])
@pytest.mark.parametrize("widths", [WIDTHS, (4, 8, 5, 7)])
def test_batches_equal_single_crops(chunk_pixels, widths):
    torch.manual_seed(0)
    branch = branch_of(widths=widths, chunk_pixels=chunk_pixels)
    features, boxes = scene()
    logits, windows = branch(features, boxes)
    expected = one_by_one(branch, features, boxes)
    assert len(logits) == len(windows) == len(expected) == 38
    for crop, other, (x1, y1, x2, y2) in zip(logits, expected, windows.tolist(), strict=True):
        assert crop.shape == (y2 - y1, x2 - x1)
        torch.testing.assert_close(crop, other, atol=1e-5, rtol=1e-4)

    variables = [*features, *branch.parameters()]
    gradients = torch.autograd.grad(sum(c.square().sum() for c in logits), variables)
    others = torch.autograd.grad(sum(c.square().sum() for c in expected), variables)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-3)


def test_one_map_alone_is_seg_s1():
    torch.manual_seed(0)
    branch = branch_of(CHANNELS[:1], WIDTHS[:1])
    features, boxes = scene(levels=1)
    logits, _ = branch(features, boxes)
    for crop, other in zip(logits, one_by_one(branch, features, boxes), strict=True):
        torch.testing.assert_close(crop, other, atol=1e-5, rtol=1e-4)


def test_loss_takes_each_cells_own_mask_and_reaches_every_parameter():
    torch.manual_seed(0)
    branch = branch_of(widths=(4, 8, 5, 7))
    features, _ = scene()
    boxes = [torch.tensor([[2.0, 3, 9, 12], [4, 3, 11, 12]]), torch.zeros(0, 4)]  # two cells that overlap
    masks = [torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool), torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)]
    masks[0][0, 3:12, 2:6] = True
    masks[0][1, 3:12, 6:11] = True
    loss = branch.loss(features, boxes, masks)
    logits, _ = branch(features, boxes)
    targets = [masks[0][0, 3:12, 2:9], masks[0][1, 3:12, 4:11]]
    expected = sum(cross_entropy(crop, target.float()) for crop, target in zip(logits, targets, strict=True)) / 2
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert all(p.grad is not None for p in branch.parameters())


def test_loss_without_cells_is_zero_and_reaches_every_parameter():
    branch = branch_of()
    features, _ = scene()
    none = [torch.zeros(0, 4)] * 2
    loss = branch.loss(features, none, [torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)] * 2)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None for p in branch.parameters())


def test_mask_loss_weighs_crops_alike():
    """Mean over the pixels of a crop first: a large crop counts as much as a small one."""
    logits = torch.cat((torch.zeros(2 * 2), torch.full((30 * 40,), 50.0)))
    loss = mask_loss(logits, torch.ones(len(logits), dtype=torch.bool), torch.tensor([2 * 2, 30 * 40]))
    assert float(loss) == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2, rel=1e-5)


def test_no_boxes_at_all():
    branch = branch_of()
    features, _ = scene()
    masks = branch.predict_masks(features, [torch.zeros(0, 4)] * 2, [(112, 144), (90, 100)])
    assert [len(m) for m in masks] == [0, 0] and masks[1].size == (90, 100) and masks[0].rle() == []


def test_crops_reach_beyond_their_boxes_by_the_margin_but_not_beyond_the_image():
    branch = branch_of()
    features, _ = scene()
    boxes = [torch.tensor([[20.0, 30, 45, 50], [0, 1, 30, 20], [100, 60, 140, 99.5]]), torch.tensor([[7.0, 8, 30, 40]])]
    grown = [torch.tensor([[18, 28, 47, 52], [0, 0, 32, 22], [98, 58, 142, 100]]), torch.tensor([[5, 6, 32, 40]])]
    sizes = [(100, 144), (40, 100)]
    with torch.no_grad():
        plain = branch.predict_masks(features, [windows.float() for windows in grown], sizes)
        branch.settings = SegmentationSettings(mask_margin=2.0, box_jitter=0.2)
        wide = branch.predict_masks(features, boxes, sizes)
    for masks, expected, windows in zip(wide, plain, grown, strict=True):
        assert torch.equal(masks.windows, windows)
        assert all(torch.equal(a, b) for a, b in zip(masks.crops, expected.crops, strict=True))


def test_with_a_margin_cells_have_the_boxes_of_their_masks():
    masks = MaskCrops([torch.tensor([[0.1, 0.7, 0.2], [0.1, 0.2, 0.6]])], torch.tensor([[4, 5, 7, 7]]), (20, 20))
    boxes = torch.tensor([[4.2, 5, 7, 7]])
    assert branch_of().cell_boxes(boxes, masks) is boxes
    assert branch_of(mask_margin=1.0, box_jitter=0.2).cell_boxes(boxes, masks).tolist() == [[5, 5, 7, 7]]


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="widths"):
        branch_of(widths=WIDTHS[:2])


@given(data=st.data())
@settings(max_examples=25)
def test_any_boxes_equal_single_crops(data):
    """Any boxes on any number of images and maps, in chunks of any size."""
    levels = data.draw(st.integers(1, 5))
    images = data.draw(st.integers(1, 3))
    height, width = (16 * data.draw(st.integers(1, 6)) for _ in "yx")
    torch.manual_seed(data.draw(st.integers(0, 9)))
    features = [torch.randn(images, c, height >> i, width >> i) for i, c in enumerate(CHANNELS[:levels])]
    pixels = data.draw(st.sampled_from((1, 999, 10**6)))
    branch = branch_of(CHANNELS[:levels], (4, 8, 5, 7)[: max(1, levels - 1)], chunk_pixels=pixels)
    corner = st.tuples(st.floats(0, width - 0.5, width=32), st.floats(0, height - 0.5, width=32))
    side = st.tuples(st.floats(0.5, width, width=32), st.floats(0.5, height, width=32))
    boxes = []
    for _ in range(images):
        drawn = data.draw(st.lists(st.tuples(corner, side), max_size=6))
        corners = [[x, y, min(x + w, width), min(y + h, height)] for (x, y), (w, h) in drawn]
        boxes.append(torch.tensor(corners).reshape(-1, 4))
    with torch.no_grad():
        logits, _ = branch(features, boxes)
        expected = one_by_one(branch, features, boxes)
    for crop, other in zip(logits, expected, strict=True):
        torch.testing.assert_close(crop, other, atol=1e-5, rtol=1e-4)


def test_chunk_pixels_bound_the_memory_of_training():
    """A training step with eight times the crops needs hardly more than the maps and logits of those."""
    torch.manual_seed(0)
    features = [torch.randn(1, c, 256 >> i, 256 >> i, requires_grad=True) for i, c in enumerate(CHANNELS)]
    tile = torch.tensor([[0.0, 0, 32, 32]])
    grid = torch.cartesian_prod(torch.arange(8), torch.arange(8)).repeat(1, 2) * 32

    def peak(chunk_pixels: int, count: int) -> int:
        branch = branch_of(chunk_pixels=chunk_pixels)
        masks = torch.zeros(count, 256, 256, dtype=torch.bool)
        return peak_bytes(lambda: branch.loss(features, [tile + grid[:count]], [masks]).backward(), "cpu")

    bounded, unbounded = (peak(limit, 64) - peak(limit, 8) for limit in (8 * 32 * 32, 2**19))
    assert bounded < unbounded / 4

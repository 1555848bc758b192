"""The segmentation branch in batches against one crop at a time, as the paper defines it."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kg_detectron.modeling import SegmentationBranch
from kg_detectron.modeling.losses import mask_loss

CHANNELS, WIDTHS = (6, 8, 8, 10, 12), (6, 8, 8, 10)
HEIGHT, WIDTH = 96, 128


def one_by_one(branch: SegmentationBranch, features: list[Tensor], box: Tensor, image: int) -> Tensor:
    crops = []
    for level, feature in enumerate(features):
        x1, y1, x2, y2 = (int(v) for v in (box / 2**level).round())
        if level == 0:
            x1, y1 = min(x1, int(box[2].ceil()) - 1), min(y1, int(box[3].ceil()) - 1)
            x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        x2, y2 = min(x2, feature.shape[3]), min(y2, feature.shape[2])
        if min(x2 - x1, y2 - y1) < 2:
            if level == 0:
                crops.append(feature[image : image + 1, :, y1:y2, x1:x2])
            break
        crops.append(feature[image : image + 1, :, y1:y2, x1:x2])
    result = crops[-1]
    if len(crops) < len(features) or len(features) == 1:
        result = branch.starts[len(crops) - 1](result)
    for level in reversed(range(len(crops) - 1)):
        deep = interpolate(result, crops[level].shape[2:], mode="bilinear", align_corners=False)
        result = branch.steps[level](deep, crops[level])
    return branch.predict(branch.hidden(result))[0, 0]


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
        [5, 5, 7, 7],
        [5, 5, 5.2, 95],
        [WIDTH - 0.3, HEIGHT - 0.2, WIDTH, HEIGHT],
        [3, 4, 4, 5],
        [0, 40, WIDTH, 42],
    ]
    return features, [torch.cat((torch.tensor(special), boxes[:15])), boxes[15:]]


@pytest.mark.parametrize("pixels_in_flight", [1, 5_000, 2**21])
@pytest.mark.parametrize("widths", [WIDTHS, (4, 8, 5, 7)])
def test_batches_equal_single_crops(pixels_in_flight, widths):
    torch.manual_seed(0)
    branch = SegmentationBranch(CHANNELS, widths, pixels_in_flight)
    features, boxes = scene()
    logits, windows = branch(features, boxes)
    expected = [one_by_one(branch, features, box, i) for i, own in enumerate(boxes) for box in own]
    assert len(logits) == len(windows) == len(expected) == 36
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
    branch = SegmentationBranch(CHANNELS[:1], WIDTHS[:1])
    features, boxes = scene(levels=1)
    logits, _ = branch(features, boxes)
    for crop, (i, box) in zip(logits, [(i, b) for i, own in enumerate(boxes) for b in own], strict=True):
        torch.testing.assert_close(crop, one_by_one(branch, features, box, i), atol=1e-5, rtol=1e-4)


def test_loss_takes_each_cells_own_mask_and_reaches_every_parameter():
    torch.manual_seed(0)
    branch = SegmentationBranch(CHANNELS, (4, 8, 5, 7))
    features, _ = scene()
    boxes = [torch.tensor([[2.0, 3, 9, 12], [4, 3, 11, 12]]), torch.zeros(0, 4)]  # two cells that overlap
    masks = [torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool), torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)]
    masks[0][0, 3:12, 2:6] = True
    masks[0][1, 3:12, 6:11] = True
    loss = branch.loss(features, boxes, masks)
    logits, _ = branch(features, boxes)
    expected = mask_loss(logits, [masks[0][0, 3:12, 2:9], masks[0][1, 3:12, 4:11]])
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert all(p.grad is not None for p in branch.parameters())


def test_loss_without_cells_is_zero_and_reaches_every_parameter():
    branch = SegmentationBranch(CHANNELS, WIDTHS)
    features, _ = scene()
    none = [torch.zeros(0, 4)] * 2
    loss = branch.loss(features, none, [torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)] * 2)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None for p in branch.parameters())


def test_mask_loss_weighs_crops_alike():
    """Mean over the pixels of a crop first: a large crop counts as much as a small one."""
    logits = [torch.zeros(2, 2), torch.full((30, 40), 50.0)]
    targets = [torch.ones(2, 2, dtype=torch.bool), torch.ones(30, 40, dtype=torch.bool)]
    assert float(mask_loss(logits, targets)) == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2, rel=1e-5)


def test_no_boxes_at_all():
    branch = SegmentationBranch(CHANNELS, WIDTHS)
    features, _ = scene()
    masks = branch.predict_masks(features, [torch.zeros(0, 4)] * 2, [(96, 128), (90, 100)])
    assert [len(m) for m in masks] == [0, 0] and masks[1].size == (90, 100) and masks[0].rle() == []


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="widths"):
        SegmentationBranch(CHANNELS, WIDTHS[:2])

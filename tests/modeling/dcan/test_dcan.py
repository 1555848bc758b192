"""DCAN: targets and losses against plain loops, and targets that decode to the cells they come from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kg_detectron.modeling.dcan.decoding import decode_contours, separated_objects
from kg_detectron.modeling.dcan.losses import Branch, dcan_losses
from kg_detectron.modeling.dcan.settings import ContourDecodingSettings, ContourHeadSettings
from kg_detectron.modeling.dcan.targets import contour_targets
from kg_detectron.synthetic import neural_image, nuclei_image


def label_image(masks: list[np.ndarray], apart: bool = False) -> np.ndarray:
    """(H, W) int64 of the masks, of which the first one wins; ``apart`` leaves out those that touch one before."""
    labels = np.zeros(masks[0].shape, np.int64)
    for number, mask in enumerate(masks, start=1):
        if not apart or not (ndimage.binary_dilation(mask, iterations=3) & (labels > 0)).any():
            labels[mask & (labels == 0)] = number
    return labels


def worst_overlap(labels: np.ndarray, found: np.ndarray) -> float:
    """The lowest, over the cells of a label image, of the best IoU with a cell that was found."""
    worst = 1.0
    for number in np.unique(labels[labels > 0]):
        cell = labels == number
        others = [found == other for other in np.unique(found[cell])]
        worst = min(worst, max((cell & other).sum() / (cell | other).sum() for other in others))
    return worst


def decoded(labels: np.ndarray, radius: int) -> np.ndarray:
    objects, contours = contour_targets(torch.from_numpy(labels)[None], radius)
    return separated_objects(objects[0].numpy(), contours[0].numpy(), ContourDecodingSettings(min_area=1))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_targets_of_touching_nuclei_decode_to_them(seed, count):
    labels = label_image(nuclei_image(np.random.default_rng(seed), 96, 96, count)[1])
    # With the thinnest contours every cell that is nowhere thinner than three pixels is whole.
    thick = np.zeros_like(labels)
    for number in np.unique(labels[labels > 0]):
        opened = ndimage.binary_opening(labels == number, np.ones((3, 3)))
        pieces, n = ndimage.label(opened)
        if n:
            thick[pieces == 1 + np.argmax(np.bincount(pieces[pieces > 0])[1:])] = number
    found = decoded(thick, 0)
    assert found.max() == len(np.unique(thick[thick > 0]))
    assert worst_overlap(thick, found) > 0.9


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([0, 1]))
def test_slender_cells_apart_decode_to_themselves(seed, radius):
    """Their processes are contour all over, and come back by growing."""
    labels = label_image(neural_image(np.random.default_rng(seed), 96, 96, 3)[1], apart=True)
    found = decoded(labels, radius)
    assert ((found > 0) == (labels > 0) | (ndimage.binary_fill_holes(labels > 0) & (found > 0))).all()
    foreground, _ = ndimage.label(labels > 0)
    for number in np.unique(found[found > 0]):  # no cell that was found lies in two
        assert len(np.unique(labels[(found == number) & (labels > 0)])) == 1


def test_a_small_cell_that_is_contour_all_over_stays_one():
    labels = np.zeros((12, 12), np.int64)
    labels[2:4, 2:4], labels[6:11, 1:11] = 1, 2
    assert worst_overlap(labels, decoded(labels, 1)) == 1.0


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_contours_are_those_of_plain_loops(radius):
    labels = np.kron(np.random.default_rng(radius).integers(0, 3, (3, 4)), np.ones((4, 4), int))
    objects, contours = contour_targets(torch.from_numpy(labels)[None], radius)
    outermost = []
    for y, x in np.ndindex(labels.shape):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [p for p in around if 0 <= p[0] < 12 and 0 <= p[1] < 16]
        if labels[y, x] and any(labels[p] != labels[y, x] for p in inside):
            outermost.append((y, x))
    for y, x in np.ndindex(labels.shape):
        near = any(max(abs(y - i), abs(x - j)) <= radius for i, j in outermost)
        assert float(contours[0, y, x]) == near and float(objects[0, y, x]) == (labels[y, x] > 0)


def test_losses_are_those_of_plain_loops():
    torch.manual_seed(0)
    levels = torch.randn(2, 3, 2, 3, 4)  # branch, level, image, y, x
    branches = [Branch(list(branch), branch.sum(0)) for branch in levels]
    targets = (torch.rand(2, 2, 3, 4) > 0.5).float()
    losses = dcan_losses(*branches, tuple(targets), ContourHeadSettings(contour_weight=2.0, auxiliary_weight=0.3))

    def entropy(logits, target):
        total = 0.0
        for place in np.ndindex(*logits.shape):
            q = 1 / (1 + math.exp(-float(logits[place])))
            total -= math.log(q if target[place] else 1 - q)
        return total / logits.numel()

    assert float(losses["loss_object"]) == pytest.approx(entropy(levels[0].sum(0), targets[0]), rel=1e-5)
    assert float(losses["loss_contour"]) == pytest.approx(2 * entropy(levels[1].sum(0), targets[1]), rel=1e-5)
    auxiliary = sum((1 + b) * entropy(levels[b, l], targets[b]) for b in range(2) for l in range(3))
    assert float(losses["loss_auxiliary"]) == pytest.approx(0.3 * auxiliary, rel=1e-5)


def test_the_score_is_the_mean_probability():
    objects = torch.zeros(10, 20)
    objects[2:8, 2:8], objects[2:8, 10:18] = 0.6, 0.9
    objects[4, 4] = 0.1  # a hole, which becomes the cell's
    cells = decode_contours(objects, torch.zeros(10, 20), ContourDecodingSettings())
    assert cells.scores.tolist() == pytest.approx([0.9, (35 * 0.6 + 0.1) / 36])
    assert cells.boxes.tolist() == [[10, 2, 18, 8], [2, 2, 8, 8]]
    assert cells.masks[1].sum() == 36
    none = decode_contours(torch.zeros(4, 5), torch.zeros(4, 5), ContourDecodingSettings())
    assert len(none) == 0 and none.size == (4, 5)

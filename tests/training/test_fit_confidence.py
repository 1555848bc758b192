"""Fitting a confidence head: what it is fitted to, that it learns, and what stays."""

import copy

import numpy as np
import pytest
import torch
from builders import drawn_image, labelled, tiny_network

from kg_detectron.cells import MaskCrops
from kg_detectron.metrics.iou import mask_iou
from kg_detectron.modeling import DCANNet
from kg_detectron.modeling.dcan.settings import DCANSettings
from kg_detectron.training import confidence
from kg_detectron.training.confidence import fit_confidence
from kg_detectron.training.dataset import labelled_image, target_of_labels


def confident(**changes):
    return tiny_network(confidence="mask", vote_exponent=0.1, **changes).eval()


def test_everything_else_stays_and_the_fit_can_be_repeated():
    model, again = confident(), confident()
    images = labelled(model, 3)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert fit_confidence(model, images, seed=1, views=5) == fit_confidence(again, images, seed=1, views=5) > 50
    assert not model.training and torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not model.of_confidence(name)), name
        assert torch.equal(value, again.state_dict()[name])
    assert not any(p.requires_grad for p in model.segmentation.confidence_head.parameters())
    fit_confidence(again, images, seed=2, views=5)
    assert not torch.equal(again.segmentation.confidence_head.mean, model.segmentation.confidence_head.mean)


def test_candidates_are_what_a_prediction_finds(monkeypatch):
    model = confident()
    torch.nn.init.constant_(model.segmentation.predict.bias, 1.0)  # masks fill their boxes
    pixels = torch.from_numpy(drawn_image(96, 96).transpose(2, 0, 1).astype(np.float32))
    (cells,) = model.detect([pixels])
    labels = cells.masks.label_image()[:, :60]  # so that some are cut
    labels = np.pad(labels, ((0, 0), (0, 36)))
    monkeypatch.setattr(confidence, "_view", lambda *_: (pixels, labels))
    inputs, ious = confidence._candidates(model, labelled(model, 1), 0, 0)
    assert len(inputs) == len(cells) > 20
    sides = torch.tensor([crop.shape for crop in cells.masks.crops]).float().log().sum(1)
    torch.testing.assert_close(inputs[:, -2:].sum(1).sort().values, sides.sort().values)
    masks = target_of_labels(labels)["masks"]  # specks are left out
    truth = MaskCrops.from_label_image(sum(number * mask.int() for number, mask in enumerate(masks, start=1)).numpy())
    expected = mask_iou(cells.masks.rle(), truth.rle()).max(1)
    np.testing.assert_allclose(np.sort(ious.numpy()), np.sort(expected), rtol=1e-5)
    assert expected.max() > 0.9 and expected.min() < 0.1


def test_it_learns_which_masks_fit():
    """Masks that fit are told from those that do not by the features in them."""
    torch.manual_seed(0)
    head = confident().segmentation.confidence_head
    inputs = torch.randn(600, len(head.mean)) * 7 + 3
    fits = inputs[:, 0] > 3
    confidence._fit(head, inputs, fits.float())
    found = head.logits(inputs).sigmoid()
    assert found[fits].quantile(0.1) > 0.9 and found[~fits].quantile(0.9) < 0.1


def test_few_candidates_of_a_view_are_drawn(monkeypatch):
    monkeypatch.setattr(confidence, "_CANDIDATES", 3)
    assert fit_confidence(confident(), labelled(confident(), 2), views=4) == 12


def test_where_nothing_is_found_the_head_stays():
    model = confident(peak_threshold=1.0)
    before = copy.deepcopy(model.state_dict())
    assert fit_confidence(model, labelled(model, 2), views=2) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_large_image_is_looked_at_in_parts(monkeypatch):
    monkeypatch.setattr(confidence, "_WINDOW", 48)
    model = confident(resize="isotropic", diameter=20.0)
    views = [confidence._view(model, labelled(model, 1)[0], np.random.default_rng(seed)) for seed in range(4)]
    assert all(image.shape == (3, 48, 48) and labels.shape == (48, 48) for image, labels in views)
    assert len({tuple(np.unique(labels)) for _, labels in views}) > 1


@pytest.mark.parametrize("model", [tiny_network().eval(), DCANNet.build(DCANSettings())])
def test_a_network_without_a_head_stays(model):
    assert fit_confidence(model, labelled(tiny_network(), 1)) == 0


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="images: expected at least one"):
        fit_confidence(confident(), [])


def test_an_image_without_cells_gives_masks_that_are_worth_nothing():
    model = confident()
    image = labelled_image("empty", drawn_image(96, 96), np.zeros((96, 96), np.int32), model.preprocessing)
    inputs, ious = confidence._candidates(model, [image], 0, 0)
    assert len(inputs) > 5 and (ious == 0).all()

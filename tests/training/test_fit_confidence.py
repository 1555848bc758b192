"""Fitting a confidence head: what it is fitted to, that it learns, and what stays."""

import copy

import numpy as np
import pytest
import torch
from builders import drawn_image, labelled, tiny_network

from kg_detectron.cells import MaskCrops
from kg_detectron.io.resize import resize_image, resize_labels
from kg_detectron.metrics.iou import mask_iou
from kg_detectron.modeling import DCANNet
from kg_detectron.modeling.dcan.settings import DCANSettings
from kg_detectron.training import confidence
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings
from kg_detectron.training.confidence import fit_confidence
from kg_detectron.training.dataset import LabelledImage, labelled_image


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
    truth = MaskCrops.from_label_image(labels)
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


def test_a_large_image_is_looked_at_in_parts():
    """Enlarged as a whole, this image of small cells would take 12 GB."""
    model = confident(resize="isotropic", diameter=20.0)
    labels = np.zeros((6000, 6000), np.uint16)
    labels[::8, ::8] = 1
    image = LabelledImage("x", np.zeros((6000, 6000, 3), np.uint8), labels, np.zeros((4, 2)), np.full(4, 2.3), "")
    sizes = set()
    for seed in range(6):
        shown, part = confidence._view(model, image, np.random.default_rng(seed))
        assert shown.shape[1:] == part.shape and part.max() > 0
        sizes.add(tuple(part.shape))
    assert max(max(size) for size in sizes) <= confidence._WINDOW + 8 < 700 and len(sizes) > 1


@pytest.mark.parametrize("resize", ["squeeze", "isotropic"])
def test_a_view_shows_the_image_as_a_prediction_does_but_turned(monkeypatch, resize):
    """At the same scale, where that does not change, and image and labels alike."""
    monkeypatch.setattr(confidence, "_GEOMETRY", GeometrySettings(narrow=0.0, wide=0.0))
    monkeypatch.setattr(confidence, "_COLOURS", ColourSettings(**dict.fromkeys(SHARES, 0.0)))
    model = confident(resize=resize, size=(48, 96), diameter=20.0)
    image = drawn_image(60, 80)
    labels = np.where(image[..., 0] > 250, 1, 0)  # so that both can be compared
    source = LabelledImage("x", image, labels.astype(np.uint16), np.zeros((1, 2)), np.array([25.0]), "")
    seen, _ = model.network_image(image, diameter=None if resize == "squeeze" else 25.0)
    expected = seen[:, :] if resize == "squeeze" else resize_image(image.astype(np.float32), (48, 64))
    expected_labels = resize_labels(labels.astype(np.uint16), expected.shape[:2])
    found = set()
    for seed in range(12):
        shown, part = confidence._view(model, source, np.random.default_rng(seed))
        shown = shown.permute(1, 2, 0).numpy()
        turned = [
            (turns, flip)
            for turns in range(4)
            for flip in (1, -1)
            if np.rot90(expected, turns).shape == shown.shape
            and np.allclose(np.rot90(expected, turns)[:, ::flip], shown, atol=0.01)
            and (np.rot90(expected_labels, turns)[:, ::flip] == part).all()
        ]
        assert len(turned) == 1
        found.add(turned[0])
    assert len(found) > 4


SHARES = ("inversion", "grey", "tint", "permutation", "stain", "dyes", "haematoxylin", "section", "levels")
SHARES += ("illumination", "blur", "noise")


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

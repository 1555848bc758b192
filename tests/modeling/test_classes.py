"""Classes: the head against plain loops, its loss, and that one class changes nothing."""

import dataclasses

import pytest
import torch
from builders import tiny_network
from torch.nn.functional import cross_entropy

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.inference.ensemble import join_cells
from kg_detectron.modeling import ClassSettings, SegmentationBranch
from kg_detectron.modeling.classes import ClassHead, class_weights, masked_mean

THREE = ("round", "dark", "long")


def image(height: int, width: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()


def test_one_class_is_no_head_and_the_same_weights_and_outputs():
    """With one class, whatever its name, nothing is added and nothing is computed otherwise."""
    plain, named = tiny_network().eval(), tiny_network(names=("nucleus",)).eval()
    several = tiny_network(names=THREE).eval()
    assert plain.state_dict().keys() == named.state_dict().keys()
    added = several.state_dict().keys() - plain.state_dict().keys()
    assert added and all(name.startswith("segmentation.class_head.") for name in added)
    # Of the same seed, the weights that both have are the same, and so are boxes, scores and masks.
    for name, value in plain.state_dict().items():
        assert torch.equal(value, several.state_dict()[name])
    cells, of_several = predict(plain, image(64, 96)), predict(several, image(64, 96))
    assert len(cells) > 5 and (cells.labels == 1).all() and len(set(of_several.labels.tolist())) > 1
    assert torch.equal(cells.boxes, of_several.boxes) and torch.equal(cells.scores, of_several.scores)
    assert all(map(torch.equal, cells.masks.crops, of_several.masks.crops))


def test_class_features_equal_those_of_one_crop_at_a_time():
    torch.manual_seed(0)
    branch = SegmentationBranch((6, 8, 8), (6, 8), classes=ClassSettings(THREE))
    torch.nn.init.normal_(branch.predict.weight)
    maps = [torch.randn(2, channels, 40 // 2**i, 48 // 2**i) for i, channels in enumerate((6, 8, 8))]
    boxes = [torch.tensor([[0.0, 0, 48, 40], [3, 4, 4, 5], [5, 5, 20, 11]]), torch.tensor([[7.0, 2, 30, 33]])]
    expected = [
        branch.classify_crop([feature[n] for feature in maps], box) for n, some in enumerate(boxes) for box in some
    ]
    torch.testing.assert_close(branch.crops(maps, boxes).class_logits, torch.stack(expected), atol=1e-5, rtol=1e-5)
    empty = branch.crops(maps, [torch.zeros(0, 4)] * 2).class_logits
    assert empty.shape == (0, 3)


def test_neighbours_do_not_vote():
    """The mean is over the mask alone, by plain loops; a mask without any pixel gives zeros."""
    features = torch.randn(12, 4)
    probability = torch.tensor([1.0, 0.5, 0, 0, 1, 1, 1, 0.25, 0, 0, 0, 0])
    crop = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    mean = masked_mean(features, probability, crop, 3)
    torch.testing.assert_close(mean[0], (features[0] + 0.5 * features[1]) / 1.5)
    torch.testing.assert_close(mean[1], (features[4:7].sum(0) + 0.25 * features[7]) / 3.25)
    assert not mean[2].any()
    features[[2, 3]] = 1e6  # of a neighbour
    torch.testing.assert_close(masked_mean(features, probability, crop, 3), mean)


def test_the_loss_is_balanced_by_the_effective_number_of_cells():
    counts, beta = [900, 90, 0, 10], 0.99
    weights = class_weights(counts, beta)
    plain = [(1 - beta) / (1 - beta**n) if n else 0.0 for n in counts]
    mean = sum(n * w for n, w in zip(counts, plain, strict=True)) / sum(counts)
    torch.testing.assert_close(weights, torch.tensor([w / mean for w in plain]))
    assert class_weights([5, 5], 0.9).tolist() == [1, 1] and class_weights([3, 900], 0).tolist() == [1, 1]

    head = ClassHead(4, ClassSettings(("a", "b", "c", "d"), (), 2.0, tuple(counts), beta))
    logits, labels = torch.randn(30, 4), torch.randint(0, 5, (30,))
    labels[labels == 3] = 0
    total = sum(float(weights[n - 1]) * float(cross_entropy(row, n - 1)) for row, n in zip(logits, labels) if n)  # noqa: B905
    divisor = max(1.0, sum(float(weights[n - 1]) for n in labels if n))
    assert float(head.loss(logits, labels)) == pytest.approx(2 * total / divisor, rel=1e-5)


@pytest.mark.parametrize("labels", [[], [0, 0]])
def test_without_any_known_class_the_loss_is_zero_and_all_weights_take_part(labels):
    model = tiny_network(names=THREE, box_jitter=0.1, cells_per_image=1)
    boxes = torch.tensor([[2.0, 2, 20, 20], [30, 10, 60, 50]])[: len(labels)]
    masks = torch.zeros(len(labels), 64, 96, dtype=torch.bool)
    masks[:, 10:20, 2:60] = True
    target = {"boxes": boxes, "masks": masks, "labels": torch.tensor(labels, dtype=torch.long)}
    losses = model([torch.rand(3, 64, 96) * 255], [target])
    assert not losses["loss_class"].detach() and all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.segmentation.class_head.parameters())


def test_labels_of_the_drawn_cells_stay_with_them():
    """What is drawn of an image keeps its class: a head whose weights know nothing learns the right one."""
    torch.manual_seed(0)
    branch = SegmentationBranch((6, 8, 8), (6, 8), classes=ClassSettings(("a", "b")))
    branch.settings = dataclasses.replace(branch.settings, cells_per_image=1, box_jitter=0.1)
    maps = [torch.randn(1, channels, 40 // 2**i, 48 // 2**i) for i, channels in enumerate((6, 8, 8))]
    for level in maps:
        level[..., : level.shape[3] // 2] += 2  # the cell on the left looks otherwise than that on the right
    boxes = [torch.tensor([[2.0, 4, 20, 30], [26, 4, 46, 30]])]
    masks = torch.zeros(2, 40, 48, dtype=torch.bool)
    masks[0, 4:30, 2:20] = masks[1, 4:30, 26:46] = True
    optimizer = torch.optim.Adam(branch.parameters(), 0.02)
    for _ in range(20):
        loss = branch.losses(maps, boxes, [masks], [torch.tensor([2, 1])])["loss_class"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (cells,) = branch.predict_cells(maps, boxes, [(40, 48)])
    assert cells.labels.tolist() == [2, 1]


def test_targets_need_classes_that_exist():
    model = tiny_network(names=THREE)
    target = {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "masks": torch.ones(1, 64, 96, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\]: expected integers \(1,\), got None"):
        model([torch.rand(3, 64, 96)], [target])
    with pytest.raises(ValueError, match=r"expected classes of 0..3, got \[4\]"):
        model([torch.rand(3, 64, 96)], [target | {"labels": torch.tensor([4])}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": ()}, "names: expected different names of classes"),
        ({"names": ("a", "a")}, "names: expected different names of classes"),
        ({"names": ("a", " ")}, "names"),
        ({"names": ("a", "b"), "colours": ("#000000",)}, "colours: expected none or 2 colours"),
        ({"colours": ("red",)}, "colours: expected colours such as #56b4e9"),
        ({"cells_of_class": (-1,)}, "cells_of_class"),
        ({"class_balance": 1.0}, "class_balance"),
        ({"class_weight": -1.0}, "class_weight"),
    ],
)
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ClassSettings(**values)


def test_tiles_give_the_classes_of_the_whole_image():
    model = tiny_network(names=THREE, resize="isotropic", norm="FrozenBN").eval()
    pixels = image(96, 128)
    whole = predict(model, pixels, scale=1.0, tile=128)
    tiled = predict(model, pixels, scale=1.0, tile=64, overlap=64)
    assert len(whole) > 10 and len(set(whole.labels.tolist())) > 1
    boxes = {tuple(box): label for box, label in zip(whole.boxes.round().tolist(), whole.labels.tolist(), strict=True)}
    pairs = [
        (boxes[tuple(box)], label)
        for box, label in zip(tiled.boxes.round().tolist(), tiled.labels.tolist(), strict=True)
        if tuple(box) in boxes
    ]
    assert len(pairs) > 0.95 * len(whole) and all(a == b for a, b in pairs)


def test_a_model_file_keeps_names_and_colours(tmp_path):
    model = tiny_network(names=THREE, colours=("#ff0000", "#00ff00", "#0000ff"), cells_of_class=(5, 3, 0)).eval()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.classes == model.classes and loaded.classes.names == THREE
    assert loaded.classes.shown_colours() == ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert predict(loaded, image(64, 96)).labels.tolist() == predict(model, image(64, 96)).labels.tolist()


def test_mirror_images_vote_on_the_class():
    masks = MaskCrops([torch.ones(10, 12)], torch.tensor([[3, 4, 15, 14]]), (20, 30))
    cells = Cells(masks.windows.float(), torch.ones(1), torch.ones(1, dtype=torch.long), masks)
    versions = [
        dataclasses.replace(cells, labels=torch.tensor([label]), scores=torch.tensor([score]))
        for label, score in ((3, 0.9), (2, 0.5), (2, 0.5), (1, 0.1))
    ]
    assert join_cells(versions).labels.tolist() == [2]

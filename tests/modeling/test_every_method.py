"""What every method on the shared trunk does: it trains, goes through a model file, predicts, and can learn."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from builders import TINY, nuclei_example, train
from torchvision.ops import box_iou

from kg_detectron.cells.run_lengths import encode_mask
from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.metrics import PaperMetrics
from kg_detectron.modeling import (
    BackboneSettings,
    ClassSettings,
    InstanceNet,
    Preprocessing,
    TrunkSettings,
    method_class,
)
from kg_detectron.modeling.classes import ClassBalance
from kg_detectron.modeling.label_maps import label_maps
from kg_detectron.modeling.settings import from_plain
from kg_detectron.training.augmentation import GeometrySettings
from kg_detectron.training.dataset import labelled_image
from kg_detectron.training.run import TrainSettings, balance_classes, starting_model
from kg_detectron.training.run import train as training_run

# By name, the settings that make them small.
METHODS: dict[str, dict[str, Any]] = {
    "stardist": {"heads": {"channels": 32}},
    "dcan": {},
    "cornernet": {"heads": {"channels": 32, "scale": 2}},
    "cosine_embedding": {"heads": {"foreground": "learned"}},
    "fcis": {"heads": {"channels": 32, "scale": 2}, "proposals": {"proposals": 200, "training_proposals": 200}},
}
# Which AP an overfitted network must reach.
LEARNS: dict[str, str] = {"cornernet": "box_ap"}
# Those that tell classes apart, and the weights that are of the classes.
WITH_CLASSES = {
    "stardist": r"heads\.class_head\..*",
    "cornernet": r"heads\.heatmap\.[01]\.2\..*",
}
THREE = ("round", "dark", "long")


def small(name: str, size: int = 64, width: int = 1, classes: tuple[str, ...] = ()) -> InstanceNet:
    """A method with few channels on ResNet-18, in training mode."""
    torch.manual_seed(0)
    method = method_class(name)
    shared = {
        "preprocessing": Preprocessing(size=(size, size)),
        "backbone": BackboneSettings("resnet18", c0_channels=4 * width),
        "trunk": TrunkSettings(widths=tuple(width * w for w in TINY["widths"])),
    }
    if classes:
        shared["classes"] = ClassSettings(classes)
    settings = from_plain(method.Settings, METHODS[name])
    return method.build(type(settings)(**{**vars(settings), **shared}))


def example(seed: int, side: int = 64, count: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return nuclei_example(np.random.default_rng(seed), side, count)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_parameters(name):
    model = small(name)
    images, targets = zip(example(0), example(1), strict=True)
    losses = model(list(images), list(targets))
    assert all(name.startswith("loss_") and value.isfinite() and value.dim() == 0 for name, value in losses.items())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A ReLU of a few channels may be dead at the start: its weights, not a whole module.
    assert len(without) <= 2, without


@pytest.mark.parametrize("name", METHODS)
def test_images_without_cells_train(name):
    model = small(name)
    image, target = example(0)
    empty = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 64, 64, dtype=torch.bool)}
    for targets in ([empty, empty], [target, empty]):
        losses = model([image, image], targets)
        total = sum(losses.values())
        total.backward()
        assert total.isfinite()


@pytest.mark.parametrize("name", METHODS)
def test_a_model_file_gives_the_same_cells(name, tmp_path):
    model = small(name)
    train(model, lambda: example(2), steps=3)
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors", channels_last=False)
    assert type(again) is type(model) and again.settings == model.settings
    image = example(3, side=50)[0].permute(1, 2, 0).byte().numpy()
    cells, same = predict(model, image), predict(again, image)
    assert cells.size == (50, 50) and (cells.scores.diff() <= 0).all()
    assert ((cells.scores >= 0) & (cells.scores <= 1)).all()
    assert torch.equal(cells.boxes, same.boxes) and torch.equal(cells.scores, same.scores)
    assert cells.masks.rle() == same.masks.rle()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_it_overfits_two_drawn_images(name):
    model = small(name, width=4)
    examples = [example(seed, count=6) for seed in (10, 11)]
    order = iter(range(10**6))
    train(model, lambda: examples[next(order) % 2], steps=150, rate=3e-3, decay=True)
    metrics = PaperMetrics()
    for image, target in examples:
        cells = predict(model, image.permute(1, 2, 0).byte().numpy())
        truth = [mask.numpy() for mask in target["masks"]]
        rles = [encode_mask(mask) for mask in truth]
        metrics.update(
            target["boxes"].double().numpy(),
            rles,
            cells.boxes.double().numpy(),
            cells.scores.numpy(),
            cells.masks.rle(),
        )
    assert metrics.compute()["0.5"][LEARNS.get(name, "mask_ap")] > 0.8, metrics.compute()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_with_the_core_alone(name, tmp_path):
    model = small(name).with_preprocessing(resize="isotropic", diameter=14.0)
    images = []
    for seed in range(3):
        image, target = example(seed)
        labels = label_maps([target["masks"]], (64, 64))[0].numpy()
        images.append(labelled_image(str(seed), image.permute(1, 2, 0).byte().numpy(), labels, model.preprocessing))
    budget = TrainSettings(minutes=None, iterations=2, batch_size=2)
    figures = training_run(model, images, images, tmp_path, budget, geometry=GeometrySettings(window=64), log=str)
    assert figures is not None and figures.positives > 0
    assert load_model(tmp_path / "model.safetensors").preprocessing.resize == "isotropic"


def classified(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An example whose cells are of two classes: grey ones, and those that are as dark as the ground is bright."""
    image, target = example(seed)
    labels = torch.arange(len(target["boxes"])) % 2 + 1
    dark = target["masks"][labels == 2].any(0)
    image = torch.where(dark, 120 - 0.4 * image, 120 + 0.5 * image)
    return image, target | {"labels": labels}


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_one_class_is_the_same_and_several_begin_with_its_weights(name, tmp_path):
    plain, named, several = (small(name, classes=names) for names in ((), ("nucleus",), THREE))
    assert all(map(torch.equal, plain.state_dict().values(), named.state_dict().values()))
    assert plain.state_dict().keys() == named.state_dict().keys()
    save_model(plain.eval(), tmp_path / "one.safetensors")
    adapted = starting_model(str(tmp_path / "one.safetensors"), classes=THREE)
    assert adapted.classes.names == THREE and adapted.state_dict().keys() == several.state_dict().keys()
    weights = plain.state_dict()
    new = [
        key for key, value in adapted.state_dict().items() if key not in weights or value.shape != weights[key].shape
    ]
    assert new and all(re.fullmatch(WITH_CLASSES[name], key) for key in new)
    for key, value in adapted.state_dict().items():
        assert key in new or torch.equal(value, weights[key])
    save_model(adapted.eval(), tmp_path / "three.safetensors")
    known = starting_model(str(tmp_path / "three.safetensors"), classes=("long", "round"))
    assert known.classes.names == THREE
    assert all(map(torch.equal, known.state_dict().values(), adapted.state_dict().values()))
    other = starting_model(str(tmp_path / "three.safetensors"), classes=("a", "b", "c"))  # as many, but others
    changed = [k for k, value in other.state_dict().items() if not torch.equal(value, adapted.state_dict()[k])]
    assert changed and all(re.fullmatch(WITH_CLASSES[name], key) for key in changed)


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_cells_without_a_class_and_classes_without_cells_train(name):
    model = small(name, classes=THREE)
    image, target = example(0)
    source = labelled_image("a", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int), model.preprocessing)
    balance_classes(model, [dataclasses.replace(source, classes=np.array([1, 1, 1, 2]))])
    for labels in ([0] * 5, [1, 0, 2, 2, 0]):
        model.zero_grad()
        labelled = target | {"labels": torch.tensor(labels)}
        empty = {
            "boxes": torch.zeros(0, 4),
            "masks": torch.zeros(0, 64, 64, dtype=torch.bool),
            "labels": torch.zeros(0),
        }
        losses = model([image, image], [labelled, empty | {"labels": torch.zeros(0, dtype=torch.long)}])
        total = sum(losses.values())
        total.backward()
        assert total.isfinite() and all(p.grad is not None for key, p in model.named_parameters() if p.requires_grad)
    balanced = [m for m in model.modules() if isinstance(m, ClassBalance)]
    assert [m.settings.cells_of_class for m in balanced] == [(3, 1, 0)] == [model.classes.cells_of_class]
    assert balanced[0].weights[2] == 0 and balanced[0].weights[1] > balanced[0].weights[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CLASSES)
def test_it_learns_classes(name):
    model = small(name, width=2, classes=("grey", "dark"))
    image, target = classified(10)
    train(model, lambda: (image, target), steps=60, rate=4e-3, batch_size=1, decay=True)
    cells = predict(model, image.permute(1, 2, 0).round().byte().numpy())
    overlap = box_iou(target["boxes"], cells.boxes)
    best = overlap.argmax(1)
    matched = overlap.amax(1) > 0.5
    assert matched.sum() >= 3 and set(target["labels"][matched].tolist()) == {1, 2}
    assert torch.equal(cells.labels[best][matched], target["labels"][matched])

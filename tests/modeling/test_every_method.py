"""What every method on the shared trunk does: it trains, goes through a model file, predicts, and can learn."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import TINY, nuclei_example, train

from kg_detectron.cells.run_lengths import encode_mask
from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.metrics import PaperMetrics
from kg_detectron.modeling import BackboneSettings, InstanceNet, Preprocessing, TrunkSettings, method_class
from kg_detectron.modeling.label_maps import label_maps
from kg_detectron.modeling.settings import from_plain
from kg_detectron.training.augmentation import GeometrySettings
from kg_detectron.training.dataset import labelled_image
from kg_detectron.training.run import TrainSettings
from kg_detectron.training.run import train as training_run

# By name, the settings that make them small.
METHODS: dict[str, dict[str, Any]] = {
    "stardist": {"heads": {"channels": 32}},
    "dcan": {},
    "cornernet": {"heads": {"channels": 32, "scale": 2}},
    "cosine_embedding": {"heads": {"foreground": "learned"}},
}
# Which AP an overfitted network must reach.
LEARNS: dict[str, str] = {"cornernet": "box_ap"}


def small(name: str, size: int = 64, width: int = 1) -> InstanceNet:
    """A method with few channels on ResNet-18, in training mode."""
    torch.manual_seed(0)
    method = method_class(name)
    shared = {
        "preprocessing": Preprocessing(size=(size, size)),
        "backbone": BackboneSettings("resnet18", c0_channels=4 * width),
        "trunk": TrunkSettings(widths=tuple(width * w for w in TINY["widths"])),
    }
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
    again = load_model(tmp_path / "model.safetensors")
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

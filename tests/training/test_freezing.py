"""Layers that a training leaves as they are."""

from pathlib import Path

import pytest
import torch
from builders import SMALL, labelled, tiny_network, training_network

from kg_detectron.inference import load_model
from kg_detectron.training.freezing import freeze
from kg_detectron.training.run import TrainSettings, train


@pytest.mark.parametrize("maps", [0, 1, 2, 3, 4])
def test_exactly_the_layers_of_the_first_maps_are_frozen(maps: int):
    """A weight is frozen if and only if one of the first maps changes with it."""
    model = tiny_network().eval()
    freeze(model, maps)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.backbone.deep_features(image)[:maps]
        for name, parameter in model.backbone.named_parameters():
            old = parameter.clone()
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
            after = model.backbone.deep_features(image)[:maps]
            changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            parameter.copy_(old)
            assert changed == (not parameter.requires_grad), name


def test_a_training_changes_the_rest_alone(tmp_path: Path):
    model = training_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = labelled(model, 4)
    settings = TrainSettings(minutes=None, iterations=2, batch_size=1, validations=0, freeze=2)
    assert train(model, images, images, tmp_path, settings, geometry=SMALL) is not None
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked") or not value.is_floating_point():
            continue
        frozen = name.startswith(("backbone.conv1.", "backbone.bn1.", "backbone.layer1."))
        if frozen:
            assert torch.equal(value, before[name]), name
    moved = ("backbone.layer2.0.conv1.weight", "backbone.layer2.0.bn1.running_mean")
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in moved)


def test_the_kept_model_can_be_frozen():
    model = load_model("nuclei")
    count = freeze(model, 4)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert 2e6 < count < sum(parameter.numel() for parameter in model.parameters())
    assert any(name.startswith("backbone.c0_conv") for name in learning)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"freeze: expected a number of 0\.\.4, got 5"):
        TrainSettings(freeze=5)
    with pytest.raises(ValueError, match="freeze: expected a number"):
        freeze(tiny_network(), -1)

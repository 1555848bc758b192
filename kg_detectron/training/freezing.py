"""Layers of the backbone that a training leaves as they are."""

from typing import Any

import torch
from torch import nn

from kg_detectron.io.setting import SettingError
from kg_detectron.modeling import InstanceNet

_PROBE = 64  # pixels of the side of an image on which the layers of a map are found


def freeze(model: InstanceNet, maps: int) -> int:
    """Leave the layers that the first maps of the backbone depend on as they are, in place: c1, .. of c1..c4.

    Neither their weights nor the statistics of their norm layers change, and their gradients are not computed. The maps
    of the image itself, c0, always learn.

    Args:
        model: with a backbone.
        maps: how many, 0..4; 4 is all of the backbone but c0.

    Returns:
        The number of parameters that no longer learn.

    Raises:
        ValueError: another number, or a model without a backbone.
    """
    if not 0 <= maps <= 4:
        raise SettingError("freeze", f"expected a number of 0..4, got {maps}")
    if not maps:
        return 0
    backbone: Any = getattr(model, "backbone", None)
    if backbone is None:
        raise SettingError("freeze", f"the method {model.method} has no backbone")
    training = model.training
    model.eval()  # the statistics of norm layers stay
    with torch.enable_grad():
        image = model.place.new_zeros((1, 3, _PROBE, _PROBE))
        torch.stack([values.sum() for values in backbone.deep_features(image)[:maps]]).sum().backward()
    frozen = [parameter for parameter in backbone.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    model.train(training)
    for parameter in frozen:
        parameter.requires_grad_(False)
    known = set(map(id, frozen))
    for layer in backbone.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and id(layer.weight) in known:
            layer.register_forward_pre_hook(_as_in_evaluation)
    return sum(parameter.numel() for parameter in frozen)


def _as_in_evaluation(layer: nn.Module, _: Any) -> None:
    """A training puts all layers into training mode; these go back before they are called."""
    layer.eval()

"""Backbones of the package timm, by the name ``timm/NAME``: any of its networks with maps at strides 2, 4, 8, 16.

N: images; H, W: height and width in pixels.
"""

import importlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.modeling.backbone import (
    STRIDES,
    BackboneSettings,
    image_convolutions,
    image_features,
    register_backbone,
)
from kg_detectron.modeling.settings import require

PREFIX = "timm/"
EXTRA = 'pip install "kg_detectron[timm]"'
# Weights that timm looks for itself: on the hub, unless it has them already.
HUB = "hub"
_PROBE = 64  # pixels of the side of an image that is sent through a new network


class TimmBackbone(nn.Module):
    """Feature maps c0..c4 of an image.

    c0 is two convolutions on the image, as in `ResNetC4`; c1..c4 are the maps of the network at strides 2, 4, 8, 16.
    Its deeper layers are left out. What a value depends on is not known: many of timm's networks look at the whole
    image (squeeze and excitation, attention).

    Args:
        name: of the network in timm.
        c0_channels: channels of c0.
        weights: "hub", a file of the whole network's weights (``.safetensors`` or a PyTorch checkpoint, read as data
            only), or "" for random ones. They are for RGB; the first convolution is flipped to BGR.

    Raises:
        ModuleNotFoundError: timm is not installed, or what it needs to ask the hub.
        FileNotFoundError: there is no such file of weights.
        ValueError: timm has no network of that name, or the network has no maps at these strides; weights that do not
            fit.
    """

    divisor = 32
    receptive_radius = None

    def __init__(self, name: str, c0_channels: int = 64, weights: str = "") -> None:
        super().__init__()
        try:
            timm: Any = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"backbone {PREFIX}{name} needs the package timm: {EXTRA}") from error
        # Names of timm's own networks alone: it also takes places to download from.
        require(timm.is_model(name) and ":" not in name, "backbone", f"{PREFIX} and a network of timm", PREFIX + name)
        strides = timm.create_model(name, features_only=True).feature_info.reduction()
        wanted = STRIDES[1:]
        expected = f"a network with maps at strides {', '.join(map(str, wanted))}"
        require(set(wanted) <= set(strides), "backbone", expected, f"{PREFIX}{name}, which has {strides}")
        options: dict[str, Any] = {"features_only": True, "out_indices": [strides.index(stride) for stride in wanted]}
        if weights == HUB:
            options["pretrained"] = True
        elif weights:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _read_weights(weights)}}
        try:
            self.body: Any = timm.create_model(name, **options)
        except (KeyError, RuntimeError) as error:
            if not weights:
                raise
            raise ValueError(f"backbone_weights: {weights} does not fit {PREFIX}{name}: {error}") from error
        if weights:
            first = next(m for m in self.body.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
            with torch.no_grad():
                first.weight.copy_(first.weight.flip(1))
        _leave_out_what_is_unused(self.body)
        self.c0_conv = image_convolutions(c0_channels)
        self.channels = (c0_channels, *self.body.feature_info.channels())

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W), H and W multiples of 32 -> [c0, c1, c2, c3, c4] at strides 1, 2, 4, 8, 16."""
        return [self.image_features(image), *self.deep_features(image)]

    def image_features(self, image: Tensor) -> Tensor:
        """c0."""
        return image_features(self.c0_conv, image)

    def deep_features(self, image: Tensor) -> list[Tensor]:
        """[c1, c2, c3, c4]."""
        return list(self.body(image))


def _leave_out_what_is_unused(body: nn.Module) -> None:
    """Drop the last stages where no map comes from them; freeze other parameters that the maps do not depend on.

    Training in several processes needs a gradient of every parameter that learns.
    """
    training = body.training
    body.eval()  # the statistics of norm layers stay
    image = next(body.parameters()).new_zeros((1, 3, _PROBE, _PROBE))
    with torch.enable_grad():
        sum((values.sum() for values in body(image)), image.new_zeros(())).backward()
    for stages in [child for child in body.children() if isinstance(child, nn.Sequential)]:
        while len(stages) and all(value.grad is None for value in stages[-1].parameters()):
            del stages[-1]
    for parameter in body.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    body.train(training)


def _read_weights(file: str) -> dict[str, Tensor]:
    """Weights by name, as data only."""
    if Path(file).suffix != ".safetensors":
        return read_checkpoint(file)
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read as weights: {error}") from error


@register_backbone(PREFIX)
def _build(settings: BackboneSettings) -> TimmBackbone:
    """The norm layers are the network's own."""
    require(settings.norm == "BN", "norm", "BN, for timm's networks have their own norm layers", settings.norm)
    return TimmBackbone(settings.backbone.removeprefix(PREFIX), settings.c0_channels, settings.backbone_weights)

"""Backbones: feature maps c0..c4 of an image, at strides 1, 2, 4, 8, 16 (paper, figure 1).

A backbone is a module with the attributes of `Backbone`, registered by name in `BACKBONES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor, nn

from kg_detectron.modeling.bands import in_bands
from kg_detectron.modeling.settings import require

STRIDES = (1, 2, 4, 8, 16)  # of c0..c4
FEATURES = ("c0", "c1", "c2", "c3", "c4")


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 2), channels)


def _frozen_batch_norm(channels: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": _frozen_batch_norm,
    "SyncBN": nn.SyncBatchNorm,
    "GN": _group_norm,
}


class Backbone(Protocol):
    """What every backbone has.

    Attributes:
        channels: of c0..c4.
        divisor: the sides of its input are multiples of it.
        receptive_radius: of c0..c4, input pixels to every side on which a value depends; None where that is not known,
            and images larger than a tile are refused. Group normalisation, whose statistics are those of the whole
            image, is not counted.
    """

    channels: tuple[int, ...]
    divisor: int
    receptive_radius: tuple[int, ...] | None

    def __call__(self, image: Tensor) -> list[Tensor]:
        """(N, 3, h, w) -> [c0, c1, c2, c3, c4]."""

    def image_features(self, image: Tensor) -> Tensor:
        """c0 alone, the largest of the maps: tiles need it on a smaller window than the others."""

    def deep_features(self, image: Tensor) -> list[Tensor]:
        """[c1, c2, c3, c4]."""


@dataclass(frozen=True)
class BackboneSettings:
    """Settings of the backbone (the paper's by default).

    Attributes:
        backbone: name in `BACKBONES`, such as "resnet50", or "timm/" and the name of a network of timm.
        norm: norm layer, of `NORMS`; the light trunk has the same.
        backbone_weights: initial weights, by the name that the backbone's package gives them, such as "IMAGENET1K_V1";
            "" for random ones. Model files leave it out.
        c0_channels: channels of c0, the two convolutions on the image itself.
        backbone_lr_factor: the backbone learns at this factor of the learning rate.

    Raises:
        ValueError: a value that does not exist.
    """

    NODE: ClassVar[str] = "MODEL.CELLS"

    backbone: str = "resnet50"
    norm: str = "BN"
    backbone_weights: str = field(default="", metadata={"initial": True})
    c0_channels: int = 64
    backbone_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        require(
            _builder(self.backbone) is not None, "backbone", f"one of {', '.join(sorted(BACKBONES))}", self.backbone
        )
        require(self.norm in NORMS, "norm", f"one of {', '.join(sorted(NORMS))}", self.norm)
        require(self.c0_channels >= 1, "c0_channels", "1 or more", self.c0_channels)
        require(self.backbone_lr_factor >= 0, "backbone_lr_factor", "0 or more", self.backbone_lr_factor)


BACKBONES: dict[str, Callable[[BackboneSettings], nn.Module]] = {}


def register_backbone(name: str) -> Callable[[Callable[[BackboneSettings], nn.Module]], Callable]:
    """Decorator: make a builder of a backbone, called with `BackboneSettings`, known under a name.

    A name that ends in "/" stands for all names that begin with it.
    """

    def register(build: Callable[[BackboneSettings], nn.Module]) -> Callable:
        BACKBONES[name] = build
        return build

    return register


def _builder(name: str) -> Callable[[BackboneSettings], nn.Module] | None:
    return BACKBONES.get(name) or BACKBONES.get(name.partition("/")[0] + "/")


def build_backbone(settings: BackboneSettings) -> nn.Module:
    """The backbone of a name, with its initial weights if it has any."""
    build = _builder(settings.backbone)
    assert build is not None  # which the settings have checked
    return build(settings)


def image_convolutions(channels: int) -> nn.Sequential:
    """The two convolutions on the image itself that give c0: conv3x3, ReLU, conv3x3, ReLU."""
    first, second = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
    for layer in (first, second):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        zero_bias(layer)
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))


def may_be_pretrained(parameter: str) -> bool:
    """Whether a parameter of a model, by its name, is of the layers that `backbone_weights` fill: all but c0's."""
    return "backbone." in parameter and "c0_conv" not in parameter and ".fpn_" not in parameter


def image_features(convolutions: nn.Sequential, image: Tensor) -> Tensor:
    """c0 of an image (N, 3, h, w) by its `image_convolutions`."""
    radius, channels = receptive_radius(convolutions), len(convolutions[0].get_parameter("weight"))
    return in_bands(convolutions, image, channels=channels, before=radius, after=radius)


def zero_bias(layer: nn.Conv2d) -> None:
    """Set the bias of a convolution that has one to zeros (in place)."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ResNetC4(nn.Module):
    """torchvision's ResNet up to conv4, and two convolutions on the image itself.

    Args:
        depth: 18, 34 or 50.
        norm: a key of `NORMS`.
        c0_channels: channels of c0.
        weights: member of torchvision's weight enum of that depth, such as ``"IMAGENET1K_V1"``, or None for random.

    Raises:
        ValueError: a depth, norm or weights name that does not exist.
    """

    divisor = STRIDES[-1]

    def __init__(self, depth: int = 50, norm: str = "BN", c0_channels: int = 64, weights: str | None = None) -> None:
        from torchvision.models import get_model_weights, resnet  # takes seconds, and the kept models need none of it

        super().__init__()
        builders = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50}
        require(depth in builders, "depth", f"one of {sorted(builders)}", depth)
        require(norm in NORMS, "norm", f"one of {sorted(NORMS)}", norm)
        body = builders[depth](norm_layer=NORMS[norm])
        self.conv1, self.bn1, self.relu, self.maxpool = body.conv1, body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3 = body.layer1, body.layer2, body.layer3
        self.c0_conv = image_convolutions(c0_channels)
        expansion = self.layer1[0].expansion
        self.channels = (c0_channels, 64, 64 * expansion, 128 * expansion, 256 * expansion)
        if weights:
            enum = get_model_weights(f"resnet{depth}")
            require(weights in enum.__members__, "weights", f"one of {sorted(enum.__members__)}", weights)
            self.load_resnet_weights(enum[weights].get_state_dict(progress=True, check_hash=True))

    def load_resnet_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Load a torchvision ResNet's weights by name; its conv5 and classifier have no place here.

        Raises:
            RuntimeError: a weight of conv1..conv4 is missing or has another shape.
        """
        body = {name: value for name, value in state_dict.items() if not name.startswith(("layer4.", "fc."))}
        c0 = {name: value for name, value in self.state_dict().items() if name.startswith("c0_conv.")}
        self.load_state_dict(body | c0)

    @property
    def receptive_radius(self) -> tuple[int, ...]:
        radii = [receptive_radius(self.c0_conv)]
        radius, stride = 0, 1
        for stage in ([self.conv1], [self.maxpool, self.layer1], [self.layer2], [self.layer3]):
            for name, layer in nn.ModuleList(stage).named_modules():
                if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and "downsample" not in name:  # the shortcut: 1x1
                    kernel, step = (v if isinstance(v, int) else v[0] for v in (layer.kernel_size, layer.stride))
                    radius += kernel // 2 * stride
                    stride *= step
            radii.append(radius)
        return tuple(radii)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, h, w), sides multiples of 16 -> [c0, c1, c2, c3, c4] at strides 1, 2, 4, 8, 16."""
        return [self.image_features(image), *self.deep_features(image)]

    def image_features(self, image: Tensor) -> Tensor:
        return image_features(self.c0_conv, image)

    def deep_features(self, image: Tensor) -> list[Tensor]:
        c1 = self.relu(self.bn1(self.conv1(image)))
        c2 = self.layer1(self.maxpool(c1))
        c3 = self.layer2(c2)
        return [c1, c2, c3, self.layer3(c3)]


def _resnet(depth: int) -> Callable[[BackboneSettings], nn.Module]:
    return lambda s: ResNetC4(depth, s.norm, s.c0_channels, s.backbone_weights or None)


for _depth in (18, 34, 50):
    register_backbone(f"resnet{_depth}")(_resnet(_depth))


def receptive_radius(module: nn.Module) -> int:
    """Receptive-field radius, in pixels, of the convolutions of a module, which follow each other at one stride."""
    return sum(layer.kernel_size[0] // 2 for layer in module.modules() if isinstance(layer, nn.Conv2d))

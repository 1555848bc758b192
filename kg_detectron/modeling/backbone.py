"""ResNet conv1..conv4 and the two convolutions on the image itself (paper, figure 1)."""

from collections.abc import Callable

import torchvision
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

STRIDES = (1, 2, 4, 8, 16)  # of c0..c4
SIZE_DIVISIBILITY = STRIDES[-1]

_RESNETS = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50}


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 2), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": _group_norm,
}


class ResNetC4(nn.Module):
    """Feature maps c0..c4 of an image.

    Args:
        depth: 18, 34 or 50.
        norm: a key of `NORMS`.
        c0_channels: channels of c0.
        weights: member of torchvision's weight enum of that depth, such as ``"IMAGENET1K_V1"``, or None for random.

    Raises:
        ValueError: for a depth, norm or weights name that does not exist.
    """

    def __init__(self, depth: int = 50, norm: str = "BN", c0_channels: int = 64, weights: str | None = None) -> None:
        super().__init__()
        if depth not in _RESNETS:
            raise ValueError(f"depth: expected one of {sorted(_RESNETS)}, got {depth}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {sorted(NORMS)}, got {norm!r}")
        body = _RESNETS[depth](norm_layer=NORMS[norm])
        self.conv1, self.bn1, self.relu, self.maxpool = body.conv1, body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3 = body.layer1, body.layer2, body.layer3
        self.c0_conv = nn.Sequential(
            nn.Conv2d(3, c0_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c0_channels, c0_channels, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        for layer in self.c0_conv[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        expansion = 4 if depth == 50 else 1
        self.channels = (c0_channels, 64, 64 * expansion, 128 * expansion, 256 * expansion)
        if weights:
            enum = torchvision.models.get_model_weights(f"resnet{depth}")
            if weights not in enum.__members__:
                raise ValueError(f"weights: expected one of {sorted(enum.__members__)}, got {weights!r}")
            self.load_resnet_weights(enum[weights].get_state_dict(progress=True, check_hash=True))

    def load_resnet_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Load a torchvision ResNet's weights by name; its conv5 and classifier have no place here.

        Raises:
            RuntimeError: where a weight of conv1..conv4 is missing or has another shape.
        """
        own = {name: value for name, value in state_dict.items() if not name.startswith(("layer4.", "fc."))}
        c0 = {name: value for name, value in self.state_dict().items() if name.startswith("c0_conv.")}
        self.load_state_dict(own | c0)

    @property
    def reach(self) -> tuple[int, ...]:
        """How far away, in input pixels to every side, a pixel still has a part in a value of each of c0..c4.

        Group normalisation, whose statistics are those of the whole image, is not counted.
        """
        reaches = [sum(layer.kernel_size[0] // 2 for layer in self.c0_conv[::2])]
        reach, stride = 0, 1
        for stage in ([self.conv1], [self.maxpool, self.layer1], [self.layer2], [self.layer3]):
            for name, layer in nn.ModuleList(stage).named_modules():
                if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and "downsample" not in name:  # the shortcut: 1x1
                    kernel, step = (v if isinstance(v, int) else v[0] for v in (layer.kernel_size, layer.stride))
                    reach += kernel // 2 * stride
                    stride *= step
            reaches.append(reach)
        return tuple(reaches)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N,3,H,W), H and W multiples of 16 -> [c0, c1, c2, c3, c4] at strides 1, 2, 4, 8, 16."""
        c0 = self.c0_conv(image)
        c1 = self.relu(self.bn1(self.conv1(image)))
        c2 = self.layer1(self.maxpool(c1))
        c3 = self.layer2(c2)
        return [c0, c1, c2, c3, self.layer3(c3)]


def pad_to_batch(images: list[Tensor]) -> Tensor:
    """Stack images (C,h,w) of any size into (N,C,H,W), zeros at the right and below, H and W multiples of 16."""
    side = [max(image.shape[d] for image in images) for d in (1, 2)]
    height, width = (-(-s // SIZE_DIVISIBILITY) * SIZE_DIVISIBILITY for s in side)
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for image, place in zip(images, batch, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch

"""A method from outside the package: the pixels that a tiny network takes for cells, in connected pieces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.modeling import InstanceNet, Preprocessing, register_method
from kg_detectron.modeling.instance_net import cells_of_image
from kg_detectron.modeling.settings import require


@dataclass(frozen=True)
class ForegroundSettings:
    """Settings of the network that finds the foreground.

    Attributes:
        channels: of the hidden layers.
        probability: from which a pixel belongs to a cell.
    """

    NODE: ClassVar[str] = "MODEL.TOY"

    channels: int = 8
    probability: float = 0.5

    def __post_init__(self) -> None:
        require(self.channels >= 1, "channels", "1 or more", self.channels)
        require(0 < self.probability < 1, "probability", "a probability between 0 and 1", self.probability)


@dataclass(frozen=True)
class ToySettings:
    """All settings of the method, part by part."""

    preprocessing: Preprocessing = Preprocessing()
    foreground: ForegroundSettings = ForegroundSettings()


@register_method("toy")
class ToyNet(InstanceNet):
    """Foreground by three convolutions; its connected pieces are the cells, their mean probability is the score."""

    Settings: ClassVar[type] = ToySettings
    divisor = 4

    def __init__(self, settings: ToySettings) -> None:
        super().__init__(settings)
        channels = settings.foreground.channels
        self.foreground = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 1, 1),
        )

    @classmethod
    def build(cls, settings: Any = None) -> "ToyNet":
        return cls(settings or ToySettings())

    def losses(self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
        logits = self.foreground(batch)[:, 0]
        target, inside = torch.zeros_like(logits), torch.zeros_like(logits)
        for i, cells in enumerate(masks):
            height, width = cells.shape[1:]
            target[i, :height, :width] = cells.any(0).to(logits)
            inside[i, :height, :width] = 1
        return {"loss_foreground": binary_cross_entropy_with_logits(logits, target, inside)}

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        probabilities = self.foreground(batch)[:, 0].float().sigmoid()
        return [
            self.pieces(image[:height, :width]) for image, (height, width) in zip(probabilities, sizes, strict=True)
        ]

    def pieces(self, probability: Tensor) -> Cells:
        """The cells of one image, from its (H, W) probabilities of foreground."""
        threshold = self.settings.foreground.probability
        labels, _ = ndimage.label((probability >= threshold).cpu().numpy())
        crops, windows, scores = [], [], []
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            piece = torch.from_numpy(labels[rows, columns] == number).to(probability.device)
            crops.append(probability[rows, columns] * piece)
            windows.append([columns.start, rows.start, columns.stop, rows.stop])
            scores.append(probability[rows, columns][piece].mean())
        places = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
        masks = MaskCrops(crops, places, tuple(probability.shape), threshold)
        falling, order = torch.tensor(scores).to(probability).sort(descending=True, stable=True)
        return cells_of_image(places.to(probability)[order], falling, masks[order])

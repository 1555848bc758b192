"""Classes of cells: their names, their weights in a loss, and the head that tells them apart by the features inside
each mask, which is ours.

Letters: R crops, M cells, K classes, C channels, P pixels. A class is a number of 1..K; 0 is a cell whose class nobody
has stated.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kg_detectron.cells.class_colours import class_colours
from kg_detectron.modeling.precision import for_losses
from kg_detectron.modeling.processes import loss_divisor
from kg_detectron.modeling.settings import require

# Hidden channels of the head.
_HIDDEN = 64


@dataclass(frozen=True)
class ClassSettings:
    """The classes of cells that a model tells apart. With one class there is no head, and no weight more.

    Attributes:
        names: of the classes 1..K.
        colours: of the classes in results, ``#rrggbb``; without any, those of `class_colours`.
        class_weight: weight of the class loss, which CornerNet has not; 0 or more.
        cells_of_class: cells of each class in the training data, which balance the loss, see `class_weights`; without
            any, all classes weigh the same.
        class_balance: the beta of `class_weights`, from 0 (no balancing) to below 1.

    Raises:
        ValueError: no name, an empty one or one that comes twice; colours or numbers that do not fit.
    """

    NODE: ClassVar[str] = "MODEL.CELLS.CLASSES"

    names: tuple[str, ...] = ("cell",)
    colours: tuple[str, ...] = ()
    class_weight: float = 1.0
    cells_of_class: tuple[int, ...] = ()
    class_balance: float = 0.999

    def __post_init__(self) -> None:
        named = len(self.names) > 0 and all(isinstance(name, str) and name.strip() for name in self.names)
        require(named and len(set(self.names)) == len(self.names), "names", "different names of classes", self.names)
        for name, kind in (("colours", "colours"), ("cells_of_class", "numbers")):
            values = getattr(self, name)
            require(len(values) in (0, len(self.names)), name, f"none or {len(self.names)} {kind}", values)
        require(all(map(_is_colour, self.colours)), "colours", "colours such as #56b4e9", self.colours)
        require(all(count >= 0 for count in self.cells_of_class), "cells_of_class", "0 or more", self.cells_of_class)
        require(self.class_weight >= 0, "class_weight", "0 or more", self.class_weight)
        require(0 <= self.class_balance < 1, "class_balance", "a number from 0 to below 1", self.class_balance)

    def __len__(self) -> int:
        return len(self.names)

    def shown_colours(self) -> tuple[tuple[int, int, int], ...]:
        """(red, green, blue) of each class, 0..255."""
        return class_colours(len(self), self.colours)


def _is_colour(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value) is not None


def class_weights(counts: Sequence[int], balance: float) -> Tensor:
    """The weight of each class in the loss, by the effective number of its cells (Cui et al., CVPR 2019).

    The weight of a class of n cells is (1 - beta) / (1 - beta^n), times a number that makes the mean weight over all
    cells 1. A class that does not occur weighs 0.

    Args:
        counts: K numbers of cells; none gives none.
        balance: beta.

    Returns:
        (K,) float32.
    """
    weights = [(1 - balance) / (1 - balance**count) if count else 0.0 for count in counts]
    total = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    mean = total / max(1, sum(counts))
    return torch.tensor([weight / mean if mean else 1.0 for weight in weights], dtype=torch.float32)


class ClassBalance(nn.Module):
    """The weight of each class in a loss, which is no part of a model file.

    Args:
        settings: see `ClassSettings`.

    Attributes:
        settings: as given.
        weights: (K,) see `class_weights`.
    """

    weights: Tensor

    def __init__(self, settings: ClassSettings) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(len(settings)), persistent=False)
        self.use(settings)

    def use(self, settings: ClassSettings) -> None:
        """Take other settings of the same classes, such as the numbers of cells of another training."""
        self.settings = settings
        weights = class_weights(settings.cells_of_class or [1] * len(settings), settings.class_balance)
        self.weights = weights.to(self.weights.device)


class ClassHead(ClassBalance):
    """Class logits of cells from the features that `masked_mean` gives of each.

    Args:
        channels: C of the features.
        settings: see `ClassSettings`; of two or more classes.
    """

    def __init__(self, channels: int, settings: ClassSettings) -> None:
        super().__init__(settings)
        self.layers = nn.Sequential(
            nn.Linear(channels, _HIDDEN), nn.ReLU(inplace=True), nn.Linear(_HIDDEN, len(settings))
        )

    def forward(self, features: Tensor) -> Tensor:
        """(R, C) -> logits (R, K)."""
        return self.layers(features)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weighted class-balanced cross entropy; cells of class 0 do not count, and without any other it is 0.

        It is the mean over the cells, each counting as much as its class weighs, see `class_weights`; the divisor is
        at least 1.

        Args:
            logits: (M, K).
            labels: (M,) int64, 0..K.
        """
        known = labels > 0
        of_cell = self.weights[(labels - 1).clamp(min=0)] * known
        total = (of_cell * cross_entropy(for_losses(logits), (labels - 1).clamp(min=0), reduction="none")).sum()
        return self.settings.class_weight * total / loss_divisor(of_cell.sum()[None])[0].to(total)


def masked_mean(features: Tensor, probability: Tensor, crop: Tensor, count: int) -> Tensor:
    """The mean of the features over each mask, every pixel counting by its probability: neighbours do not vote.

    Args:
        features: (P, C), the pixels of all crops.
        probability: (P,) of belonging to the mask.
        crop: (P,) int64, the crop of each pixel.
        count: R.

    Returns:
        (R, C), at least float32; zeros of a mask without any probability.
    """
    features = for_losses(features)
    weight = probability.to(features)
    total = features.new_zeros(count).index_add(0, crop, weight)
    summed = features.new_zeros(count, features.shape[1])
    return summed.index_add(0, crop, features * weight[:, None]) / total.clamp(min=1e-6)[:, None]

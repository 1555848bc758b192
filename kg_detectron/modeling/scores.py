"""What a score means: calibration to probabilities, and the threshold that belongs to a model."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kg_detectron.modeling.settings import require


@dataclass(frozen=True)
class Scores:
    """How the scores of a model become probabilities that a cell matches a true one at an IoU of 0.5.

    A monotone piecewise linear function of the score, fitted on validation data; without knots scores stay as they are.
    And what the size of the cell adds to the log odds of that: of two boxes with the same score the larger is right
    more often, for small ones may be fragments and debris.

    Attributes:
        raw: scores of the network at the knots, strictly rising.
        probability: calibrated probability at each knot, strictly rising, within 0..1.
        threshold: probability of the highest F1 on validation data; cells below it are left out by default.
        side: square roots of the areas of boxes, pixels of the network's input, strictly rising.
        log_odds: what is added at each side, rising; between them linearly in the logarithm of the side, and beyond
            them as at the ends.
        plain_threshold: as ``threshold``, of probabilities to which nothing is added; where there are sides.

    Raises:
        ValueError: knots that are not rising or of different number, or a threshold outside 0..1.
    """

    NODE: ClassVar[str] = "MODEL.CELLS.SCORES"

    raw: tuple[float, ...] = ()
    probability: tuple[float, ...] = ()
    threshold: float = 0.0
    side: tuple[float, ...] = ()
    log_odds: tuple[float, ...] = ()
    plain_threshold: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.raw) == len(self.probability), "probability", f"{len(self.raw)} knots", self.probability)
        require(len(self.raw) != 1, "raw", "no knot, or two and more", self.raw)
        for name in ("raw", "probability"):
            values = getattr(self, name)
            rising = all(a < b for a, b in zip(values, values[1:], strict=False))
            require(rising and all(0 <= v <= 1 for v in values), name, "rising numbers of 0..1", values)
        require(len(self.side) == len(self.log_odds), "log_odds", f"{len(self.side)} numbers", self.log_odds)
        require(len(self.side) != 1, "side", "no number, or two and more", self.side)
        rising = all(a < b for a, b in zip((0.0, *self.side), self.side, strict=False))
        require(rising, "side", "rising numbers above 0", self.side)
        rising = all(a <= b for a, b in zip(self.log_odds, self.log_odds[1:], strict=False))
        require(rising, "log_odds", "rising numbers", self.log_odds)
        for name in ("threshold", "plain_threshold"):
            require(0 <= getattr(self, name) <= 1, name, "a number of 0..1", getattr(self, name))

    @property
    def plain(self) -> "Scores":
        """The same without what sizes add."""
        return Scores(self.raw, self.probability, self.plain_threshold) if self.side else self

    def __call__(self, scores: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Raw scores (R,) -> probabilities (R,).

        Args:
            scores: of the network.
            boxes: (R, 4) xyxy, pixels of the network's input; needed where sizes count.

        Raises:
            ValueError: sizes count, and there are no boxes.
        """
        plain = self._plain(scores)
        if not self.side:
            return plain
        if boxes is None:
            raise ValueError("boxes: expected those of the scores, for these become probabilities by their sizes too")
        side = (boxes[:, 2:] - boxes[:, :2]).double().clamp(min=0).prod(1).sqrt()
        added = _interpolated(side.log(), tuple(map(math.log, self.side)), self.log_odds)
        return _with_log_odds(plain, added).to(scores)

    def at_most(self, scores: Tensor) -> Tensor:
        """The highest probabilities (R,) that cells of raw scores (R,) have, whatever their size."""
        plain = self._plain(scores)
        return _with_log_odds(plain, self.log_odds[-1]).to(scores) if self.side else plain

    def _plain(self, scores: Tensor) -> Tensor:
        return _interpolated(scores, self.raw, self.probability).to(scores) if self.raw else scores


def _interpolated(x: Tensor, knots: tuple[float, ...], values: tuple[float, ...]) -> Tensor:
    """The piecewise linear function with these values at the knots, in float64; beyond them that of the ends."""
    at = torch.tensor(knots, dtype=torch.float64, device=x.device)
    value = torch.tensor(values, dtype=torch.float64, device=x.device)
    x = x.double().clamp(float(knots[0]), float(knots[-1]))
    right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    part = (x - at[right - 1]) / (at[right] - at[right - 1])
    return value[right - 1] + part * (value[right] - value[right - 1])


def _with_log_odds(probability: Tensor, added: Tensor | float) -> Tensor:
    """Probabilities (R,) of certain and impossible cells stay as they are."""
    return torch.sigmoid(torch.logit(probability.double()) + added)

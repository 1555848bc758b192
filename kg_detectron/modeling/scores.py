"""What a score means: calibration to probabilities, and the threshold that belongs to a model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kg_detectron.modeling.settings import require


@dataclass(frozen=True)
class Scores:
    """How the scores of a model become probabilities that a cell matches a true one at an IoU of 0.5.

    A monotone piecewise linear function, fitted on validation data, so that the order of the cells stays. Without
    knots scores stay as they are.

    Attributes:
        raw: scores of the network at the knots, strictly rising.
        probability: calibrated probability at each knot, strictly rising, within 0..1.
        threshold: calibrated score of the highest F1 on validation data; cells below it are left out by default.

    Raises:
        ValueError: knots that are not strictly rising or of different number, or a threshold outside 0..1.
    """

    NODE: ClassVar[str] = "MODEL.CELLS.SCORES"

    raw: tuple[float, ...] = ()
    probability: tuple[float, ...] = ()
    threshold: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.raw) == len(self.probability), "probability", f"{len(self.raw)} knots", self.probability)
        require(len(self.raw) != 1, "raw", "no knot, or two and more", self.raw)
        for name in ("raw", "probability"):
            values = getattr(self, name)
            rising = all(a < b for a, b in zip(values, values[1:], strict=False))
            require(rising and all(0 <= v <= 1 for v in values), name, "rising numbers of 0..1", values)
        require(0 <= self.threshold <= 1, "threshold", "a number of 0..1", self.threshold)

    def __call__(self, scores: Tensor) -> Tensor:
        """Raw scores (R,) -> probabilities (R,) in the same order."""
        if not self.raw:
            return scores
        raw = torch.tensor(self.raw, dtype=torch.float64, device=scores.device)
        probability = torch.tensor(self.probability, dtype=torch.float64, device=scores.device)
        value = scores.double().clamp(float(raw[0]), float(raw[-1]))
        right = torch.searchsorted(raw, value).clamp(1, len(raw) - 1)
        part = (value - raw[right - 1]) / (raw[right] - raw[right - 1])
        return (probability[right - 1] + part * (probability[right] - probability[right - 1])).to(scores)

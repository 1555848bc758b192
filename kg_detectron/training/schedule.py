"""The learning rate over a training run, as a factor of the base learning rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up over the first steps, then a cosine that falls to `final` at the end of the run.

    The cosine follows the progress of the run, a fraction of its budget of iterations or of time. So it ends in time
    whatever the speed of the machine.

    Args:
        warmup: iterations of the warm-up.
        warmup_share: of the run, which the warm-up takes at most: a short run has no hundred iterations for it.
        final: factor at the end of the run.
    """

    warmup: int = 100
    warmup_share: float = 0.05
    final: float = 0.01

    def __call__(self, iteration: int, progress: float) -> float:
        """The factor of an iteration, counted from 0, at a progress from 0 to 1."""
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        warm = max((iteration + 1) / max(1, self.warmup), progress / self.warmup_share)
        return cosine * min(1.0, warm)

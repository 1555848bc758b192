"""Local maxima of the score maps (paper, section 2.1, step 2)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_threshold


@torch.no_grad()
def find_peaks(scores: Tensor | Sequence[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    """`layers.find_peaks`: (N, K, H, W) of one or several scales -> peaks (P, 4), scores (P,)."""
    maps = [scores] if isinstance(scores, Tensor) else scores
    check_threshold(maps, threshold)
    found, values = zip(*(_peaks_of_scale(scale, threshold) for scale in maps), strict=True)
    for index, peaks in enumerate(found):
        peaks[:, 0] += len(maps[0]) * index
    return torch.cat(found), torch.cat(values)


def _peaks_of_scale(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    scores = torch.where(torch.isfinite(scores), scores, -math.inf)
    padded = torch.nn.functional.pad(scores, (1, 1, 1, 1), value=-math.inf)
    is_peak = scores > threshold
    for neighbour in (padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]):
        is_peak &= scores >= neighbour
    peaks = is_peak.nonzero()
    values = scores[is_peak]
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(peaks[order, 0], stable=True)]
    return peaks[order].contiguous(), values[order]

"""From scores to probabilities: isotonic calibration on validation data, and the threshold of the highest F1.

N detections of all images together; a detection is right where it matches a true cell at an IoU of 0.5.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from kg_detectron.modeling import Scores

# Knots of the function, at most: the training data do not tell more.
KNOTS = 24
# Of a probability; none is 0 or 1 for sure.
_LOWEST, _HIGHEST = 1e-4, 1 - 1e-4
# Sides of boxes, pixels of the network's input, at which what a size adds to the log odds is fitted, and how strongly
# two neighbours are drawn to each other.
SIDES = (8.0, 12.0, 17.0, 24.0, 34.0, 48.0)
_RIDGE = 10.0
# Slope that keeps neighbouring knots apart, so that the order of the cells stays.
_SLOPE = 1e-6


@dataclass(frozen=True)
class Reliability:
    """How far probabilities can be trusted, in bins of equal width.

    Attributes:
        probability: (B,) mean probability of each bin that holds detections.
        frequency: (B,) fraction of its detections that are right.
        count: (B,) number of its detections.
    """

    probability: np.ndarray
    frequency: np.ndarray
    count: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean of |probability - frequency|, weighted by the counts."""
        total = self.count.sum()
        return float((np.abs(self.probability - self.frequency) * self.count).sum() / total) if total else float("nan")


def best_threshold(scores: np.ndarray, right: np.ndarray, positives: int) -> tuple[float, float]:
    """The score with the highest F1 = 2 TP / (detections + positives), and that F1.

    Args:
        scores: (N,).
        right: (N,) bool.
        positives: true cells of all images.
    """
    if not len(scores):
        return 0.0, 0.0
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + positives)
    # Detections of one score come and go together.
    ends = np.append(np.diff(scores[order]) != 0, True)
    best = int(np.where(ends, f1, -1).argmax())
    return float(scores[order][best]), float(f1[best])


def fit_scores(scores: np.ndarray, right: np.ndarray, positives: int, boxes: np.ndarray | None = None) -> Scores:
    """Fit the function from raw scores and sizes to probabilities.

    Isotonic regression of the scores (Zadrozny and Elkan 2002), thinned to a few knots and made strictly rising; then
    logistic regression, on the log odds of these probabilities, of what the sizes add.

    Args:
        scores: (N,) raw scores, 0..1.
        right: (N,) bool, of each detection.
        positives: true cells of all images.
        boxes: (N, 4) xyxy, pixels of the network's input; without, sizes do not count.

    Returns:
        The function, with the threshold of the highest F1 among the calibrated scores.

    Raises:
        ValueError: fewer than two different scores.
    """
    scores, right = np.asarray(scores, np.float64), np.asarray(right, bool)
    order = np.argsort(scores, kind="stable")
    x, y = scores[order], isotonic_regression(right[order].astype(float)).x
    values = np.unique(x)
    if len(values) < 2:
        raise ValueError(f"scores: expected at least two different ones to calibrate, got {len(values)}")
    knots = np.unique(np.quantile(values, np.linspace(0, 1, KNOTS), method="inverted_cdf"))
    probability = np.array([y[(x >= a) & (x <= b)].mean() for a, b in _around(knots, values)])
    probability = np.maximum.accumulate(probability).clip(_LOWEST, _HIGHEST)
    rising = probability + _SLOPE * np.arange(len(knots))
    rising = rising * min(1.0, _HIGHEST / rising[-1])
    plain = Scores(tuple(knots.tolist()), tuple(rising.tolist()))
    raw = torch.from_numpy(scores)
    threshold, _ = best_threshold(plain(raw).numpy(), right, positives)
    if boxes is None:
        return replace(plain, threshold=threshold)
    boxes = np.asarray(boxes, np.float64)
    added = _log_odds(plain(raw).numpy(), right, np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)))
    fitted = replace(plain, side=SIDES, log_odds=tuple(added.tolist()), plain_threshold=threshold)
    threshold, _ = best_threshold(fitted(raw, torch.from_numpy(boxes)).numpy(), right, positives)
    return replace(fitted, threshold=threshold)


def _log_odds(probability: np.ndarray, right: np.ndarray, side: np.ndarray) -> np.ndarray:
    """What sizes add to the log odds at each of `SIDES`, rising, by maximum likelihood; (N,) each."""
    knots = np.log(SIDES)
    at = np.log(np.maximum(side, SIDES[0]))[:, None]
    steps = np.hstack((np.ones_like(at), ((at - knots[:-1]) / np.diff(knots)).clip(0, 1)))
    before, ridge = logit(probability), np.array([0.0] + [_RIDGE] * (len(knots) - 1))

    def loss(added: np.ndarray) -> tuple[float, np.ndarray]:
        odds = before + steps @ added
        likelihood = (np.logaddexp(0, odds) - right * odds).sum()
        return likelihood + (ridge * added**2).sum() / 2, steps.T @ (expit(odds) - right) + ridge * added

    bounds = [(None, None)] + [(0, None)] * (len(knots) - 1)
    return minimize(loss, np.zeros(len(knots)), jac=True, method="L-BFGS-B", bounds=bounds).x.cumsum()


def _around(knots: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
    """The stretch of scores that each knot stands for: half of the way to its neighbours."""
    middle = (knots[1:] + knots[:-1]) / 2
    edges = np.concatenate([[values[0]], middle, [values[-1]]])
    stretches = zip(edges[:-1], edges[1:], knots, strict=True)
    return [(min(a, knot), max(b, knot)) for a, b, knot in stretches]


def reliability(probability: np.ndarray, right: np.ndarray, bins: int = 10) -> Reliability:
    """Probabilities (N,) against what came of the detections (N,), in bins of equal width."""
    place = np.minimum((np.asarray(probability) * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    held = count > 0
    mean = np.bincount(place, probability, minlength=bins)[held] / count[held]
    frequency = np.bincount(place, np.asarray(right, float), minlength=bins)[held] / count[held]
    return Reliability(mean, frequency, count[held])

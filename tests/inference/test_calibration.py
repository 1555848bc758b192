"""Scores become probabilities by what validation data say of scores and sizes."""

import numpy as np
import pytest
import torch

from kg_detectron.inference.calibration import SIDES, best_threshold, fit_scores, reliability


def detections(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Raw scores, boxes, which are right, and how probable that was: less so for small boxes, whatever their score."""
    rng = np.random.default_rng(seed)
    side = np.exp(rng.uniform(np.log(6), np.log(80), count))
    score = rng.uniform(0.001, 0.2, count)
    probability = 1 / (1 + np.exp(-(30 * (score - 0.1) + 2 * np.log(side.clip(8, 48) / 20))))
    boxes = np.stack((side, side, 2 * side, 2 * side), axis=1)
    return score, boxes, rng.random(count) < probability, probability


def test_sizes_are_learned():
    score, boxes, right, _ = detections(4000, seed=1)
    fitted = fit_scores(score, right, int(right.sum()), boxes)
    plain = fit_scores(score, right, int(right.sum()))
    assert fitted.side == SIDES and np.diff(fitted.log_odds).min() > 0
    assert fitted.plain == plain and plain.side == ()
    score, boxes, right, probability = detections(4000, seed=2)
    by_size = fitted(torch.from_numpy(score), torch.from_numpy(boxes)).numpy()
    by_score = plain(torch.from_numpy(score)).numpy()
    assert np.abs(by_size - probability).mean() < 0.05 < 0.1 < np.abs(by_score - probability).mean()
    assert reliability(by_size, right).expected_error < 0.05
    threshold, f1 = best_threshold(by_size, right, int(right.sum()))
    assert fitted.threshold == pytest.approx(threshold, abs=0.06)
    assert f1 > best_threshold(by_score, right, int(right.sum()))[1] + 0.02


def test_a_few_cells_teach_little():
    """Six detections of two sizes, of which the large ones are right: no size is impossible then."""
    side = np.array([10.0, 40.0] * 3)
    boxes = np.stack((side, side, 2 * side, 2 * side), axis=1)
    right = side > 20
    fitted = fit_scores(np.linspace(0.1, 0.6, 6), right, 3, boxes)
    assert 0 < fitted.log_odds[-1] - fitted.log_odds[0] < 1


def test_sizes_that_tell_nothing_change_nothing():
    rng = np.random.default_rng(0)
    score, side = rng.random(3000), np.exp(rng.uniform(2, 4, 3000))
    right = rng.random(3000) < score
    boxes = np.stack((side, side, 2 * side, 2 * side), axis=1)
    fitted = fit_scores(score, right, int(right.sum()), boxes)
    raw, boxes = torch.from_numpy(score), torch.from_numpy(boxes)
    assert np.abs(fitted(raw, boxes) - fitted.plain(raw)).mean() < 0.02

"""One or several models on one dataset: matched image by image, pooled over all images, judged at one score.

Letters: M cells, D instances of all images together, by falling score within each image; T thresholds of mask IoU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..metrics import DSB_IOUS
from .matching import Cells, Matches, Verdict, judge, match

IOUS = DSB_IOUS  # of the curve of AP


@dataclass(frozen=True)
class ComparedImage:
    """An image with its ground truth and the prediction of every model.

    Args:
        name: what the page calls it.
        file: where `io.images.read_image` finds it.
        size: (H, W) in pixels.
        truth: its cells.
        predictions: of every model, in the order of the models.
    """

    name: str
    file: Path
    size: tuple[int, int]
    truth: Cells
    predictions: tuple[Cells, ...]


@dataclass(frozen=True)
class Pooled:
    """The instances of one model in all images.

    Attributes:
        name: of the model.
        scores: (D,), or None where the prediction has none.
        hits: (T,D) bool, true positives.
        positives: cells of the ground truth.
    """

    name: str
    scores: NDArray[np.float64] | None
    hits: NDArray[np.bool_]
    positives: int

    def precision_recall(self, threshold: int) -> tuple[NDArray, NDArray, NDArray]:
        """Recall, precision and score after each instance, by falling score; one point after equal scores.

        Raises:
            ValueError: for a prediction without scores.
        """
        if self.scores is None:
            raise ValueError(f"{self.name}: a precision-recall curve needs scores")
        order = np.argsort(-self.scores, kind="stable")
        scores, hits = self.scores[order], np.cumsum(self.hits[threshold, order])
        last = np.append(scores[1:] != scores[:-1], True) if len(scores) else np.zeros(0, dtype=bool)
        found, number = hits[last], np.flatnonzero(last) + 1
        return found / max(self.positives, 1), found / np.maximum(number, 1), scores[last]

    def best_score(self, threshold: int) -> float | None:
        """The score from which on F1 over all images is highest (of equals the highest); None without scores."""
        if self.scores is None or not len(self.scores):
            return None
        recall, precision, scores = self.precision_recall(threshold)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return float(scores[f1.argmax()])


@dataclass(frozen=True)
class JudgedImage:
    """One image against every model, at the scores from which instances count."""

    image: ComparedImage
    matches: tuple[Matches, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def f1(self) -> float:
        """The mean over the models."""
        return float(np.mean([verdict.f1 for verdict in self.verdicts]))


@dataclass(frozen=True)
class Comparison:
    """Models on one dataset, as `compare` makes it.

    Attributes:
        models: their names.
        images: in the order given.
        pooled: of every model; its thresholds are `IOUS` and then `iou`, which is number `threshold`.
        scores: of every model, from which on instances are shown and counted; None takes all.
        score_is_given: rather than chosen.
        iou: of masks, from which on an instance has found a cell.
    """

    models: list[str]
    images: list[JudgedImage]
    pooled: list[Pooled]
    scores: list[float | None]
    score_is_given: bool
    iou: float
    threshold: int


def compare(
    images: Sequence[ComparedImage],
    models: Sequence[str],
    *,
    iou: float = 0.5,
    score: float | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare the models' predictions with the ground truth.

    Args:
        images: of one dataset.
        models: their names.
        iou: of masks, from which on an instance has found a cell.
        score: from which on instances count image by image; None takes, for each model, the one of the highest F1 over
            all images. A prediction without scores counts whole.
        progress: show a progress bar.

    Raises:
        ValueError: for no image, no model, models of one name, an IoU out of range, an image with another number of
            predictions, masks of another size than their image, or scores in some images only. The message names it.
    """
    if not images:
        raise ValueError("images: expected at least one, got none")
    if not models or len(set(models)) < len(models):
        raise ValueError(f"models: expected different names, at least one, got {list(models)}")
    if not 0 < iou <= 1:
        raise ValueError(f"iou: expected a number above 0 and at most 1, got {iou}")
    ious, threshold = (*IOUS, iou), len(IOUS)
    ordered, matches = [], []
    for given in tqdm(images, desc="matching", unit="image", disable=not progress):
        _check_image(given, models)
        predictions = tuple(cells.by_score() for cells in given.predictions)
        ordered.append(ComparedImage(given.name, given.file, given.size, given.truth, predictions))
        matches.append(tuple(match(given.truth, prediction, ious) for prediction in predictions))
    pooled = [_pool(name, m, ordered, matches) for m, name in enumerate(models)]
    scores = [None if of.scores is None else of.best_score(threshold) if score is None else score for of in pooled]
    judged = []
    for image, of in zip(ordered, matches, strict=True):
        verdicts = (
            judge(image.truth, prediction, matched, threshold, least)
            for prediction, matched, least in zip(image.predictions, of, scores, strict=True)
        )
        judged.append(JudgedImage(image, of, tuple(verdicts)))
    return Comparison(list(models), judged, pooled, scores, score is not None, iou, threshold)


def _check_image(image: ComparedImage, models: Sequence[str]) -> None:
    if len(image.predictions) != len(models):
        raise ValueError(f"{image.name}: expected {len(models)} predictions, got {len(image.predictions)}")
    for name, cells in (("the ground truth", image.truth), *zip(models, image.predictions, strict=True)):
        for mask in cells.masks:
            if tuple(mask["size"]) != tuple(image.size):
                raise ValueError(f"{image.name}: a mask of {name} has size {mask['size']}, expected {image.size}")


def _pool(name: str, m: int, images: Sequence[ComparedImage], matches: Sequence[tuple[Matches, ...]]) -> Pooled:
    cells = [image.predictions[m] for image in images]
    scored = {of.scores is not None for of in cells if len(of.masks)}
    if len(scored) > 1:
        raise ValueError(f"{name}: some images have scores and others have none, expected all or none")
    return Pooled(
        name,
        None if scored == {False} else np.concatenate([np.zeros(0), *(of.scores for of in cells if len(of.masks))]),
        np.concatenate([of[m].cell >= 0 for of in matches], axis=1),
        sum(len(image.truth.masks) for image in images),
    )

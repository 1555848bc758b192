"""One or several models on one dataset: matched image by image, pooled over all images, judged at one score.

Letters: M cells, D instances of all images together, by falling score within each image; T thresholds of mask IoU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kg_detectron.io.cell_sets import ImageCells
from kg_detectron.io.setting import SettingError
from kg_detectron.metrics import DSB_IOUS
from kg_detectron.report.outcomes import ClassVerdict, Matches, Verdict, judge, judge_class, match

IOUS = DSB_IOUS  # of the curve of AP


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
    """One image against every model, at the scores from which instances count.

    Attributes:
        truth: its cells.
        predictions: of every model, by falling score; all of them, those that do not count as well.
        matches, verdicts: of every model.
    """

    truth: ImageCells
    predictions: tuple[ImageCells, ...]
    matches: tuple[Matches, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def f1(self) -> float:
        """The mean over the models."""
        return float(np.mean([verdict.f1 for verdict in self.verdicts]))

    def of_class(self, name: str, threshold: int) -> list[ClassVerdict]:
        """What became of the cells and instances of a class, for every model; ``threshold`` is the comparison's."""
        parts = zip(self.predictions, self.matches, self.verdicts, strict=True)
        return [judge_class(self.truth, found, matches, threshold, verdict, name) for found, matches, verdict in parts]


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
    truths: Sequence[ImageCells],
    predictions: Mapping[str, Sequence[ImageCells | None]],
    *,
    iou: float = 0.5,
    score: float | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare the models' predictions with the ground truth.

    Args:
        truths: of the images of one dataset.
        predictions: by the names of the models, for every image, as `io.annotations.read_predictions` gives them.
        iou: of masks, from which on an instance has found a cell.
        score: from which on instances count image by image; None takes, for each model, the one of the highest F1 over
            all images. A prediction without scores counts whole.
        progress: show a progress bar.

    Raises:
        ValueError: for no image, no model, an IoU out of range, another number of predictions than of images, masks of
            different sizes, or scores in some images only.
    """
    if not truths:
        raise ValueError("truths: expected at least one image, got none")
    if not predictions:
        raise ValueError("predictions: expected at least one model, got none")
    if not 0 < iou <= 1:
        raise SettingError("iou", f"expected a number above 0 and at most 1, got {iou}")
    models = [
        [_by_score(truth, found) for truth, found in zip(truths, own, strict=True)] for own in predictions.values()
    ]
    ious, threshold = (*IOUS, iou), len(IOUS)
    by_image = list(zip(*models, strict=True))
    matches = [
        tuple(match(truth, prediction, ious) for prediction in found)
        for truth, found in tqdm(
            zip(truths, by_image, strict=True), "matching", len(truths), unit="image", disable=not progress
        )
    ]
    cells = sum(len(truth.masks) for truth in truths)
    pooled = [
        _pool(name, found, [of[m] for of in matches], cells)
        for m, (name, found) in enumerate(zip(predictions, models, strict=True))
    ]
    scores = [None if of.scores is None else of.best_score(threshold) if score is None else score for of in pooled]
    judged = []
    for truth, found, of in zip(truths, by_image, matches, strict=True):
        verdicts = (
            judge(truth, prediction, matched, threshold, least)
            for prediction, matched, least in zip(found, of, scores, strict=True)
        )
        judged.append(JudgedImage(truth, found, of, tuple(verdicts)))
    return Comparison(list(predictions), judged, pooled, scores, score is not None, iou, threshold)


def _by_score(truth: ImageCells, found: ImageCells | None) -> ImageCells:
    """The same cells, the highest score first; equal ones, and cells without scores, in the order given."""
    if found is None:
        return ImageCells(truth.name, truth.image_id, truth.size, np.zeros((0, 4)), [], None)
    if found.scores is None:
        return found
    order = np.argsort(-found.scores, kind="stable")
    masks = [found.masks[i] for i in order]
    classes = None if found.classes is None else tuple(found.classes[i] for i in order)
    return replace(found, boxes=found.boxes[order], masks=masks, scores=found.scores[order], classes=classes)


def _pool(name: str, found: Sequence[ImageCells], matches: Sequence[Matches], cells: int) -> Pooled:
    scored = {own.scores is not None for own in found if len(own.masks)}
    if len(scored) > 1:
        raise ValueError(f"{name}: some images have scores and others have none, expected all or none")
    scores = [own.scores for own in found if len(own.masks)]
    return Pooled(
        name,
        None if scored == {False} else np.concatenate([np.zeros(0), *scores]),
        np.concatenate([of.cell >= 0 for of in matches], axis=1),
        cells,
    )

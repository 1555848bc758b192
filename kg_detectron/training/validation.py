"""How well a model finds the cells of labelled images, as its users will run it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kg_detectron.cells import MaskCrops
from kg_detectron.inference.calibration import Reliability, best_threshold, fit_scores, reliability
from kg_detectron.inference.predictor import predict
from kg_detectron.metrics import PaperMetrics
from kg_detectron.metrics.iou import mask_iou
from kg_detectron.metrics.paper import claim_best
from kg_detectron.modeling import InstanceNet, Scores
from kg_detectron.training.dataset import LabelledImage

IOUS = (0.5, 0.7)


@dataclass(frozen=True)
class Validation:
    """Figures on labelled images; fractions of 0..1.

    Attributes:
        mask_ap: paper's AP by the IoU, "0.5" and "0.7".
        f1: highest F1 at an IoU of 0.5 over all thresholds of the score.
        scores: (N,) raw scores of all detections.
        right: (N,) bool, whether each matches a true cell at an IoU of 0.5.
        positives: number of true cells.
        class_pairs: (P, 2) int64, the true and the predicted class of each detection that is right, where the true one
            is known and there are several.
        boxes: (N, 4) xyxy of the detections, as far as they lie in the image, pixels of the network's input; None where
            their sizes are not to count.
    """

    mask_ap: dict[str, float]
    f1: float
    scores: np.ndarray
    right: np.ndarray
    positives: int
    class_pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    boxes: np.ndarray | None = None

    @property
    def class_accuracy(self) -> float | None:
        """The share of `class_pairs` that are equal; None without any."""
        return float((self.class_pairs[:, 0] == self.class_pairs[:, 1]).mean()) if len(self.class_pairs) else None

    def calibration(self) -> tuple[Scores, Reliability]:
        """The function from raw scores and sizes to probabilities, with its threshold; and how reliable it is on these
        images.

        Raises:
            ValueError: there are too few detections.
        """
        fitted = fit_scores(self.scores, self.right, self.positives, self.boxes)
        boxes = None if self.boxes is None else torch.from_numpy(self.boxes)
        probability = fitted(torch.from_numpy(self.scores), boxes).numpy()
        return fitted, reliability(probability, self.right)

    def __str__(self) -> str:
        aps = ", ".join(f"mask AP@{iou} {100 * value:.1f}" for iou, value in self.mask_ap.items())
        accuracy = self.class_accuracy
        classes = "" if accuracy is None else f", class accuracy of matched cells {100 * accuracy:.1f}"
        return f"{aps}, F1@0.5 {self.f1:.3f}{classes}"


@torch.no_grad()
def validate(model: InstanceNet, images: Sequence[LabelledImage], *, true_scale: bool = False) -> Validation:
    """Predict labelled images and compare.

    Args:
        model: any method; its mode is restored. A scale is estimated from the cells that it takes for true, so its
            scores should be calibrated; those of the result are raw.
        images: see `LabelledImage`; their pixels are normalised already.
        true_scale: give the model the true cell diameter of each image, instead of letting it estimate one.
    """
    training, scores_before = model.training, model.scores
    is_isotropic = model.preprocessing.resize == "isotropic"
    model.eval()
    metrics = PaperMetrics(IOUS)
    scores, boxes, right, positives = [np.zeros(0)], [np.zeros((0, 4))], [np.zeros(0, bool)], 0
    class_pairs = [np.zeros((0, 2), np.int64)]
    try:
        for image in images:
            truth = MaskCrops.from_label_image(image.labels)
            model.scores, scale = scores_before, None
            if is_isotropic:
                diameter = image.diameter if true_scale else None
                scale = model.network_image(image.image, diameter=diameter)[0].scale[0]
            model.scores = Scores()
            cells = predict(model, image.image, scale=scale)
            masks, true_masks = cells.masks.rle(), truth.rle()
            values = cells.scores.double().cpu().numpy()
            metrics.update(truth.windows.numpy(), true_masks, cells.boxes.cpu().numpy(), values, masks)
            scores.append(values)
            boxes.append(cells.boxes.double().cpu().numpy() * np.tile(cells.scale[::-1], 2))
            cell = claim_best(mask_iou(masks, true_masks), (0.5,))[0]
            right.append(cell >= 0)
            if image.classes is not None and len(model.classes) > 1:
                pairs = np.stack((image.classes[cell], cells.labels.cpu().numpy()), axis=1)[cell >= 0]
                class_pairs.append(pairs[pairs[:, 0] > 0])
            positives += len(truth)
    finally:
        model.scores = scores_before
        model.train(training)
    all_scores, all_right = np.concatenate(scores), np.concatenate(right)
    figures = metrics.compute()
    _, f1 = best_threshold(all_scores, all_right, positives)
    mask_ap = {iou: values["mask_ap"] for iou, values in figures.items()}
    pairs, all_boxes = np.concatenate(class_pairs), np.concatenate(boxes)
    return Validation(mask_ap, f1, all_scores, all_right, positives, pairs, all_boxes)

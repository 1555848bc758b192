"""The cells of an image from its four mirror images.

Each mirror image is predicted on its own, so any method can do it, in tiles too. Detections of different mirror images
that overlap are one cell: its mask is the mean of theirs, its class that of the highest sum of scores, and its score is
the sum of theirs divided by the number of mirror images. So a cell that few of them show ranks low, as in weighted
boxes fusion (Solovyev et al. 2021).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.metrics.iou import box_intersection, mask_iou

# Detections are one cell from this intersection over union of their masks on.
SAME_CELL = 0.5


class Mirror(NamedTuple):
    """A mirror image: upside down, left to right, both or neither."""

    flip_y: bool
    flip_x: bool

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The mirror image of an image (H, W, 3), which shares its memory."""
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def undo(self, cells: Cells) -> Cells:
        """The cells of the mirror image in the frame of the image."""
        height, width = cells.size
        axes = [axis for axis, flip in ((0, self.flip_y), (1, self.flip_x)) if flip]
        crops = [crop.flip(axes) for crop in cells.masks.crops]
        windows = self._undo_boxes(cells.masks.windows, height, width)
        masks = MaskCrops(crops, windows, cells.size, cells.masks.threshold)
        return replace(cells, boxes=self._undo_boxes(cells.boxes, height, width), masks=masks)

    def _undo_boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(1)
        if self.flip_x:
            x1, x2 = width - x2, width - x1
        if self.flip_y:
            y1, y2 = height - y2, height - y1
        return torch.stack((x1, y1, x2, y2), dim=1)


MIRRORS = tuple(Mirror(flip_y, flip_x) for flip_y in (False, True) for flip_x in (False, True))


def join_cells(detections: Sequence[Cells]) -> Cells:
    """The cells of one image, from what was detected in several versions of it.

    By falling score each detection joins the cell that its mask overlaps most, unless one of the same version has
    joined it already, or begins a new cell.

    Args:
        detections: of each version, in the frame of the image.

    Returns:
        The cells, by falling score, masks as probabilities. Scale, its source and the notes are those of the first
        version.
    """
    first, groups = detections[0], _groups(detections)
    if not groups:
        return first
    boxes, scores, crops, windows = [], [], [], []
    for group in groups:
        values = torch.stack([detections[version].scores[i] for version, i in group])
        weights = values / values.sum() if values.sum() > 0 else torch.full_like(values, 1 / len(values))
        boxes.append((weights[:, None] * torch.stack([detections[version].boxes[i] for version, i in group])).sum(0))
        scores.append(values.sum() / len(detections))
        crop, window = _mean_mask([(detections[version].masks, i) for version, i in group])
        crops.append(crop)
        windows.append(window)
    falling, order = torch.stack(scores).sort(descending=True, stable=True)
    labels = torch.stack(
        [_voted_label([(detections[v].labels[i], detections[v].scores[i]) for v, i in g]) for g in groups]
    )
    masks = MaskCrops(crops, torch.tensor(windows, dtype=torch.int64), first.size, first.masks.threshold)
    return replace(first, boxes=torch.stack(boxes)[order], scores=falling, labels=labels[order], masks=masks[order])


def _voted_label(votes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The class of the highest sum of scores; of equal ones that of the best detection, which comes first."""
    sums: dict[int, float] = {}
    for label, score in votes:
        sums[int(label)] = sums.get(int(label), 0.0) + float(score)
    best = max(sums, key=sums.__getitem__)
    return torch.full_like(votes[0][0], best)


def _groups(detections: Sequence[Cells]) -> list[list[tuple[int, int]]]:
    """The (version, index) of the detections of each cell, the best first."""
    place = [(version, i) for version, cells in enumerate(detections) for i in range(len(cells))]
    scores = np.concatenate([cells.scores.double().numpy(force=True) for cells in detections])
    boxes = np.concatenate([cells.boxes.double().numpy(force=True) for cells in detections])
    rles = [rle for cells in detections for rle in cells.masks.rle()]
    groups: list[list[tuple[int, int]]] = []
    members: list[int] = []  # detections that begin a cell or have joined one, and the cell of each
    cell_of: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        near = np.flatnonzero(box_intersection(boxes[i : i + 1], boxes[members])[0] > 0)
        overlaps = mask_iou([rles[i]], [rles[members[n]] for n in near])[0] if len(near) else np.zeros(0)
        cell = len(groups)
        for n in np.argsort(-overlaps, kind="stable"):
            if overlaps[n] < SAME_CELL:
                break
            if all(version != place[i][0] for version, _ in groups[cell_of[near[n]]]):
                cell = cell_of[near[n]]
                break
        if cell == len(groups):
            groups.append([])
        groups[cell].append(place[i])
        members.append(i)
        cell_of.append(cell)
    return groups


def _mean_mask(parts: list[tuple[MaskCrops, int]]) -> tuple[Tensor, list[int]]:
    """The mean of masks as a crop of probabilities, and its window x1, y1, x2, y2."""
    windows = torch.stack([masks.windows[i] for masks, i in parts])
    (x1, y1), (x2, y2) = windows[:, :2].amin(0).tolist(), windows[:, 2:].amax(0).tolist()
    masks, i = parts[0]
    mean = masks.crops[i].new_zeros(y2 - y1, x2 - x1, dtype=torch.float32)
    for masks, i in parts:
        left, top, right, bottom = masks.windows[i].tolist()
        mean[top - y1 : bottom - y1, left - x1 : right - x1] += masks.crops[i].float()
    return mean / len(parts), [x1, y1, x2, y2]

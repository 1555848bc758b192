"""The labels of a layer under a threshold that moves, with the corrections that a user makes in between."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kg_detectron.napari.segmentation import Segmentation

# Cells of a lower score are not kept, for there are many, and hardly one of them is right.
LOWEST_SCORE = 0.05


class ShownCells:
    """The label image of a segmentation, of which the cells from a threshold on are shown.

    Separation gives a pixel to the cell of the higher score. So the cells of a higher threshold are those of a lower
    one, pixel by pixel, less some; a threshold hides and shows whole cells, and costs no prediction.

    Attributes:
        labels: (..., H, W) uint32, changed in place: what users paint into it stays, but for cells that get hidden.
        threshold: of the cells that are shown.
    """

    def __init__(self, segmentation: "Segmentation", threshold: float) -> None:
        self.segmentation = segmentation
        self.labels = np.zeros(segmentation.shape, np.uint32)
        self.threshold = np.inf
        self._is_shown = np.zeros(len(segmentation.scores) + 1, bool)
        self.move(threshold)

    def __len__(self) -> int:
        """How many cells of the segmentation are shown."""
        return int(self._is_shown.sum())

    def class_counts(self) -> list[str]:
        """How many cells of each class are shown, a text each; none where there is one class."""
        if not self.segmentation.colours:
            return []
        names, counts = np.unique(
            self.segmentation.features["class"][self._is_shown[1:]].astype(str), return_counts=True
        )
        return [f"{name}: {count}" for name, count in zip(names, counts, strict=True)]

    def move(self, threshold: float) -> None:
        """Show the cells of this score or a higher one, and hide the others."""
        self.threshold = threshold
        show = np.concatenate(([False], self.segmentation.scores >= threshold))
        hidden, new = self._is_shown & ~show, show & ~self._is_shown
        self._is_shown = show
        for plane in self.segmentation.planes:
            ids = slice(plane.first_id, plane.first_id + len(plane.cells))
            labels = self.labels[plane.place]
            if hidden[ids].any():
                known = np.minimum(labels, len(hidden) - 1)
                labels[hidden[known] & (known == labels)] = 0
            if new[ids].any():
                self._give_new_ids(labels, new)
                for id_, (crop, (x1, y1, x2, y2)) in zip(plane.ids, plane.cells.masks.pixels(), strict=True):
                    if new[id_]:
                        window = labels[y1:y2, x1:x2]
                        window[crop & (window == 0)] = id_

    def _give_new_ids(self, labels: np.ndarray, new: np.ndarray) -> None:
        """Cells that a user drew under the id of a hidden cell, which is shown now, get ids beyond all others."""
        drawn = new[np.minimum(labels, len(new) - 1)] & (labels < len(new))
        if drawn.any():
            highest = max(int(self.labels.max()), len(new) - 1)
            for number, id_ in enumerate(np.unique(labels[drawn]), start=1):
                labels[labels == id_] = highest + number

    def is_corrected(self) -> bool:
        """Whether the labels are no longer those of the segmentation."""
        return not np.array_equal(self.labels, ShownCells(self.segmentation, self.threshold).labels)

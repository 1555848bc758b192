"""What became of every cell and every instance of an image: found, missed, false, merged, split.

Letters: M cells of the ground truth and D instances of the prediction, in one image; T thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from kg_detectron.cells.run_lengths import mask_areas
from kg_detectron.io.cell_sets import ImageCells
from kg_detectron.metrics import RLE, claim_best, mask_iou

# From this share of its area on, a cell lies in an instance, or an instance in a cell.
INSIDE = 0.5


@dataclass(frozen=True)
class Matches:
    """The instances of an image against its cells, at several thresholds of mask IoU.

    Attributes:
        cell: (T,D) int64, the cell that an instance found at each threshold, -1 for none.
        iou: (D,) with the cell that it overlaps best.
        instance, of: (P,) int64 each, pairs of an instance and a cell one of which lies in the other by `INSIDE`.
        holds_cell, in_cell: (P,) bool, which way.
    """

    cell: NDArray[np.int64]
    iou: NDArray[np.float64]
    instance: NDArray[np.int64]
    of: NDArray[np.int64]
    holds_cell: NDArray[np.bool_]
    in_cell: NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """What became of the cells and of the first D instances, those from a score on.

    Attributes:
        found: (D,) bool, instances that found a cell: true positives.
        missed: (M,) bool, cells that no instance found: false negatives.
        merged: (D,) bool, instances that hold two or more cells, each with at least half of the cell's area.
        split: (M,) bool, cells in which two or more instances lie, each with at least half of the instance's area.
            Of instances that lie in each other by half of the smaller one, duplicates, only the best counts.
    """

    found: NDArray[np.bool_]
    missed: NDArray[np.bool_]
    merged: NDArray[np.bool_]
    split: NDArray[np.bool_]

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 where there is nothing to find and nothing was found."""
        total = len(self.found) + len(self.missed)
        return 2 * int(self.found.sum()) / total if total else 1.0


def match(truth: ImageCells, prediction: ImageCells, ious: Sequence[float]) -> Matches:
    """Match the instances, which come by falling score, by `metrics.claim_best`.

    Raises:
        ValueError: for masks of different sizes.
    """
    overlap = mask_iou(prediction.masks, truth.masks)
    area = mask_areas(prediction.masks)[:, None] + mask_areas(truth.masks)[None, :]
    instance, of = np.nonzero(overlap > 0)
    pair = overlap[instance, of]
    shared = pair * area[instance, of] / (1 + pair)
    holds_cell = shared >= INSIDE * mask_areas(truth.masks)[of] - 1e-6
    in_cell = shared >= INSIDE * mask_areas(prediction.masks)[instance] - 1e-6
    either = holds_cell | in_cell
    return Matches(
        cell=claim_best(overlap, ious),
        iou=overlap.max(axis=1, initial=0.0),
        instance=instance[either],
        of=of[either],
        holds_cell=holds_cell[either],
        in_cell=in_cell[either],
    )


def judge(truth: ImageCells, prediction: ImageCells, matches: Matches, threshold: int, score: float | None) -> Verdict:
    """Judge the instances of at least a score.

    Args:
        truth, prediction, matches: of `match`.
        threshold: which of the thresholds of IoU, an index.
        score: instances below it are left out; None, or a prediction without scores, takes all.
    """
    kept = len(prediction.masks)
    if score is not None and prediction.scores is not None:
        kept = int(np.count_nonzero(prediction.scores >= score))
    cell = matches.cell[threshold, :kept]
    missed = np.ones(len(truth.masks), dtype=bool)
    missed[cell[cell >= 0]] = False

    among = matches.instance < kept
    held = np.bincount(matches.instance[among & matches.holds_cell], minlength=kept)
    split = np.zeros(len(truth.masks), dtype=bool)
    instance, of = matches.instance[among & matches.in_cell], matches.of[among & matches.in_cell]
    for index in np.flatnonzero(np.bincount(of, minlength=len(split)) >= 2):
        split[index] = _distinct([prediction.masks[i] for i in instance[of == index]]) >= 2
    return Verdict(found=cell >= 0, missed=missed, merged=held >= 2, split=split)


@dataclass(frozen=True)
class ClassVerdict:
    """What became of the cells and instances of one class.

    Attributes:
        cells: (M,) int64, which cells are of the class.
        instances: (D,) int64, which instances are, of those that count. Those that found a cell of no known class are
            left out.
        verdict: of these. An instance is found where its cell is of the class, and a cell is missed unless an instance
            of the class found it.
    """

    cells: NDArray[np.int64]
    instances: NDArray[np.int64]
    verdict: Verdict


def judge_class(
    truth: ImageCells, prediction: ImageCells, matches: Matches, threshold: int, verdict: Verdict, name: str
) -> ClassVerdict:
    """Judge the cells and instances of one class by the matching of all.

    Args:
        truth, prediction, matches, threshold: as in `judge`.
        verdict: of `judge`.
        name: of the class.
    """
    kept = len(verdict.found)
    # The last one is of instances that found no cell.
    true = np.array([*(truth.classes or [""] * len(truth.masks)), "none"], dtype=object)
    predicted = np.array(prediction.classes or [""] * len(prediction.masks), dtype=object)[:kept]
    cell = matches.cell[threshold, :kept]
    instances = np.flatnonzero((predicted == name) & (true[cell] != ""))
    cells = np.flatnonzero(true[:-1] == name)
    found = (cell[instances] >= 0) & (true[cell[instances]] == name)
    missed = ~np.isin(cells, cell[instances])
    return ClassVerdict(cells, instances, Verdict(found, missed, verdict.merged[instances], verdict.split[cells]))


def _distinct(masks: Sequence[RLE]) -> int:
    """How many masks there are without those that lie, by `INSIDE` of the smaller one, over an earlier one."""
    share = coco_mask.iou(list(masks), list(masks), [1] * len(masks))  # of the row's mask that lies in the column's
    share = np.maximum(share, share.T)
    kept: list[int] = []
    for i in range(len(masks)):
        if not (share[i, kept] >= INSIDE).any():
            kept.append(i)
    return len(kept)

"""Non-maximum suppression: torchvision's operator, with a fake of our own, and the same for very many boxes.

Torchvision's operator compares each box that stays with all others: for a slide's million boxes that would take hours.

Torchvision's fake tells `torch.export` that two boxes at least remain, and an exported program stops where fewer do.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

from .overlaps import overlapping_pairs

# Up to so many boxes are compared all with all.
_MANY = 2**14


def _load_operators() -> None:
    """Load torchvision's compiled operators, without torchvision itself, which takes seconds to import."""
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" not in sys.modules and spec is not None and spec.origin:
        for library in Path(spec.origin).parent.glob("_C.*"):
            if library.suffix in (".so", ".pyd"):
                torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401


_load_operators()


# Not `torch.library.custom_op`, whose first call imports the compiler of PyTorch.
torch.library.define("kg_detectron::nms", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    if len(boxes) <= _MANY:
        return torch.ops.torchvision.nms(boxes, scores, threshold)
    return nms_of_many(boxes, scores, threshold)


torch.library.impl("kg_detectron::nms", "default", _nms)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Drop every box that overlaps a better one by more than the threshold.

    Args:
        boxes: (R,4) xyxy.
        scores: (R,).
        threshold: intersection over union.

    Returns:
        int64, the indices of those that remain, by falling score.
    """
    return torch.ops.kg_detectron.nms(boxes, scores, threshold)


def nms_of_many(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """As `nms`, on the CPU, by the pairs of boxes that overlap: the same indices.

    A box stays once no better one that overlaps it is undecided, and those that it overlaps go.
    """
    order = scores.cpu().argsort(descending=True, stable=True)
    boxes_by_score = boxes.cpu()[order]
    pairs = _pairs_above(boxes_by_score, threshold)
    stays, is_open = torch.zeros(len(order), dtype=torch.bool), torch.ones(len(order), dtype=torch.bool)
    while pairs.shape[1]:
        better, worse = pairs
        best = is_open.clone()
        best[worse] = False
        stays |= best
        is_open &= ~best
        is_open[worse[best[better]]] = False
        pairs = pairs[:, is_open[better] & is_open[worse]]
    return order[stays | is_open].to(boxes.device)


def _pairs_above(boxes: Tensor, threshold: float) -> Tensor:
    """(2,E) the pairs of boxes whose intersection over union is above the threshold; the first index is the lower."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    found = [torch.zeros(2, 0, dtype=torch.long)]
    for pairs, shared in overlapping_pairs(boxes):
        iou = shared / (area[pairs].sum(0) - shared)
        found.append(pairs[:, iou.double() > threshold].sort(0).values)
    return torch.cat(found, dim=1)


@torch.library.register_fake("kg_detectron::nms")
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)

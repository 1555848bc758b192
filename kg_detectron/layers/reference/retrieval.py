"""From keypoint graphs to boxes (paper, section 2.1, step 3, and figure 1d)."""

import math

import torch
from torch import Tensor

from ...graph import BOTTOM, CENTRE, LEFT, RIGHT, TOP
from ..checks import check_graphs


@torch.no_grad()
def graphs_to_boxes(graphs: Tensor, corner_and_centre: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`layers.graphs_to_boxes`: graphs (G, 5, 3) -> boxes (R, 4), scores (R,), graph (R,)."""
    check_graphs(graphs)
    x, y, score = graphs.unbind(2)
    present = score > 0

    def side(value: Tensor, corners: tuple[int, int], outer: float) -> tuple[Tensor, Tensor]:
        """Outermost present corner of a side (outer: the sign of outwards), and whether there is one."""
        has = present[:, corners]
        value = torch.where(has, outer * value[:, corners], -math.inf).amax(1)
        return outer * value, has.any(1)

    def pair(value: Tensor, low: tuple[int, int], high: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        (first, has_first), (last, has_last) = side(value, low, -1.0), side(value, high, 1.0)
        mirror = present[:, CENTRE]
        return (
            torch.where(has_first, first, 2 * value[:, CENTRE] - last),
            torch.where(has_last, last, 2 * value[:, CENTRE] - first),
            has_first & has_last | mirror & (has_first | has_last),
        )

    x1, x2, has_x = pair(x, LEFT, RIGHT)
    y1, y2, has_y = pair(y, TOP, BOTTOM)
    enough = present[:, :CENTRE].sum(1) >= (1 if corner_and_centre else 2)
    graph = (has_x & has_y & enough).nonzero()[:, 0]
    boxes = torch.stack((x1, y1, x2, y2), dim=1)[graph]
    total = torch.where(present, score, 0).sum(1)
    return boxes.contiguous(), (total / present.sum(1).clamp(min=1))[graph], graph.contiguous()

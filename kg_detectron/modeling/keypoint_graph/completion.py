"""Retrieval by completion: every peak gives a box, for its group offsets say where the keypoints of its cell are.

Our own. The paper groups each peak once, and takes a box from the keypoints that were found. A cell of which too few
were found has no box then, nor has one whose peaks went to another graph. Here every peak opens a graph of its own,
its partners are shared, and a missing keypoint is put where the opener expects it. NMS chooses among the graphs of one
cell.

Letters: P peaks.
"""

import math

import torch
from torch import Tensor

from kg_detectron.graph import BOTTOM, LEFT, NUM_KEYPOINTS, RIGHT, TOP

# Empty buckets around those with peaks, so that the neighbours of any bucket that is looked into exist.
_RIM = 2


@torch.no_grad()
def complete_graphs(peaks: Tensor, scores: Tensor, displacements: Tensor, match_radius: float) -> Tensor:
    """The graph that each peak opens.

    For each other type l the peak of type l that is nearest to start + g(start -> l), within `match_radius`, is a
    member (of equally near ones the first), whatever other graphs it is a member of. A type without a member stands at
    start + g(start -> l), with a score of 0.

    Args:
        peaks: (P,4) int64, columns group, keypoint, y, x, as from `find_peaks`; only peaks of one group are linked.
        scores: (P,) positive.
        displacements: (P,4,2) as from `gather_displacements`, pixels.
        match_radius: pixels.

    Returns:
        (P,5,3) x, y, score; not numbers where a displacement is none.
    """
    keypoint = peaks[:, 1]
    position = peaks[:, [3, 2]].to(displacements.dtype)
    others = torch.tensor([[l for l in range(NUM_KEYPOINTS) if l != k] for k in range(NUM_KEYPOINTS)])
    others = others.to(peaks.device)[keypoint]  # [P,4]
    expected = position[:, None] + displacements  # [P,4,2]
    members = _nearest(peaks, others, expected, match_radius)  # [P,4]
    found = (members >= 0)[..., None]
    place = torch.where(found, position[members.clamp(min=0)], expected)
    score = torch.where(found, scores[members.clamp(min=0)][..., None], 0).to(place.dtype)
    graphs = displacements.new_empty((len(peaks), NUM_KEYPOINTS, 3))
    graphs.scatter_(1, others[..., None].expand(-1, -1, 3), torch.cat((place, score), dim=2))
    openers = torch.cat((position, scores[:, None].to(place.dtype)), dim=1)
    return graphs.scatter_(1, keypoint[:, None, None].expand(-1, 1, 3), openers[:, None])


@torch.no_grad()
def completed_boxes(graphs: Tensor, missing_factor: float) -> tuple[Tensor, Tensor]:
    """Boxes of completed graphs.

    A side of the box is the mean of its two corners, of those that are peaks if there are any.

    Args:
        graphs: (P,5,3) as from `complete_graphs`.
        missing_factor: by which each keypoint that is no peak lowers the score.

    Returns:
        boxes: (P,4) x1, y1, x2, y2: pixel indices of the corners, in the frame of the graphs.
        scores: (P,) mean score of the keypoints that are peaks, times missing_factor ^ (number of the others).
    """
    x, y, score = graphs.unbind(2)
    present = score > 0

    def side(value: Tensor, corners: tuple[int, int]) -> Tensor:
        has = present[:, corners]
        has = has | ~has.any(1, keepdim=True)
        return torch.where(has, value[:, corners], 0).sum(1) / has.sum(1)

    boxes = torch.stack((side(x, LEFT), side(y, TOP), side(x, RIGHT), side(y, BOTTOM)), dim=1)
    count = present.sum(1)
    return boxes, score.sum(1) / count.clamp(min=1) * missing_factor ** (NUM_KEYPOINTS - count)


def _nearest(peaks: Tensor, types: Tensor, points: Tensor, radius: float) -> Tensor:
    """For each point [P,Q,2], x, y, the nearest peak of type [P,Q] in the group of row P: its index, -1 for none.

    Peaks lie in square buckets as wide as the radius, sorted by bucket, row by row: the three buckets beside each other
    are one run of peaks. A point looks into three such runs.
    """
    best = torch.full(types.shape, -1, dtype=torch.long, device=peaks.device)
    if not len(peaks):
        return best
    side = max(float(radius), 1.0)
    points = points.double()
    bucket = (peaks[:, 2:].double() / side).floor().long()  # y, x
    rows, columns = (bucket.amax(0) + 1 + 2 * _RIM).unbind()

    def key(group: Tensor, kind: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return ((group * NUM_KEYPOINTS + kind) * rows + row + _RIM) * columns + column + _RIM

    keys, order = key(peaks[:, 0], peaks[:, 1], bucket[:, 0], bucket[:, 1]).sort(stable=True)
    position = peaks[order][:, [3, 2]].double()
    # A point that is no number, or far from all peaks, looks into the rim and finds nobody.
    column, row = (
        torch.nan_to_num(points[..., axis] / side, -1, -1, -1).floor().clamp(-1, int(limit) - 2 * _RIM).long()
        for axis, limit in ((0, columns), (1, rows))
    )
    least = torch.full(types.shape, math.inf, dtype=torch.float64, device=peaks.device)
    for down in (-1, 0, 1):
        first = torch.searchsorted(keys, key(peaks[:, :1], types, row + down, column - 1))
        last = torch.searchsorted(keys, key(peaks[:, :1], types, row + down, column + 1), right=True)
        for step in range(int((last - first).max())):
            place = first + step
            in_run = place < last
            place = place.clamp(max=len(keys) - 1)
            squared = (position[place] - points).square().sum(-1)
            peak = order[place]
            nearer = (squared < least) | (squared == least) & (peak < best)
            nearer &= in_run & (squared <= radius**2)
            least, best = torch.where(nearer, squared, least), torch.where(nearer, peak, best)
    return best

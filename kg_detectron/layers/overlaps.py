"""Which boxes of an image overlap, in a time that grows with their number and not with its square."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Pairs that are looked at together: bounds the memory.
_AT_ONCE = 2**22
# Strips of the plane are so many times as wide as a box on average.
_WIDTH = 4


def overlapping_pairs(boxes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Find the pairs of boxes whose intersection has an area.

    The plane is cut into vertical strips. In each, the boxes are sorted by their upper edge, so that those which a box
    can overlap follow it without a gap. A pair belongs to the strip in which its intersection begins.

    Args:
        boxes: (R,4) xyxy, on the CPU, finite.

    Yields:
        (2,E) int64, some of the pairs, and (E,) the areas of their intersections. Each pair comes once, in no order.
    """
    x1, y1, x2, y2 = boxes.double().unbind(1)
    boxes_with_area = ((x2 > x1) & (y2 > y1)).nonzero()[:, 0]
    if len(boxes_with_area) < 2:
        return
    width = _WIDTH * float((x2 - x1)[boxes_with_area].mean())
    first = (x1[boxes_with_area] / width).floor().long()
    count = (x2[boxes_with_area] / width).floor().long() - first + 1
    box = boxes_with_area.repeat_interleave(count)
    strip = _ranges(first, count)
    # One number for the strip and the rank of the edge in it: ranks compare without rounding.
    values, rank = torch.cat((y1, y2)).unique(return_inverse=True)
    upper, lower = rank.split(len(boxes))
    key, order = (strip * len(values) + upper[box]).sort()
    box, strip = box[order], strip[order]
    after = torch.arange(1, len(box) + 1)
    count = torch.searchsorted(key, strip * len(values) + lower[box]) - after
    start = 0
    total = count.cumsum(0)
    while start < len(box):
        done = int(total[start - 1]) if start else 0
        end = max(start + 1, int(torch.searchsorted(total, done + _AT_ONCE, right=True)))
        one = torch.arange(start, end).repeat_interleave(count[start:end])
        other = _ranges(after[start:end], count[start:end])
        left = torch.maximum(x1[box[one]], x1[box[other]])
        right = torch.minimum(x2[box[one]], x2[box[other]])
        pairs = (left < right) & ((left / width).floor().long() == strip[one])
        found = torch.stack((box[one[pairs]], box[other[pairs]]))
        first_boxes, second_boxes = boxes[found]
        low = torch.maximum(first_boxes[:, :2], second_boxes[:, :2])
        yield found, (torch.minimum(first_boxes[:, 2:], second_boxes[:, 2:]) - low).prod(1)
        start = end


def _ranges(first: Tensor, count: Tensor) -> Tensor:
    """first[0], first[0] + 1, ... count[0] numbers, then those from first[1] on, and so on."""
    before = count.cumsum(0) - count
    return torch.arange(int(count.sum())) + (first - before).repeat_interleave(count)

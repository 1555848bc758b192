"""The keypoints of boxes."""

import torch
from torch import Tensor


def box_keypoints(boxes: Tensor) -> Tensor:
    """Keypoints of boxes, in the order of `graph.KEYPOINTS`.

    Args:
        boxes: (M, 4) x1, y1, x2, y2, continuous (x2 = last pixel + 1).

    Returns:
        (M, 5, 2) x, y as pixel indices: the four corners and their mean.
    """
    x1, y1, x2, y2 = boxes[:, 0], boxes[:, 1], boxes[:, 2] - 1, boxes[:, 3] - 1
    x = torch.stack((x1, x2, x1, x2, (x1 + x2) / 2), dim=1)
    y = torch.stack((y1, y1, y2, y2, (y1 + y2) / 2), dim=1)
    return torch.stack((x, y), dim=2)

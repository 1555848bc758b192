"""Non-maximum suppression: torchvision's, with a fake of our own.

Torchvision's tells `torch.export` that two boxes at least remain, and an exported program stops where fewer do.
"""

import torch
import torchvision
from torch import Tensor


@torch.library.custom_op("kg_detectron::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Drop every box that overlaps a better one by more than the threshold.

    Args:
        boxes: (R,4) xyxy.
        scores: (R,).
        threshold: intersection over union.

    Returns:
        int64, the indices of those that remain, by falling score.
    """
    return torchvision.ops.nms(boxes, scores, threshold)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)

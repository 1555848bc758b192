"""From the maps of CornerNet to boxes: peaks, pairs by tag, soft suppression."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from kg_detectron.modeling.cornernet.heads import CornerMaps
from kg_detectron.modeling.cornernet.settings import CornerDecodingSettings


@torch.no_grad()
def decode_corners(
    maps: CornerMaps, stride: int, size: tuple[int, int], settings: CornerDecodingSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes of one image. Corners of two classes are no pair; boxes of all classes suppress each other.

    Args:
        maps: of one image, without the axis N.
        stride: of the maps.
        size: (H, W) of the image, input pixels, without the padding.
        settings: of the steps.

    Returns:
        Boxes (R, 4), xyxy continuous input pixels, clipped to the image, scores (R,), falling, and classes (R,) int64,
        from 1.
    """
    probability = maps.heatmap.float().sigmoid()  # [2,K,h,w]
    peak = (max_pool2d(probability, 3, stride=1, padding=1) == probability) & (probability > settings.peak_threshold)
    points, scores, tags, kinds = [], [], [], []
    for corner in range(2):
        kind, y, x = peak[corner].nonzero().unbind(1)
        score, best = probability[corner, kind, y, x].sort(descending=True, stable=True)
        best = best[: settings.max_corners]
        y, x = y[best], x[best]
        kinds.append(kind[best])
        points.append((torch.stack((x, y), dim=1) + maps.offset.float()[corner, :, y, x].T) * stride)
        scores.append(score[: settings.max_corners])
        tags.append(maps.tag.float()[corner, y, x])
    # From the centres of the corner pixels to the edges of the box.
    low, high = points[0] - 0.5, points[1] + 0.5
    pair = ((tags[0][:, None] - tags[1]).abs() <= settings.tag_distance) & (kinds[0][:, None] == kinds[1])
    pair &= (high[None] > low[:, None]).all(2)
    first, last = pair.nonzero().unbind(1)
    score, best = ((scores[0][first] + scores[1][last]) / 2).sort(descending=True, stable=True)
    best = best[: settings.max_candidates]
    limit = low.new_tensor([size[1], size[0]] * 2)
    boxes = torch.minimum(torch.cat((low[first[best]], high[last[best]]), dim=1).clamp(min=0), limit)
    visible = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, score = boxes[visible], score[: settings.max_candidates][visible]
    labels = 1 + kinds[0][first[best]][visible]
    order, score = soft_nms(boxes, score, settings.overlap_sigma, settings.min_score)
    return boxes[order], score, labels[order]


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float, min_score: float) -> tuple[Tensor, Tensor]:
    """Soft-NMS with a Gaussian (Bodla et al. 2017).

    The box with the highest score of those that are left is taken, again and again, and multiplies the scores of the
    others by exp(-u^2 / sigma), u being the intersection over union, until all that are left are below `min_score`.

    Args:
        boxes: (R, 4) xyxy.
        scores: (R,).
        sigma: above 0.
        min_score: 0..1.

    Returns:
        int64, the indices of the boxes that were taken, and their scores, falling.
    """
    left, value = boxes.double().cpu().numpy(), scores.double().cpu().numpy()
    index = np.arange(len(value))
    order, taken = [], []
    while True:
        above = value >= min_score
        left, value, index = left[above], value[above], index[above]
        if not len(value):
            break
        best = int(value.argmax())
        order.append(index[best])
        taken.append(value[best])
        sides = np.minimum(left[:, 2:], left[best, 2:]) - np.maximum(left[:, :2], left[best, :2])
        shared = sides.clip(0).prod(1)
        area = (left[:, 2:] - left[:, :2]).prod(1)
        value = value * np.exp(-((shared / (area + area[best] - shared)) ** 2) / sigma)
        value[best] = -1
    found = torch.tensor(order, dtype=torch.int64, device=boxes.device)
    return found, scores.new_tensor(taken)

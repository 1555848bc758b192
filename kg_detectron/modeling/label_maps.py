"""Cells as label maps: from the masks of a training target, and back to cells.

N images, M cells; H, W: an image's height and width in pixels; h, w: those of the network's input.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.modeling.instance_net import cells_of_image


def label_maps(masks: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The masks of each image as one map. Where masks overlap, the first one wins.

    Args:
        masks: N tensors (M, H, W), bool.
        size: (h, w), which holds every image.

    Returns:
        (N, h, w) int64: 0 background and padding, 1..M the cells in their order.
    """
    labels = torch.zeros((len(masks), *size), dtype=torch.int64, device=masks[0].device)
    for i, cells in enumerate(masks):
        if len(cells):
            height, width = cells.shape[1:]
            first = cells.byte().argmax(0) + 1
            labels[i, :height, :width] = torch.where(cells.any(0), first, 0)
    return labels


def cells_of_labels(labels: np.ndarray, scores: Tensor, classes: Tensor | None = None) -> Cells:
    """The cells of a label image, by falling score; of equal ones the lower label comes first.

    Args:
        labels: (H, W) integers, 0 background, 1..K. Labels may have no pixel: those cells are left out.
        scores: (K,), of the labels 1..K.
        classes: (K,) int64 of the labels 1..K, from 1; 1 by default.
    """
    numbers = np.unique(labels)
    present = torch.from_numpy(numbers[numbers > 0].astype(np.int64) - 1).to(scores.device)
    masks = MaskCrops.from_label_image(labels)
    falling, order = scores[present].sort(descending=True, stable=True)
    masks = masks[order].to(scores.device)
    of_cells = None if classes is None else classes[present][order]
    return cells_of_image(masks.windows.to(scores), falling, masks, of_cells)

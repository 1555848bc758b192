"""Training targets of DCAN: which pixels are cells, and which are contours."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad


def contour_targets(labels: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Targets of label maps.

    Args:
        labels: (N, h, w) int64, 0 background.
        radius: of the contours, pixels.

    Returns:
        Objects (N, h, w): pixels of any cell. Contours (N, h, w): pixels of a cell that share an edge with a pixel of
        another one or of the background, and all pixels within the radius of them on both axes. float32 of 0 and 1.
        The image's border is no contour.
    """
    around = pad(labels[:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0]
    outermost = torch.zeros_like(labels, dtype=torch.bool)
    for neighbour in (around[:, :-2, 1:-1], around[:, 2:, 1:-1], around[:, 1:-1, :-2], around[:, 1:-1, 2:]):
        outermost |= neighbour != labels
    contours = (outermost & (labels > 0)).float()
    return (labels > 0).float(), max_pool2d(contours[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]

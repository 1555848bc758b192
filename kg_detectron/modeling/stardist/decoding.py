"""From the maps of StarDist to cells: candidates, suppression, rendering."""

import torch
from torch import Tensor

from kg_detectron.cells import Cells
from kg_detectron.modeling.label_maps import cells_of_labels
from kg_detectron.modeling.stardist.polygons import polygon_pixels, suppress
from kg_detectron.modeling.stardist.settings import StarDecodingSettings

# Predicted distances are at least so many pixels.
_SHORTEST = 1e-3


@torch.no_grad()
def decode_stars(
    probability: Tensor,
    distances: Tensor,
    stride: int,
    size: tuple[int, int],
    settings: StarDecodingSettings,
    classes: Tensor | None = None,
) -> Cells:
    """The cells of one image. A pixel in several stars belongs to the one of the highest probability.

    Args:
        probability: (h, w) of the map, 0..1.
        distances: (K, h, w), pixels of the input.
        stride: of the maps.
        size: (H, W) of the image, input pixels, without the padding.
        settings: the thresholds.
        classes: (h, w) int64, the class of each pixel if it is of a cell; 1 by default.

    Returns:
        The cells; their scores are the object probabilities of their centres, and their classes those of their centres.
    """
    row, column = (probability > settings.probability_threshold).nonzero().unbind(1)
    centres = torch.stack((column + 0.5, row + 0.5), dim=1) * stride
    inside = (centres < centres.new_tensor([size[1], size[0]])).all(1)
    row, column, centres = row[inside], column[inside], centres[inside]
    scores = probability[row, column]
    rays = distances[:, row, column].T.clamp(min=_SHORTEST)
    kept = suppress(centres, rays, scores, settings.overlap_threshold)
    labels = torch.zeros(size, dtype=torch.int32, device=probability.device)
    for number in range(len(kept), 0, -1):
        x, y = polygon_pixels(centres[kept[number - 1]], rays[kept[number - 1]], size).unbind(1)
        labels[y, x] = number
    of_cells = None if classes is None else classes[row[kept], column[kept]]
    return cells_of_labels(labels.cpu().numpy(), scores[kept], of_cells)

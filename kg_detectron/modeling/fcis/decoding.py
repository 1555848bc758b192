"""From regions with scores and masks to cells: suppression, and a vote of the regions of each cell."""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.layers.nms import nms
from kg_detectron.modeling.fcis.settings import RegionDecodingSettings
from kg_detectron.modeling.instance_net import cells_of_image


@torch.no_grad()
def decode_regions(
    boxes: Tensor, scores: Tensor, masks: Tensor, size: tuple[int, int], settings: RegionDecodingSettings
) -> Cells:
    """The cells of one image; their boxes are those of their masks. A cell without a pixel is left out.

    Args:
        boxes: (R, 4), xyxy continuous input pixels, within the image.
        scores: (R,), 0..1.
        masks: (R, S, S), probabilities at the samples of each region.
        size: (H, W) of the image, input pixels, without the padding.
        settings: the thresholds.
    """
    from torchvision.ops import box_iou  # torchvision takes seconds to import

    large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1) & (scores >= settings.min_score)
    boxes, scores, masks = boxes[large], scores[large], masks[large]
    crops, windows, found = [], [], []
    for best in nms(boxes, scores, settings.overlap_threshold).tolist():
        voters = box_iou(boxes[best : best + 1], boxes)[0] >= settings.merge_overlap
        voters[best] = True
        crop, window = vote(boxes[voters], scores[voters], masks[voters], settings.mask_threshold)
        if crop.any():
            crops.append(crop)
            windows.append(window)
            found.append(best)
    cells = MaskCrops(crops, torch.tensor(windows, dtype=torch.int64).reshape(-1, 4), size)
    return cells_of_image(cells.extents().to(boxes), scores[found], cells)


def vote(boxes: Tensor, scores: Tensor, masks: Tensor, threshold: float) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The mask on which regions agree: pixels that enough of them hold, each counting by its score.

    Args:
        boxes: (R, 4), R at least 1. scores: (R,). masks: (R, S, S), probabilities.
        threshold: see `RegionDecodingSettings`.

    Returns:
        Bool (h, w), and its window x1, y1, x2, y2, which holds all boxes.
    """
    x1, y1 = boxes[:, :2].amin(0).floor().long().tolist()
    x2, y2 = boxes[:, 2:].amax(0).ceil().long().tolist()
    x, y = (torch.arange(low, high, device=boxes.device) + 0.5 for low, high in ((x1, x2), (y1, y2)))
    places = []
    for axis, centres in enumerate((x, y)):
        edges = boxes[:, axis, None], boxes[:, axis + 2, None]
        places.append(2 * (centres - edges[0]) / (edges[1] - edges[0]) - 1)  # [R,w], [R,h]: -1..1 in the box
    right, down = places
    grid = torch.stack(
        (right[:, None].expand(-1, len(y), -1), down[:, :, None].expand(-1, -1, len(x))), dim=3
    )  # [R,h,w,2]
    held = grid_sample(masks[:, None], grid, padding_mode="border", align_corners=False)[:, 0] >= threshold
    held &= (grid.abs() <= 1).all(3)
    share = torch.einsum("r,rhw->hw", scores / scores.sum(), held.to(scores))
    return share >= threshold, (x1, y1, x2, y2)

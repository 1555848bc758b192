"""Confidence of cells: a head that sees the features inside each mask, and says whether the mask is a cell. Ours.

The paper's score is the mean of the keypoints' votes. It knows nothing of what the box holds: a slender cell whose
corners lie on the background gets few votes, however clear it is. The head is fitted to a network that has been
trained, see `kg_detectron.training.confidence`: to the boxes that it finds in the training images, right and wrong
ones, and to how well the masks in them fit.

Letters: R crops, M cells, C channels, P pixels.
"""

import torch
from torch import Tensor, nn

from kg_detectron.layers import crop_pixels
from kg_detectron.modeling.packed_crops import window_sizes
from kg_detectron.modeling.precision import full_precision

# Hidden channels of the head's two hidden layers.
_HIDDEN = 128
# IoU from which a mask is worth anything, and from which it is as good as any.
_WORTHLESS, _PERFECT = 0.4, 0.8


class ConfidenceHead(nn.Module):
    """Confidence logits of masks from the features that `masked_mean` gives of each, and from their size.

    Training leaves it as it is: it is fitted to a trained network, see `kg_detectron.training.confidence`.

    Args:
        channels: C of the features.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels + 2))
        self.register_buffer("deviation", torch.ones(channels + 2))
        last = nn.Linear(_HIDDEN, 1)
        nn.init.zeros_(last.weight)  # until it is fitted, all masks are alike
        self.layers = nn.Sequential(
            nn.Linear(channels + 2, _HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(inplace=True),
            last,
        ).requires_grad_(False)

    def forward(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Logits (R,) of features (R, C) and crops of sizes (R, 2), height and width in pixels of the network's
        input."""
        with full_precision(features.device):
            return self.logits(head_inputs(features, sizes))

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits (R,) of `head_inputs`."""
        return self.layers((inputs - self.mean) / self.deviation)[:, 0]


def head_inputs(features: Tensor, sizes: Tensor) -> Tensor:
    """(R, C + 2) of features (R, C) and the sizes (R, 2) of crops: the features, then the logarithms of the sides."""
    sides = sizes.to(features.device).float().sort(dim=1).values.clamp(min=1).log()
    return torch.cat((features.float(), sides), dim=1)


def worth(ious: Tensor) -> Tensor:
    """What masks of an IoU with their cell are worth, 0..1: nothing up to 0.4, and from there linearly 1 at 0.8."""
    return ((ious - _WORTHLESS) / (_PERFECT - _WORTHLESS)).clamp(0, 1)


def best_ious(inside: Tensor, windows: Tensor, labels: Tensor) -> Tensor:
    """The highest intersection over union that each predicted mask of an image has with a true one.

    Args:
        inside: (P,) bool, whether the pixels of the R crops, one crop after another, belong to the predicted mask.
        windows: (R, 4) int64 xyxy, places of the crops.
        labels: (H, W) int64, the true cells 1..M, 0 background.

    Returns:
        (R,) float32; 0 where there are no cells.
    """
    cells, width = int(labels.max()), labels.shape[1]
    if not cells or not len(windows):
        return inside.new_zeros(len(windows), dtype=torch.float32)
    crop, y, x = crop_pixels(window_sizes(windows), inside.device)
    left, top = windows[:, :2].to(inside.device)[crop].unbind(1)
    number = labels.flatten()[(top + y) * width + left + x]
    table = torch.zeros(len(windows) * (cells + 1), device=inside.device)
    table.index_add_(0, crop * (cells + 1) + number, inside.float())
    shared = table.view(len(windows), cells + 1)
    area = torch.bincount(labels.flatten(), minlength=cells + 1)
    union = shared.sum(1, keepdim=True) + area[None] - shared
    return (shared / union.clamp(min=1))[:, 1:].amax(1)

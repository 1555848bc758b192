"""Confidence of cells: a head that sees the features inside each mask, and says whether the mask is a cell. Ours.

The paper's score is the mean of the keypoints' votes. It knows nothing of what the box holds: a slender cell whose
corners lie on the background gets few votes, however clear it is. The head learns from what the network itself finds in
training: from the boxes that are decoded, right and wrong ones, and from how well the masks in them fit.

Letters: N images, R crops, M cells, C channels, P pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.layers import crop_pixels
from kg_detectron.modeling.packed_crops import window_sizes
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.processes import loss_divisor, shared_total

# Hidden channels of the head's two hidden layers.
_HIDDEN = 128
# IoU from which a mask is worth anything, and from which it is as good as any.
_WORTHLESS, _PERFECT = 0.4, 0.8


class _Standardised(nn.BatchNorm1d):
    """Inputs (R, C) less their running mean, over the root of their running variance, in training too.

    Unlike those of batch normalisation, the statistics are of the crops of all processes, and one crop is enough.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6, momentum=0.01, affine=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self._take_in(inputs.detach())
        return (inputs - self.running_mean) * (self.running_var + self.eps).rsqrt()

    @torch.no_grad()
    def _take_in(self, inputs: Tensor) -> None:
        sums = torch.cat((inputs.sum(0), inputs.square().sum(0), inputs.new_tensor([len(inputs)]))).double()
        *moments, count = shared_total(sums).split((inputs.shape[1], inputs.shape[1], 1))
        if count < 1:
            return
        self.num_batches_tracked += 1
        share = max(self.momentum or 0, 1 / int(self.num_batches_tracked))
        mean, square = (moment / count for moment in moments)
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_((square - mean.square()).clamp(min=0).to(self.running_var), share)


class ConfidenceHead(nn.Module):
    """Confidence logits of masks from the features that `masked_mean` gives of each, and from their size.

    The inputs are standardised by running statistics, which training keeps: they come from maps of very different
    scale.

    Args:
        channels: C of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.standardised = _Standardised(channels + 2)
        self.layers = nn.Sequential(
            nn.Linear(channels + 2, _HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(_HIDDEN, 1),
        )

    def forward(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Logits (R,) of features (R, C) and crops of sizes (R, 2), height and width in pixels of the network's input.

        In training the running statistics take these in.
        """
        sides = sizes.to(self.standardised.running_mean).sort(dim=1).values.clamp(min=1).log()
        with full_precision(features.device):
            inputs = torch.cat((features.to(sides), sides), dim=1)
            return self.layers(self.standardised(inputs))[:, 0]

    def loss(self, logits: Tensor, ious: Tensor) -> Tensor:
        """Binary cross entropy with what masks of IoU (R,) are worth, see `worth`; the mean over the masks of all
        processes, and 0 where there are none."""
        total = binary_cross_entropy_with_logits(logits, worth(ious).to(logits), reduction="sum")
        return total / loss_divisor(torch.tensor([len(ious)], device=logits.device))[0].to(total)


def worth(ious: Tensor) -> Tensor:
    """What masks of an IoU with their cell are worth, 0..1: nothing up to 0.4, and from there linearly 1 at 0.8."""
    return ((ious - _WORTHLESS) / (_PERFECT - _WORTHLESS)).clamp(0, 1)


@torch.no_grad()
def best_ious(inside: Tensor, windows: Tensor, counts: Sequence[int], masks: Sequence[Tensor]) -> Tensor:
    """The highest intersection over union that each predicted mask has with a true one of its image.

    Args:
        inside: (P,) bool, whether the pixels of the R crops, one crop after another, belong to the predicted mask.
        windows: (R, 4) int64 xyxy, places of the crops.
        counts: crops of each of the N images.
        masks: N tensors (M, H, W), bool, M may differ. Where some overlap, a pixel counts for the last of them.

    Returns:
        (R,) float32; 0 in an image without cells.
    """
    counts, sizes = list(counts), window_sizes(windows)
    results = []
    pixels = inside.split([int(part.prod(1).sum()) for part in sizes.split(counts)])
    parts = zip(pixels, windows.split(counts), sizes.split(counts), masks, strict=True)
    for predicted, places, of_crops, of_image in parts:
        cells, height, width = of_image.shape
        if not cells or not len(places):
            results.append(predicted.new_zeros(len(places), dtype=torch.float32))
            continue
        cell, row, column = of_image.nonzero(as_tuple=True)
        owner = torch.zeros(height * width, dtype=torch.long, device=of_image.device)
        owner.scatter_reduce_(0, row * width + column, cell + 1, "amax")
        crop, y, x = crop_pixels(of_crops, predicted.device)
        left, top = places[:, :2].to(predicted.device)[crop].unbind(1)
        number = owner[(top + y) * width + left + x]
        table = torch.zeros(len(places) * (cells + 1), device=predicted.device, dtype=torch.float32)
        table.index_add_(0, crop * (cells + 1) + number, predicted.float())
        shared = table.view(len(places), cells + 1)
        area = torch.bincount(owner, minlength=cells + 1)
        union = shared.sum(1, keepdim=True) + area[None] - shared
        results.append((shared / union.clamp(min=1))[:, 1:].amax(1))
    return torch.cat(results)

"""Training targets of FCIS: what each region should be."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kg_detectron.modeling.fcis.regions import box_offsets


class RegionTargets(NamedTuple):
    """Targets of the R regions of all images."""

    cell: Tensor  # [R] bool: whether the region is some cell's
    offset: Tensor  # [R,4] of the cell's box, see `box_offsets`; 0 of the others
    mask: Tensor  # [R,S,S] 0 or 1: the cell's pixels at the samples; 0 of the others
    image: Tensor  # [R] int64


def region_targets(
    regions: Sequence[Tensor],
    boxes: Sequence[Tensor],
    masks: Sequence[Tensor],
    samples: int,
    positive_overlap: float = 0.5,
    mask_threshold: float = 0.4,
) -> RegionTargets:
    """Targets of regions. A region belongs to the cell whose box it overlaps most, if that is enough.

    Args:
        regions: N tensors (R, 4), xyxy continuous, input pixels.
        boxes: N tensors (M, 4).
        masks: N tensors (M, H, W), bool.
        samples: S, to a side of a region.
        positive_overlap: see `RegionLossSettings`.
        mask_threshold: part of a sample's square from which on it is the cell's.
    """
    from torchvision.ops import box_iou, roi_align  # torchvision takes seconds to import

    parts = []
    for i, (own, true, pixels) in enumerate(zip(regions, boxes, masks, strict=True)):
        cell = torch.zeros(len(own), dtype=torch.bool, device=own.device)
        offset, mask = torch.zeros_like(own), own.new_zeros(len(own), samples, samples)
        if len(true) and len(own):
            overlap, best = box_iou(own, true.to(own)).max(1)
            cell = overlap >= positive_overlap
            best = best[cell]
            offset[cell] = box_offsets(own[cell], true.to(own)[best])
            rows = torch.cat((best[:, None].to(own), own[cell]), dim=1)
            shares = roi_align(pixels[:, None].to(own), rows, samples, sampling_ratio=2, aligned=True)[:, 0]
            mask[cell] = (shares >= mask_threshold).to(mask)
        parts.append(RegionTargets(cell, offset, mask, torch.full((len(own),), i, device=own.device)))
    return RegionTargets(*(torch.cat(part) for part in zip(*parts, strict=True)))

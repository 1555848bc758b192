"""The gradients of every loss are those of finite differences, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kg_detectron.modeling import TargetSettings, keypoint_losses, mask_loss
from kg_detectron.modeling.cornernet.heads import CornerMaps
from kg_detectron.modeling.cornernet.losses import corner_losses
from kg_detectron.modeling.cornernet.settings import CornerLossSettings
from kg_detectron.modeling.cornernet.targets import corner_targets
from kg_detectron.modeling.cosine_embedding.losses import embedding_loss
from kg_detectron.modeling.dcan.losses import Branch, dcan_losses
from kg_detectron.modeling.dcan.settings import ContourHeadSettings
from kg_detectron.modeling.fcis.losses import region_losses
from kg_detectron.modeling.fcis.regions import assembled, pooled, region_rows
from kg_detectron.modeling.fcis.settings import RegionLossSettings
from kg_detectron.modeling.fcis.targets import region_targets
from kg_detectron.modeling.keypoint_graph.heads import KeypointMaps
from kg_detectron.modeling.stardist.losses import star_class_loss, star_losses
from kg_detectron.modeling.stardist.settings import StarHeadSettings
from kg_detectron.modeling.stardist.targets import star_targets

SIDE = 16
BOXES = torch.tensor([[1.0, 2, 8, 9], [7, 6, 15, 14]])


def masks_of_boxes() -> Tensor:
    masks = torch.zeros(len(BOXES), SIDE, SIDE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def label_map() -> Tensor:
    labels = torch.zeros(1, SIDE, SIDE, dtype=torch.int64)
    for number, mask in enumerate(masks_of_boxes(), start=1):
        labels[0, mask] = number
    return labels


def keypoint_graph(heatmap: Tensor, single: Tensor, group: Tensor) -> dict[str, Tensor]:
    maps = [KeypointMaps(heatmap, single, group, stride=4)]
    return keypoint_losses(maps, [BOXES], (SIDE, SIDE), TargetSettings(radius=1.0, min_side=1.0))


def segmentation_branch(logits: Tensor) -> dict[str, Tensor]:
    return {"loss_mask": mask_loss(logits, torch.arange(12) % 3 == 0, torch.tensor([4, 8]))}


def cornernet(heatmap: Tensor, tag: Tensor, offset: Tensor) -> dict[str, Tensor]:
    return corner_losses(
        CornerMaps(heatmap, tag, offset),
        corner_targets([BOXES], (SIDE, SIDE), 4, labels=[torch.tensor([2, 0])], classes=2),  # one of no known class
        CornerLossSettings(),
        torch.tensor([1.0, 0.5]),
    )


def dcan(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    objects = (label_map()[:, ::4, ::4] > 0).float()
    branches = [Branch([maps[:1], maps[1:]], maps.sum(0, keepdim=True)) for maps in (first, second)]
    return dcan_losses(*branches, (objects, 1 - objects), ContourHeadSettings())


def cosine_embedding(embedding: Tensor) -> dict[str, Tensor]:
    return {"loss_embedding": embedding_loss(embedding, label_map()[0, ::4, ::4], 3.0)}


def stardist(logits: Tensor, distances: Tensor, classes: Tensor) -> dict[str, Tensor]:
    settings = StarHeadSettings(rays=4, background_weight=0.1)
    losses = star_losses(logits, distances, *star_targets(label_map(), 4, 4), settings)
    known = torch.where(label_map()[:, ::4, ::4] == 2, -1, label_map()[:, ::4, ::4])  # one of no known class
    return losses | {"loss_class": star_class_loss(classes, known, torch.tensor([0.5, 2.0]))}


def fcis(score_maps: Tensor, box_maps: Tensor) -> dict[str, Tensor]:
    """With the assembly of the maps for regions, whose operator is torchvision's."""
    regions = torch.cat(
        (BOXES, BOXES + torch.tensor([1.0, 0, 1, -1]), BOXES - BOXES.mean(1, keepdim=True) / 2)
    ).double()
    targets = region_targets([regions], [BOXES], [masks_of_boxes()], 6)
    assert 0 < int(targets.cell.sum()) < len(regions)
    rows = region_rows([regions.clamp(min=0)])
    scores = assembled(score_maps, rows, 4, 2).unflatten(1, (2, 2))
    return region_losses(scores, pooled(box_maps, rows, 4, 2), targets, RegionLossSettings(hard_regions=4))


# By name, the losses and the shapes that they take.
LOSSES: dict[str, tuple[Callable[..., dict[str, Tensor]], list[tuple[int, ...]]]] = {
    "keypoint_graph": (keypoint_graph, [(1, 5, 4, 4), (1, 10, 4, 4), (1, 40, 4, 4)]),
    "segmentation_branch": (segmentation_branch, [(12,)]),
    "cornernet": (cornernet, [(1, 2, 2, 4, 4), (1, 2, 4, 4), (1, 2, 2, 4, 4)]),
    "dcan": (dcan, [(2, 4, 4), (2, 4, 4)]),
    "cosine_embedding": (cosine_embedding, [(3, 4, 4)]),
    "stardist": (stardist, [(1, 4, 4), (1, 4, 4, 4), (1, 3, 4, 4)]),
    "fcis": (fcis, [(1, 16, 4, 4), (1, 16, 4, 4)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    losses, shapes = LOSSES[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    values = losses(*inputs)
    assert all(
        value.dtype == torch.float64 and value.dim() == 0 and float(value.detach()) > 0 for value in values.values()
    )
    assert all(gradient.any() for gradient in torch.autograd.grad(sum(values.values()), inputs))
    assert gradcheck(lambda *maps: tuple(losses(*maps).values()), inputs)

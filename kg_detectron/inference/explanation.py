"""Why a model found the boxes that it found in one image, and why not others (paper, section 2.1 and figure 4)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from kg_detectron.graph import KEYPOINTS
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.modeling.instance_net import cells_of_image
from kg_detectron.modeling.keypoint_graph.decoding import Candidates
from kg_detectron.modeling.precision import autocast

# What became of a group of keypoints.
BOX = "became a box"
TOO_FEW = "too few keypoints"
NO_COMBINATION = "no combination that gives a box"
NO_AREA = "corners cross, or lie outside the image"
SUPPRESSED = "suppressed by a better box"
FATES = (BOX, SUPPRESSED, NO_AREA, NO_COMBINATION, TOO_FEW)


@dataclass(frozen=True)
class ExplainedScale:
    """The maps of one scale, and the keypoints found there.

    Attributes:
        stride: of the scale.
        heatmap: (5,h,w) probabilities.
        votes: (5,h,w), smoothed.
        peaks: (P,4) keypoint, x, y, score; x and y continuous in pixels of the image.
    """

    stride: int
    heatmap: np.ndarray
    votes: np.ndarray
    peaks: np.ndarray


@dataclass(frozen=True)
class ExplainedGroup:
    """A group of keypoints. Coordinates are continuous, in pixels of the image.

    Attributes:
        scale: its index.
        keypoints: (5,3) x, y, score; score 0 = missing.
        opener: the keypoint that opened the group, the best of it.
        expected: (5,2) x, y, where the group offsets of the opener point to; its own place for itself.
        box: (4,) xyxy where one was retrieved, clipped to the image; with a `mask_margin` the prediction
            has the box of the mask instead.
        fate: one of `FATES`.
        number: of the box in the result, from 0 by falling score; of a suppressed one, the box that suppressed it.
    """

    scale: int
    keypoints: np.ndarray
    opener: int
    expected: np.ndarray
    box: np.ndarray | None
    fate: str
    number: int | None

    @property
    def reason(self) -> str:
        """The fate in full."""
        if self.fate == SUPPRESSED and self.number is not None:
            return f"suppressed by box {self.number + 1}"
        if self.fate in (TOO_FEW, NO_COMBINATION):
            names = [name for name, point in zip(KEYPOINTS, self.keypoints, strict=True) if point[2] > 0]
            return f"{self.fate}: {', '.join(names)}"
        return self.fate


@dataclass(frozen=True)
class Explanation:
    """Everything between the image and its boxes.

    Attributes:
        scales: those that the model has.
        groups: in the order of the scales, and there in the order in which they were opened.
        input_scale: (x, y), pixels of the image for one of the network's input.
        border: pixels of the image that the network's input begins before it.
    """

    scales: list[ExplainedScale]
    groups: list[ExplainedGroup]
    input_scale: tuple[float, float]
    border: int = 0

    def summary(self) -> str:
        """How many groups met which fate, in a sentence."""
        counts = [(sum(group.fate == fate for group in self.groups), fate) for fate in FATES]
        peaks = sum(len(scale.peaks) for scale in self.scales)
        parts = ", ".join(f"{count} {fate}" for count, fate in counts if count)
        return f"{peaks} keypoints, {len(self.groups)} groups" + (f": {parts}." if parts else ".")


@torch.no_grad()
def explain(
    model: InstanceNet, image: np.ndarray, *, scale: float | None = None, view: str | None = None
) -> Explanation:
    """The stages of a prediction, and what lies between them.

    Args:
        model: a keypoint graph in evaluation mode.
        image, scale: as for `predict`; the scale of its result explains a prediction that had a diameter.
        view: that of the prediction's result; None lets the model choose.

    Raises:
        ValueError: as `predict` does, or a model of another method, which has no groups of keypoints.
    """
    if not isinstance(model, KeypointGraphNet):
        raise ValueError(f"model: only keypoint graphs can be explained, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected evaluation mode, call model.eval() first")
    image_size = image.shape[0], image.shape[1]
    seen, _ = model.network_image(image, scale=scale, view=view)
    batch, size = model.batch_of(seen)
    sizes = [size]
    with autocast(model.precision, batch.device):
        maps, crop_maps = model.maps(batch)
        ((boxes, scores),) = zip(*model.boxes(maps, sizes), strict=True)
        ((masks, _, confidence),) = model.segmentation.predict_cells(crop_maps, [boxes], sizes)
    boxes = model.segmentation.cell_boxes(boxes, masks)
    order, ranked_scores = model.ranking(boxes, scores, masks, confidence)
    cells = model.rated(cells_of_image(boxes[order], ranked_scores, masks[order], labels=order))
    # The numbers, as labels, of those that are cells of the image, not of its border.
    order = cells.in_frame(image_size, seen.scale, seen.border).labels
    decoder, strides = model.decoder, [scale.stride for scale in maps]
    factor = 1 / np.array(seen.scale[::-1])

    peaks = decoder.find(maps)
    scales = []
    for index, (maps_of_scale, votes) in enumerate(zip(maps, decoder.vote(maps), strict=True)):
        of_scale = peaks.peaks[:, 0] == index  # of one image, the group is the scale
        keypoint, y, x = peaks.peaks[of_scale, 1:].cpu().numpy().T
        places = (np.stack((x, y), axis=1) + 0.5) * maps_of_scale.stride * factor - seen.border
        score = peaks.scores[of_scale].cpu().numpy()
        heatmap = maps_of_scale.heatmap[0].float().sigmoid().cpu().numpy()
        points = np.column_stack((keypoint, places, score))
        scales.append(ExplainedScale(maps_of_scale.stride, heatmap, votes[0].cpu().numpy(), points))

    candidates = decoder.retrieve(peaks, sizes, strides)
    kept = decoder.suppress(candidates, 0)
    fates = _fates(candidates, kept, order, decoder.settings.nms_threshold)
    box_of = {graph: r for r, graph in enumerate(candidates.graph.tolist())}
    displacement_of = {
        tuple(p): d for p, d in zip(peaks.peaks.tolist(), peaks.displacements.cpu().numpy(), strict=True)
    }
    groups = []
    opened = zip(candidates.graphs.cpu().numpy(), candidates.group.tolist(), candidates.opener.tolist(), strict=True)
    for g, (graph, index, opener) in enumerate(opened):
        x, y = graph[opener, :2]
        others = [k for k in range(len(KEYPOINTS)) if k != opener]
        expected = np.tile(graph[opener, :2], (len(KEYPOINTS), 1))
        expected[others] += displacement_of[index, opener, int(y), int(x)]
        places, expected = ((p + 0.5) * strides[index] * factor - seen.border for p in (graph[:, :2], expected))
        keypoints = np.column_stack((places, graph[:, 2]))
        box = None
        if g in box_of:
            corners = candidates.boxes[box_of[g]].cpu().reshape(2, 2).numpy() * factor - seen.border
            box = corners.clip(0, image_size[::-1]).ravel()
        fate, number = fates.get(g, (TOO_FEW if (graph[:, 2] > 0).sum() < 2 else NO_COMBINATION, None))
        groups.append(ExplainedGroup(index, keypoints, opener, expected, box, fate, number))
    return Explanation(scales, groups, tuple(factor.tolist()), seen.border)


def _fates(
    candidates: Candidates, kept: Tensor, order: Tensor, nms_threshold: float
) -> dict[int, tuple[str, int | None]]:
    """What became of each graph that gave a box: its fate, and the number of the box that it became or yielded to.

    Args:
        kept: the boxes that remain, by falling score as NMS saw it.
        order: of these boxes in the result, without those outside the image.
    """
    in_result = {i: number for number, i in enumerate(order.tolist())}
    place = {r: i for i, r in enumerate(kept.tolist())}
    over = box_iou(candidates.boxes, candidates.boxes[kept]) > nms_threshold
    has_area = candidates.has_area.tolist()
    fates: dict[int, tuple[str, int | None]] = {}
    for r, graph in enumerate(candidates.graph.tolist()):
        if r in place:
            number = in_result.get(place[r])
            fates[graph] = (NO_AREA if number is None else BOX), number
        elif has_area[r]:
            # By the first, for NMS goes by falling score.
            fates[graph] = SUPPRESSED, in_result.get(int(over[r].int().argmax()))
        else:
            fates[graph] = NO_AREA, None
    return fates

"""From the maps of all scales to boxes: vote, smooth, peaks, group, retrieve, NMS (paper, figure 1c)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kg_detectron.layers import (
    find_peaks,
    gather_displacements,
    graphs_to_boxes,
    group_peaks,
    hough_vote,
    nms,
    smooth_votes,
)
from kg_detectron.modeling.keypoint_graph.completion import complete_graphs, completed_boxes
from kg_detectron.modeling.keypoint_graph.heads import KeypointMaps
from kg_detectron.modeling.settings import require


class Peaks(NamedTuple):
    """Keypoints found at all scales of N images, and where each expects the other keypoints of its cell.

    They are ordered by group (image + N * index of the scale), then by falling score, then keypoint, y, x, as
    `find_peaks` gives them.
    """

    peaks: Tensor  # [P,4] int64 group, keypoint, y, x in pixels of the scale
    scores: Tensor  # [P]
    displacements: Tensor  # [P,4,2] x, y to each other keypoint, ascending, in pixels of the scale


class Candidates(NamedTuple):
    """Keypoint graphs of all scales of N images, and the boxes retrieved from them, before NMS."""

    graphs: Tensor  # [G,5,3] x, y, score (0 = missing) in pixels of the scale
    group: Tensor  # [G] image + N * index of the scale
    opener: Tensor  # [G] the keypoint that opened the graph
    boxes: Tensor  # [R,4] xyxy continuous input pixels, clipped to the image
    scores: Tensor  # [R]
    graph: Tensor  # [R] the graph that each box comes from, ascending
    image: Tensor  # [R]

    @property
    def has_area(self) -> Tensor:
        """(R,) bool. Corners may cross where a graph mixes two cells, and a box may lie outside its image."""
        return (self.boxes[:, 2:] > self.boxes[:, :2]).all(1)


@dataclass(frozen=True)
class DecodingSettings:
    """Settings of the way from maps to boxes (the paper's by default).

    Attributes:
        smooth_sigma: standard deviation of the Gaussian on the votes, pixels of each scale; 0 leaves them as they are.
        peak_threshold: smoothed votes above which a local maximum is a peak.
        hops: grouping: 1 looks for partners from the first keypoint only, 2 from the joined ones too.
        corner_and_centre: retrieval: let one corner and the centre give a box too.
        missing_factor: our own retrieval by completion, see `complete_graphs`, in place of grouping, ``hops`` and
            ``corner_and_centre``: every peak gives a box, and each of its keypoints without a peak multiplies the score
            by this factor, 0..1; 0 is off.
        min_candidate_score: boxes of a lower score are dropped before NMS, 0..1.
        nms_threshold: intersection over union above which the lower-scoring of two boxes is dropped, over all scales.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.KEYPOINT_GRAPH"

    smooth_sigma: float = 2.0
    peak_threshold: float = 0.004
    hops: int = 1
    corner_and_centre: bool = False
    missing_factor: float = 0.0
    min_candidate_score: float = 0.0
    nms_threshold: float = 0.5

    def __post_init__(self) -> None:
        require(self.smooth_sigma >= 0, "smooth_sigma", "0 or more pixels", self.smooth_sigma)
        require(self.peak_threshold >= 0, "peak_threshold", "0 or more", self.peak_threshold)
        require(self.hops in (1, 2), "hops", "1 or 2", self.hops)
        for name in ("missing_factor", "min_candidate_score"):
            require(0 <= getattr(self, name) <= 1, name, "a number of 0..1", getattr(self, name))
        require(0 <= self.nms_threshold <= 1, "nms_threshold", "a fraction of 0..1", self.nms_threshold)


class KeypointDecoder(nn.Module):
    """Boxes of the cells, from the keypoint maps of all scales: `find` their keypoints, `assemble` them.

    Args:
        radius: disc radius r, pixels of each scale; grouping matches within r + 1 and rejects within 2 r.
        settings: see `DecodingSettings`.
    """

    def __init__(self, radius: float = 5.0, settings: DecodingSettings | None = None) -> None:
        super().__init__()
        self.radius = radius
        self.settings = settings or DecodingSettings()

    @property
    def receptive_radius(self) -> int:
        """Pixels of a scale, to every side, on which a peak depends.

        Votes that travel further than 2 r are not counted; training asks for at most r.
        """
        vote, gaussian, neighbour = math.ceil(2 * self.radius) + 1, int(4 * self.settings.smooth_sigma + 0.5), 1
        return vote + gaussian + neighbour

    def forward(self, maps: list[KeypointMaps], sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Decode a batch.

        Args:
            maps: the maps of each scale.
            sizes: (h, w) of each of the N images, input pixels, without the padding; boxes are clipped to it.

        Returns:
            For each image its boxes (R,4), xyxy continuous input pixels, and scores (R,), by falling score.
        """
        return self.assemble(self.find(maps), sizes, [scale.stride for scale in maps])

    @torch.no_grad()
    def find(self, maps: list[KeypointMaps]) -> Peaks:
        """Vote, smooth, find the peaks: what of decoding looks at pixels, and only at those near by."""
        peaks, scores = find_peaks(self.vote(maps), self.settings.peak_threshold)
        displacements = gather_displacements(peaks, [scale.group_offset for scale in maps])
        return Peaks(peaks, scores, displacements.to(scores.dtype))  # not in the 16 bits that the maps may have

    @torch.no_grad()
    def vote(self, maps: list[KeypointMaps]) -> list[Tensor]:
        """The smoothed votes (N,5,h,w) of each scale."""
        return [
            smooth_votes(
                hough_vote(scale.heatmap.float().sigmoid(), scale.single_offset.float(), self.radius),
                self.settings.smooth_sigma,
            )
            for scale in maps
        ]

    @torch.no_grad()
    def assemble(
        self, peaks: Peaks, sizes: Sequence[tuple[int, int]], strides: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Group, retrieve, NMS: from the peaks of whole images, wherever they were found, to boxes.

        On a GPU nothing but sizes comes to the host: one in `find`, two here, and two for each image; but of images
        with very many boxes also these (see `nms_of_many`).

        Args:
            peaks: of N images and all scales, in the order of `find_peaks`.
            sizes: (h, w) of each of the N images, input pixels, without the padding; boxes are clipped to it.
            strides: of each scale.

        Returns:
            For each image its boxes (R,4), xyxy continuous input pixels, and scores (R,), by falling score.
        """
        candidates = self.retrieve(peaks, sizes, strides)
        kept = [self.suppress(candidates, i) for i in range(len(sizes))]
        return [(candidates.boxes[boxes], candidates.scores[boxes]) for boxes in kept]

    @torch.no_grad()
    def retrieve(self, peaks: Peaks, sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Candidates:
        """Group the peaks and retrieve the boxes; for the arguments see `assemble`."""
        if self.settings.missing_factor:
            graphs = complete_graphs(*peaks, self.radius + 1)
            group, opener = peaks.peaks[:, 0], peaks.peaks[:, 1]
            corners, scores = completed_boxes(graphs, self.settings.missing_factor)
            graph = torch.arange(len(graphs), device=graphs.device)
        else:
            graphs, group = group_peaks(*peaks, self.radius + 1, 2 * self.radius, hops=self.settings.hops)
            opener = graphs[..., 2].argmax(1)
            corners, scores, graph = graphs_to_boxes(graphs, self.settings.corner_and_centre)
        if self.settings.min_candidate_score:
            kept = scores >= self.settings.min_candidate_score
            corners, scores, graph = corners[kept], scores[kept], graph[kept]
        of_box = group[graph]
        # What depends on the group travels to the device as one table.
        table = torch.tensor([[stride, w, h, w, h] for stride in strides for h, w in sizes], dtype=corners.dtype)
        stride, limit = table.to(corners.device, non_blocking=True)[of_box].split((1, 4), dim=1)
        first, last = ((corners + 0.5) * stride - 0.5).split(2, dim=1)
        boxes = torch.cat((first, last + 1), dim=1).clamp(min=0).minimum(limit)
        return Candidates(graphs, group, opener, boxes, scores, graph, of_box % len(sizes))

    @torch.no_grad()
    def suppress(self, candidates: Candidates, image: int) -> Tensor:
        """NMS among the boxes of one image: the indices (K,) of those that stay, by falling score."""
        # Image by image: the boxes of one must not shift in the last digit for its place in the batch.
        boxes = (candidates.has_area & (candidates.image == image)).nonzero()[:, 0]
        return boxes[nms(candidates.boxes[boxes], candidates.scores[boxes], self.settings.nms_threshold)]

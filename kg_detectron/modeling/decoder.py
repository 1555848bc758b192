"""From the maps of all scales to boxes: vote, smooth, peaks, group, retrieve, NMS (paper, figure 1c)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from ..layers import find_peaks, graphs_to_boxes, group_keypoints, hough_vote, smooth_votes
from .keypoint_branch import KeypointMaps


class KeypointDecoder(nn.Module):
    """Boxes of the cells, from the keypoint maps of all scales.

    Args:
        radius: disc radius r, pixels of each scale; grouping matches within r + 1 and rejects within 2 r.
        smooth_sigma: standard deviation of the Gaussian on the votes, pixels of each scale.
        peak_threshold: smoothed votes above which a local maximum is a peak.
        hops: 1 or 2, see `group_keypoints`.
        corner_and_centre: see `graphs_to_boxes`.
        nms_threshold: intersection over union above which the lower-scoring of two boxes is dropped.
    """

    def __init__(
        self,
        radius: float = 5.0,
        smooth_sigma: float = 2.0,
        peak_threshold: float = 0.004,
        hops: int = 1,
        corner_and_centre: bool = False,
        nms_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.radius = radius
        self.smooth_sigma = smooth_sigma
        self.peak_threshold = peak_threshold
        self.hops = hops
        self.corner_and_centre = corner_and_centre
        self.nms_threshold = nms_threshold

    @property
    def reach(self) -> int:
        """How far away, in pixels of a scale to every side, a value of its maps has a part in a peak.

        Votes are counted that travel at most 2 r; training asks for r.
        """
        vote = math.ceil(2 * self.radius) + 1
        return vote + int(4 * self.smooth_sigma + 0.5) + 1

    @torch.no_grad()
    def forward(self, maps: list[KeypointMaps], sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Decode a batch.

        Args:
            maps: the maps of each scale.
            sizes: (h, w) of each of the N images, input pixels, without the padding; boxes are clipped to it.

        Returns:
            For each image its boxes (R,4), xyxy continuous input pixels, and scores (R,), by falling score.
        """
        boxes, scores, image = (torch.cat(parts) for parts in zip(*map(self._decode_scale, maps), strict=True))
        limit = boxes.new_tensor([[w, h, w, h] for h, w in sizes])
        boxes = torch.minimum(boxes.clamp(min=0), limit[image])
        real = (boxes[:, 2:] > boxes[:, :2]).all(1)  # corners may cross where a graph mixes two cells
        # Image by image: the boxes of one must not shift in the last digit for its place in the batch.
        found = []
        for i in range(len(sizes)):
            own = real & (image == i)
            keep = nms(boxes[own], scores[own], self.nms_threshold)
            found.append((boxes[own][keep], scores[own][keep]))
        return found

    def _decode_scale(self, scale: KeypointMaps) -> tuple[Tensor, Tensor, Tensor]:
        votes = hough_vote(scale.heatmap.float().sigmoid(), scale.single_offset.float(), self.radius)
        peaks, scores = find_peaks(smooth_votes(votes, self.smooth_sigma), self.peak_threshold)
        graphs, image = group_keypoints(
            peaks, scores, scale.group_offset, self.radius + 1, 2 * self.radius, hops=self.hops
        )
        corners, scores, graph = graphs_to_boxes(graphs, self.corner_and_centre)
        boxes = (corners + 0.5) * scale.stride - 0.5
        boxes[:, 2:] += 1
        return boxes, scores, image[graph]

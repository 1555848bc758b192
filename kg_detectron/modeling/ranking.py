"""Scores of the cells by what is known only after segmentation: AP is about their order.

Our own. The paper's score is the mean of the keypoints' votes. It knows nothing of the mask, and
a second box on a cell that has one may outrank the box of another cell.
"""

import heapq
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kg_detectron.cells import MaskCrops
from kg_detectron.layers.overlaps import overlapping_pairs
from kg_detectron.modeling.settings import require


@dataclass(frozen=True)
class RankingSettings:
    """Settings of the scores after segmentation (by default the paper's, the mean of the keypoints' votes).

    Attributes:
        blur_weight: the score is multiplied by exp(-blur_weight * blur), see `outline_blur`; per pixel, 0 or more.
        overlap_sigma: after that, cells lower the scores of those whose boxes they overlap, see `soft_suppression`: by
            exp(-u^2 / overlap_sigma), u being the intersection over union; 0 is off. It makes a higher threshold of NMS
            harmless, which leaves close cells their boxes.
        part_sigma: and by exp(-p^2 / part_sigma), p being the part of the lowered cell's box that lies in the other's;
            0 is off. A box that holds a whole cell so suppresses boxes of its parts.
        vote_exponent: before that, the score is the mean vote to this power, times the cell's confidence where there
            is a `ConfidenceHead`.

    Raises:
        ValueError: a negative number.
    """

    NODE: ClassVar[str] = "MODEL.CELLS"

    blur_weight: float = 0.0
    overlap_sigma: float = 0.0
    part_sigma: float = 0.0
    vote_exponent: float = 1.0

    def __post_init__(self) -> None:
        for name in ("blur_weight", "overlap_sigma", "part_sigma", "vote_exponent"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))


class CellRanking(nn.Module):
    """New scores, and the order of the cells by them, see `RankingSettings`."""

    def __init__(self, settings: RankingSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or RankingSettings()

    def forward(
        self, boxes: Tensor, scores: Tensor, masks: MaskCrops, confidence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rank the cells of one image.

        Args:
            boxes: (R,4) xyxy, input pixels.
            scores: (R,), falling.
            masks: of the R boxes, probabilities, input pixels.
            confidence: (R,) 0..1, of the masks; 1 where there is none.

        Returns:
            The order (R,) int64, and the scores in that order, falling; of equal ones the first given comes first.
        """
        return self.rank(boxes, scores, self.blur(masks), confidence)

    def at_most(self, scores: Tensor) -> Tensor:
        """The highest scores that cells of mean votes (R,) may get."""
        return scores**self.settings.vote_exponent

    def blur(self, masks: MaskCrops) -> Tensor:
        """The (R,) `outline_blur` of masks; zeros where it does not count."""
        return outline_blur(masks) if self.settings.blur_weight else torch.zeros(len(masks))

    def rank(
        self, boxes: Tensor, scores: Tensor, blur: Tensor, confidence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the (R,) `blur` of the masks in their place."""
        scores = self.at_most(scores) * torch.exp(-self.settings.blur_weight * blur.to(scores))
        if confidence is not None:
            scores = scores * confidence.to(scores)
        scores, order = scores.sort(descending=True, stable=True)
        if not (self.settings.overlap_sigma or self.settings.part_sigma):
            return order, scores
        lowered = soft_suppression(boxes[order], scores, self.settings.overlap_sigma, self.settings.part_sigma)
        scores, again = lowered.sort(descending=True, stable=True)
        return order[again], scores


def outline_blur(masks: MaskCrops) -> Tensor:
    """How far each outline is from sharp, (R,): about pixels of doubt across it.

    A pixel of probability p is in doubt by 1 - |2p - 1|, and the sum of that over a crop is divided by its height plus
    width, as a cell's outline grows with them: small cells, of which much is outline, lose nothing.
    """
    doubts = [(1 - (2 * crop - 1).abs()).sum() / sum(crop.shape) for crop in masks.crops]
    return torch.stack(doubts) if doubts else torch.zeros(0)


@torch.no_grad()
def soft_suppression(boxes: Tensor, scores: Tensor, overlap_sigma: float, part_sigma: float = 0.0) -> Tensor:
    """Scores lowered by overlaps with better boxes.

    The box with the highest score of those that are left is taken, again and again (of equal ones the first). It
    multiplies the score that each box still left came with by exp(-u^2 / overlap_sigma - p^2 / part_sigma), u being the
    intersection over union of the two, p the part of that box that lies in the taken one, unless another one has
    lowered it more. So a box that is suppressed itself suppresses little. Soft-NMS (Bodla et al. 2017) multiplies by
    all factors; here the smallest one counts, as in the Matrix NMS of SOLOv2.

    Args:
        boxes: (R,4) xyxy.
        scores: (R,), 0 or more.
        overlap_sigma, part_sigma: 0 leaves out that term.

    Returns:
        (R,) scores, in the order of the boxes.
    """
    pairs, lowering = _suppression_factors(boxes, overlap_sigma, part_sigma)
    given, factors = scores.double().tolist(), lowering.tolist()
    best, others = pairs.tolist()
    first = torch.searchsorted(pairs[0].contiguous(), torch.arange(len(boxes) + 1)).tolist()
    lowered, taken = given.copy(), [False] * len(given)
    queue = [(-score, box) for box, score in enumerate(given)]
    heapq.heapify(queue)
    while queue:
        score, box = heapq.heappop(queue)
        if taken[box] or -score != lowered[box]:  # an entry from before its score was lowered
            continue
        taken[box] = True
        for pair in range(first[box], first[box + 1]):
            other = others[pair]
            score = given[other] * factors[pair]
            if not taken[other] and score < lowered[other]:
                lowered[other] = score
                heapq.heappush(queue, (-score, other))
    return scores.new_tensor(lowered)


def _suppression_factors(boxes: Tensor, overlap_sigma: float, part_sigma: float) -> tuple[Tensor, Tensor]:
    """The pairs (2,E) of different boxes that overlap, ordered by the first one, and what it lowers the second by (E,).

    On the CPU, in float64.
    """
    boxes = boxes.cpu()
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    found, factors = [torch.zeros(2, 0, dtype=torch.long)], [torch.zeros(0, dtype=torch.float64)]
    for half, area_of_half in overlapping_pairs(boxes):
        pairs, shared = torch.cat((half, half.flip(0)), dim=1), area_of_half.double().repeat(2)
        exponent = torch.zeros_like(shared)
        if overlap_sigma:
            exponent += (shared / (area[pairs].double().sum(0) - shared)).square() / overlap_sigma
        if part_sigma:
            exponent += (shared / area[pairs[1]].double()).square() / part_sigma
        found.append(pairs)
        factors.append(torch.exp(-exponent))
    pairs, lowering = torch.cat(found, dim=1), torch.cat(factors)
    order = pairs[1].argsort(stable=True)
    order = order[pairs[0][order].argsort(stable=True)]
    return pairs[:, order], lowering[order]

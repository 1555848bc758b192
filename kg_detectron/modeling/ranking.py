"""Scores of the cells by what is known only after segmentation: AP is about their order.

Our own. The paper's score is the mean of the keypoints' votes. It knows nothing of the mask, and
a second box on a cell that has one may outrank the box of another cell.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from kg_detectron.cells import MaskCrops
from kg_detectron.modeling.settings import require

# Pairs of boxes that are compared at once: bounds the memory where an image holds very many cells.
PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class RankingSettings:
    """Settings of the scores after segmentation (with zeros the paper's, the mean of the keypoints' votes).

    Attributes:
        blur_weight: the score is multiplied by exp(-blur_weight * blur), see `outline_blur`; per pixel, 0 or more.
        overlap_sigma: after that, the score of a cell is multiplied by exp(-u^2 / overlap_sigma), u being the greatest
            intersection over union of its box with that of a cell that had a higher score; 0 is off. It makes a higher
            threshold of NMS harmless, which leaves close cells their boxes.

    Raises:
        ValueError: a negative number.
    """

    NODE: ClassVar[str] = "MODEL.CELLS"

    blur_weight: float = 0.0
    overlap_sigma: float = 0.0

    def __post_init__(self) -> None:
        require(self.blur_weight >= 0, "blur_weight", "0 or more", self.blur_weight)
        require(self.overlap_sigma >= 0, "overlap_sigma", "0 or more", self.overlap_sigma)


class CellRanking(nn.Module):
    """New scores, and the order of the cells by them, see `RankingSettings`."""

    def __init__(self, settings: RankingSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or RankingSettings()

    def forward(self, boxes: Tensor, scores: Tensor, masks: MaskCrops) -> tuple[Tensor, Tensor]:
        """Rank the cells of one image.

        Args:
            boxes: (R,4) xyxy, input pixels.
            scores: (R,), falling.
            masks: of the R boxes, probabilities, input pixels.

        Returns:
            The order (R,) int64, and the scores in that order, falling; of equal ones the first given comes first.
        """
        return self.rank(boxes, scores, self.blur(masks).to(scores))

    def blur(self, masks: MaskCrops) -> Tensor:
        """The (R,) `outline_blur` of masks; zeros where it does not count."""
        return outline_blur(masks) if self.settings.blur_weight else torch.zeros(len(masks))

    def rank(self, boxes: Tensor, scores: Tensor, blur: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with the (R,) `blur` of the masks in their place."""
        scores, order = (scores * torch.exp(-self.settings.blur_weight * blur)).sort(descending=True, stable=True)
        if not self.settings.overlap_sigma:
            return order, scores
        overlap = _overlap_with_earlier(boxes[order])
        scores, again = (scores * torch.exp(-overlap.square() / self.settings.overlap_sigma)).sort(
            descending=True, stable=True
        )
        return order[again], scores


def outline_blur(masks: MaskCrops) -> Tensor:
    """How far each outline is from sharp, (R,): about pixels of doubt across it.

    A pixel of probability p is in doubt by 1 - |2p - 1|, and the sum of that over a crop is divided by its height plus
    width, as a cell's outline grows with them: small cells, of which much is outline, lose nothing.
    """
    doubts = [(1 - (2 * crop - 1).abs()).sum() / sum(crop.shape) for crop in masks.crops]
    return torch.stack(doubts) if doubts else torch.zeros(0)


def _overlap_with_earlier(boxes: Tensor) -> Tensor:
    """The greatest intersection over union of each box (R,4) with those before it, (R,); 0 for the first."""
    rows = max(1, PAIRS_AT_ONCE // max(1, len(boxes)))
    parts = [
        box_iou(some, boxes).tril(rows * part - 1).amax(1) for part, some in enumerate(boxes.split(rows)) if len(some)
    ]
    return torch.cat(parts) if parts else boxes.new_zeros(0)

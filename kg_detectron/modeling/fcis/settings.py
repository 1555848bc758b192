"""Settings of FCIS (Li et al., CVPR 2017)."""

from dataclasses import dataclass
from typing import ClassVar

from kg_detectron.modeling.backbone import BackboneSettings
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import SCALES, TrunkSettings

# Maps that proposals come from: s3, s4 and c4.
PROPOSAL_LEVELS = 3


@dataclass(frozen=True)
class ProposalSettings:
    """Settings of the region proposals.

    Attributes:
        anchor_sizes: sides of the square anchors, rising, pixels; the first third of them lies on s3, the second on s4,
            the last on c4 (strides 4, 8, 16).
        aspect_ratios: height over width of the anchors.
        proposals: of an image, at most (published: 300).
        training_proposals: the same in training, where each costs most.
        candidates: of an image and a map, the best, before suppression (published: 6,000 of one map).
        proposal_overlap: a proposal that overlaps a better one by more is dropped, intersection over union.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.FCIS"

    anchor_sizes: tuple[int, ...] = (8, 12, 18, 24, 32, 48, 64, 96, 160)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals: int = 1000
    training_proposals: int = 300
    candidates: int = 2000
    proposal_overlap: float = 0.7

    def __post_init__(self) -> None:
        sizes, ratios = tuple(self.anchor_sizes), tuple(self.aspect_ratios)
        rising = all(a < b for a, b in zip((0, *sizes), sizes, strict=False))
        good = len(sizes) > 0 and len(sizes) % PROPOSAL_LEVELS == 0 and rising
        require(good, "anchor_sizes", f"rising numbers, a multiple of {PROPOSAL_LEVELS} of them", sizes)
        require(len(ratios) > 0 and min(ratios) > 0, "aspect_ratios", "numbers above 0", ratios)
        for name in ("proposals", "training_proposals", "candidates"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        require(0 < self.proposal_overlap <= 1, "proposal_overlap", "a number of 0..1", self.proposal_overlap)


@dataclass(frozen=True)
class ScoreMapSettings:
    """Settings of the position-sensitive maps.

    Attributes:
        scale: decoder map that they are made from, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        channels: of the hidden convolution, and of the maps that proposals come from.
        groups: k; a region has k x k parts, and each part maps of its own.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.FCIS"

    scale: int = 3
    channels: int = 256
    groups: int = 7

    def __post_init__(self) -> None:
        require(self.scale in SCALES, "scale", f"one of {SCALES}", self.scale)
        for name in ("channels", "groups"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))


@dataclass(frozen=True)
class RegionLossSettings:
    """Settings of the targets and losses.

    Attributes:
        positive_overlap: from this intersection over union with a cell's box on, a region is that cell's.
        hard_regions: of an image, at most; those of the highest loss, and only they, count (published: 128).
        mask_weight, box_weight: of the losses of masks and boxes; that of the classification is 1.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.FCIS"

    positive_overlap: float = 0.5
    hard_regions: int = 256
    mask_weight: float = 10.0
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.positive_overlap <= 1, "positive_overlap", "a number of 0..1", self.positive_overlap)
        require(self.hard_regions >= 1, "hard_regions", "1 or more", self.hard_regions)
        for name in ("mask_weight", "box_weight"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))


@dataclass(frozen=True)
class RegionDecodingSettings:
    """Settings of the way from regions to cells.

    Attributes:
        min_score: regions of a lower score are no cells, 0..1.
        overlap_threshold: a region that overlaps a better one by more is dropped, intersection over union (published:
            0.3, too little for cells that touch).
        merge_overlap: all regions that overlap one that stays by at least this vote for its mask.
        mask_threshold: probability from which a pixel belongs to a region, and share of the votes from which it belongs
            to the cell.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.FCIS"

    min_score: float = 0.05
    overlap_threshold: float = 0.5
    merge_overlap: float = 0.5
    mask_threshold: float = 0.4

    def __post_init__(self) -> None:
        for name in ("min_score", "overlap_threshold", "merge_overlap"):
            require(0 <= getattr(self, name) <= 1, name, "a number of 0..1", getattr(self, name))
        require(0 < self.mask_threshold < 1, "mask_threshold", "a number between 0 and 1", self.mask_threshold)


@dataclass(frozen=True)
class FCISSettings:
    """Settings of `FCISNet`, a dataclass for each part."""

    preprocessing: Preprocessing = Preprocessing()
    backbone: BackboneSettings = BackboneSettings()
    trunk: TrunkSettings = TrunkSettings()
    proposals: ProposalSettings = ProposalSettings()
    heads: ScoreMapSettings = ScoreMapSettings()
    loss: RegionLossSettings = RegionLossSettings()
    decoding: RegionDecodingSettings = RegionDecodingSettings()

"""Settings of CornerNet (Law and Deng, ECCV 2018)."""

from dataclasses import dataclass
from typing import ClassVar

from kg_detectron.modeling.backbone import BackboneSettings
from kg_detectron.modeling.classes import ClassSettings
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.segmentation_branch import SegmentationSettings
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import SCALES, TrunkSettings


@dataclass(frozen=True)
class CornerHeadSettings:
    """Settings of the heads.

    Attributes:
        scale: decoder map that the heads read, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        channels: of the heads; corner pooling works on half of them.
        masks: segment every box by the segmentation branch, which the publication lacks; otherwise cells fill boxes.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.CORNERNET"

    scale: int = 3
    channels: int = 256
    masks: bool = False

    def __post_init__(self) -> None:
        require(self.scale in SCALES, "scale", f"one of {SCALES}", self.scale)
        require(self.channels >= 4 and self.channels % 4 == 0, "channels", "a multiple of 4", self.channels)


@dataclass(frozen=True)
class CornerLossSettings:
    """Settings of the targets and losses.

    Attributes:
        min_overlap: around a corner lies a Gaussian over the pixels that, as corners, would give a box with at least
            this intersection over union with the true one; between 0 and 1.
        pull_weight, push_weight, offset_weight: weights of the losses; that of the heatmaps is 1.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.CORNERNET"

    min_overlap: float = 0.3
    pull_weight: float = 0.1
    push_weight: float = 0.1
    offset_weight: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.min_overlap < 1, "min_overlap", "a fraction between 0 and 1", self.min_overlap)
        for name in ("pull_weight", "push_weight", "offset_weight"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))


@dataclass(frozen=True)
class CornerDecodingSettings:
    """Settings of the way from maps to boxes.

    Attributes:
        max_corners: at most so many corners of each type, the best, are paired (published: 100).
        peak_threshold: probability above which a local maximum is a corner, 0..1.
        tag_distance: corners whose tags differ by more are no pair.
        max_candidates: at most so many pairs, the best, are boxes (published: 1,000).
        overlap_sigma: of soft-NMS: a box multiplies the scores of those that it overlaps by exp(-u^2 / overlap_sigma),
            u being the intersection over union; above 0.
        min_score: boxes of a lower score after that are dropped, 0..1.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.CORNERNET"

    max_corners: int = 1000
    peak_threshold: float = 0.01
    tag_distance: float = 0.5
    max_candidates: int = 2000
    overlap_sigma: float = 0.5
    min_score: float = 0.01

    def __post_init__(self) -> None:
        for name in ("max_corners", "max_candidates"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("peak_threshold", "min_score"):
            require(0 <= getattr(self, name) <= 1, name, "a number of 0..1", getattr(self, name))
        require(self.tag_distance >= 0, "tag_distance", "0 or more", self.tag_distance)
        require(self.overlap_sigma > 0, "overlap_sigma", "a number above 0", self.overlap_sigma)


@dataclass(frozen=True)
class CornerNetSettings:
    """Settings of `CornerNet`, a dataclass for each part; ``segmentation`` counts where ``heads.masks`` is on.

    Raises:
        ValueError: a confidence head, for corners have their own scores.
    """

    preprocessing: Preprocessing = Preprocessing()
    backbone: BackboneSettings = BackboneSettings()
    trunk: TrunkSettings = TrunkSettings()
    heads: CornerHeadSettings = CornerHeadSettings()
    loss: CornerLossSettings = CornerLossSettings()
    decoding: CornerDecodingSettings = CornerDecodingSettings()
    segmentation: SegmentationSettings = SegmentationSettings()
    classes: ClassSettings = ClassSettings()

    def __post_init__(self) -> None:
        confidence = self.segmentation.confidence
        require(not confidence, "confidence", "none, for CornerNet has scores of its own", confidence)

"""Settings of StarDist (Schmidt et al., MICCAI 2018)."""

from dataclasses import dataclass
from typing import ClassVar

from kg_detectron.modeling.backbone import BackboneSettings
from kg_detectron.modeling.classes import ClassSettings
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import SCALES, TrunkSettings


@dataclass(frozen=True)
class StarHeadSettings:
    """Settings of the heads, and of their losses.

    Attributes:
        rays: radial distances of a star, at equal angles; 3 or more.
        scale: decoder map that the heads read, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        channels: of the hidden convolution.
        distance_unit: pixels that an output of 1 means. The published code has 1; with about the radius of a
            cell, distances are learned faster.
        distance_weight: of the distance loss; that of the probabilities is 1.
        background_weight: of the distances outside cells, which are drawn to 0, within the distance loss.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.STARDIST"

    rays: int = 32
    scale: int = 2
    channels: int = 128
    distance_unit: float = 1.0
    distance_weight: float = 0.2
    background_weight: float = 1e-4

    def __post_init__(self) -> None:
        require(self.rays >= 3, "rays", "3 or more", self.rays)
        require(self.scale in SCALES, "scale", f"one of {SCALES}", self.scale)
        require(self.channels >= 1, "channels", "1 or more", self.channels)
        require(self.distance_unit > 0, "distance_unit", "above 0", self.distance_unit)
        for name in ("distance_weight", "background_weight"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))


@dataclass(frozen=True)
class StarDecodingSettings:
    """Settings of the way from maps to cells.

    Attributes:
        probability_threshold: object probability above which a pixel's star is a candidate, 0..1.
        overlap_threshold: a star is dropped where it shares more than this part of the smaller of the two with a better
            one, 0..1.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.STARDIST"

    probability_threshold: float = 0.5
    overlap_threshold: float = 0.4

    def __post_init__(self) -> None:
        for name in ("probability_threshold", "overlap_threshold"):
            require(0 <= getattr(self, name) <= 1, name, "a number of 0..1", getattr(self, name))


@dataclass(frozen=True)
class StarDistSettings:
    """Settings of `StarDistNet`, a dataclass for each part."""

    preprocessing: Preprocessing = Preprocessing()
    backbone: BackboneSettings = BackboneSettings()
    trunk: TrunkSettings = TrunkSettings()
    heads: StarHeadSettings = StarHeadSettings()
    decoding: StarDecodingSettings = StarDecodingSettings()
    classes: ClassSettings = ClassSettings()

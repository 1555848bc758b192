"""Settings of DCAN (Chen et al., CVPR 2016)."""

from dataclasses import dataclass
from typing import ClassVar

from kg_detectron.modeling.backbone import BackboneSettings
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import SCALES, TrunkSettings


@dataclass(frozen=True)
class ContourHeadSettings:
    """Settings of the heads, their targets and losses.

    Attributes:
        levels: decoder maps that the heads read, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        contour_radius: the outermost pixels of each cell, and all pixels within this radius of them, are contour;
            pixels.
        contour_weight: of the contour loss; that of the objects is 1.
        auxiliary_weight: of the losses of each level alone.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.DCAN"

    levels: tuple[int, ...] = (1, 2, 3)
    contour_radius: int = 1
    contour_weight: float = 1.0
    auxiliary_weight: float = 0.1

    def __post_init__(self) -> None:
        levels = tuple(self.levels)
        good = bool(levels) and len(set(levels)) == len(levels) and set(levels) <= set(SCALES)
        require(good, "levels", f"different ones of {SCALES}", levels)
        require(self.contour_radius >= 0, "contour_radius", "0 or more pixels", self.contour_radius)
        for name in ("contour_weight", "auxiliary_weight"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))


@dataclass(frozen=True)
class ContourDecodingSettings:
    """Settings of the way from maps to cells.

    Attributes:
        object_threshold: probability from which a pixel belongs to some cell.
        contour_threshold: probability below which a pixel is no contour.
        min_area: smaller cells are dropped, pixels.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.DCAN"

    object_threshold: float = 0.5
    contour_threshold: float = 0.5
    min_area: int = 10

    def __post_init__(self) -> None:
        for name in ("object_threshold", "contour_threshold"):
            require(0 < getattr(self, name) < 1, name, "a probability between 0 and 1", getattr(self, name))
        require(self.min_area >= 0, "min_area", "0 or more pixels", self.min_area)


@dataclass(frozen=True)
class DCANSettings:
    """Settings of `DCANNet`, a dataclass for each part."""

    preprocessing: Preprocessing = Preprocessing()
    backbone: BackboneSettings = BackboneSettings()
    trunk: TrunkSettings = TrunkSettings()
    heads: ContourHeadSettings = ContourHeadSettings()
    decoding: ContourDecodingSettings = ContourDecodingSettings()

"""All settings of the keypoint graph, part by part."""

from dataclasses import dataclass

from kg_detectron.modeling.backbone import BackboneSettings
from kg_detectron.modeling.classes import ClassSettings
from kg_detectron.modeling.keypoint_graph.decoding import DecodingSettings
from kg_detectron.modeling.keypoint_graph.heads import HeadSettings
from kg_detectron.modeling.keypoint_graph.targets import TargetSettings
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.ranking import RankingSettings
from kg_detectron.modeling.segmentation_branch import SegmentationSettings
from kg_detectron.modeling.trunk import TrunkSettings


@dataclass(frozen=True)
class KeypointGraphSettings:
    """Settings of `KeypointGraphNet` (the paper's by default), a dataclass for each part.

    Raises:
        ValueError: settings of two parts that make no sense together.
    """

    preprocessing: Preprocessing = Preprocessing()
    backbone: BackboneSettings = BackboneSettings()
    trunk: TrunkSettings = TrunkSettings()
    heads: HeadSettings = HeadSettings()
    targets: TargetSettings = TargetSettings()
    decoding: DecodingSettings = DecodingSettings()
    segmentation: SegmentationSettings = SegmentationSettings()
    ranking: RankingSettings = RankingSettings()
    classes: ClassSettings = ClassSettings()

    def __post_init__(self) -> None:
        if self.ranking.overlap_sigma and self.decoding.nms_threshold <= 0.5:
            raise ValueError(
                f"overlap_sigma: {self.ranking.overlap_sigma} lowers the scores of boxes that overlap, which needs an "
                f"nms_threshold above 0.5 to leave such boxes, got {self.decoding.nms_threshold}"
            )

"""The networks, their targets and losses, and the way from their maps to cells. Needs PyTorch and torchvision only."""

from kg_detectron.modeling.backbone import BackboneSettings, ResNetC4, build_backbone, register_backbone
from kg_detectron.modeling.classes import ClassSettings
from kg_detectron.modeling.cornernet.network import CornerNet
from kg_detectron.modeling.cosine_embedding.network import CosineEmbeddingNet
from kg_detectron.modeling.dcan.network import DCANNet
from kg_detectron.modeling.efficientnet import EfficientNetLite0
from kg_detectron.modeling.fcis.network import FCISNet
from kg_detectron.modeling.instance_net import InstanceNet
from kg_detectron.modeling.keypoint_graph.decoding import DecodingSettings, KeypointDecoder, Peaks
from kg_detectron.modeling.keypoint_graph.heads import (
    HeadSettings,
    KeypointBranch,
    KeypointMaps,
    build_keypoint_branch,
)
from kg_detectron.modeling.keypoint_graph.losses import keypoint_losses
from kg_detectron.modeling.keypoint_graph.network import KeypointGraphNet
from kg_detectron.modeling.keypoint_graph.settings import KeypointGraphSettings
from kg_detectron.modeling.keypoint_graph.targets import TargetSettings, box_keypoints, keypoint_targets
from kg_detectron.modeling.methods import method_class, method_names, register_method
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.ranking import CellRanking, RankingSettings, outline_blur
from kg_detectron.modeling.scores import Scores
from kg_detectron.modeling.segmentation_branch import (
    SegmentationBranch,
    SegmentationSettings,
    jittered_boxes,
    mask_loss,
)
from kg_detectron.modeling.stardist.network import StarDistNet
from kg_detectron.modeling.timm_backbone import TimmBackbone
from kg_detectron.modeling.trunk import Trunk, TrunkSettings, build_trunk

__all__ = [
    "BackboneSettings",
    "CellRanking",
    "ClassSettings",
    "CornerNet",
    "CosineEmbeddingNet",
    "DCANNet",
    "DecodingSettings",
    "EfficientNetLite0",
    "FCISNet",
    "HeadSettings",
    "InstanceNet",
    "KeypointBranch",
    "KeypointDecoder",
    "KeypointGraphNet",
    "KeypointGraphSettings",
    "KeypointMaps",
    "Peaks",
    "Preprocessing",
    "RankingSettings",
    "ResNetC4",
    "Scores",
    "SegmentationBranch",
    "SegmentationSettings",
    "StarDistNet",
    "TargetSettings",
    "TimmBackbone",
    "Trunk",
    "TrunkSettings",
    "box_keypoints",
    "build_backbone",
    "build_keypoint_branch",
    "build_trunk",
    "jittered_boxes",
    "keypoint_losses",
    "keypoint_targets",
    "mask_loss",
    "method_class",
    "method_names",
    "outline_blur",
    "register_backbone",
    "register_method",
]

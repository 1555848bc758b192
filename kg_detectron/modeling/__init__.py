"""The network, its targets and losses, and the way from its maps to cells. Needs PyTorch and torchvision only."""

from kg_detectron.modeling.backbone import ResNetC4
from kg_detectron.modeling.keypoint_graph.decoding import KeypointDecoder, Peaks
from kg_detectron.modeling.keypoint_graph.heads import KeypointBranch, KeypointMaps
from kg_detectron.modeling.keypoint_graph.losses import keypoint_losses, mask_loss
from kg_detectron.modeling.keypoint_graph.network import KeypointGraphNet, build_keypoint_branch
from kg_detectron.modeling.keypoint_graph.targets import box_keypoints, jittered_boxes, keypoint_targets
from kg_detectron.modeling.packed_crops import SegmentationBranch
from kg_detectron.modeling.ranking import CellRanking, outline_blur

__all__ = [
    "CellRanking",
    "KeypointBranch",
    "KeypointDecoder",
    "KeypointGraphNet",
    "KeypointMaps",
    "Peaks",
    "ResNetC4",
    "SegmentationBranch",
    "box_keypoints",
    "build_keypoint_branch",
    "jittered_boxes",
    "keypoint_losses",
    "keypoint_targets",
    "mask_loss",
    "outline_blur",
]

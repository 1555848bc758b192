"""The network, its targets and losses, and the way from its maps to cells. Needs PyTorch and torchvision only."""

from .backbone import ResNetC4
from .decoder import KeypointDecoder, Peaks
from .keypoint_branch import KeypointBranch, KeypointMaps
from .losses import keypoint_losses, mask_loss
from .mask_head import SegmentationBranch
from .network import KeypointGraphNet, build_keypoint_branch
from .ranking import CellRanking, outline_blur
from .targets import box_keypoints, jittered_boxes, keypoint_targets

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

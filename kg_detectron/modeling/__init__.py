"""The network, its targets and losses, and the way from its maps to cells. Needs PyTorch and torchvision only."""

from .backbone import ResNetC4
from .decoder import KeypointDecoder
from .keypoint_branch import KeypointBranch, KeypointMaps
from .lite_branch import LiteKeypointBranch
from .losses import keypoint_losses, mask_loss
from .mask_head import SegmentationBranch
from .network import KeypointGraphNet, keypoint_branch
from .targets import box_keypoints, keypoint_targets

__all__ = [
    "KeypointBranch",
    "KeypointDecoder",
    "KeypointGraphNet",
    "KeypointMaps",
    "LiteKeypointBranch",
    "ResNetC4",
    "SegmentationBranch",
    "box_keypoints",
    "keypoint_branch",
    "keypoint_losses",
    "keypoint_targets",
    "mask_loss",
]

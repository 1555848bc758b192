"""Operators of the keypoint graph: compiled where they were built, their PyTorch reference elsewhere."""

from .crops import crop_pixels
from .keypoints import box_keypoints
from .nms import nms
from .ops import (
    convolve_resized,
    depthwise_weight_gradient,
    find_peaks,
    gather_displacements,
    graphs_to_boxes,
    group_keypoints,
    group_peaks,
    hough_vote,
    render_targets,
    smooth_votes,
)

__all__ = [
    "box_keypoints",
    "convolve_resized",
    "crop_pixels",
    "depthwise_weight_gradient",
    "find_peaks",
    "gather_displacements",
    "graphs_to_boxes",
    "group_keypoints",
    "group_peaks",
    "hough_vote",
    "nms",
    "render_targets",
    "smooth_votes",
]

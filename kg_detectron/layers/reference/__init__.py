"""The keypoint-graph operators in plain PyTorch: their specification, and the kernel where nothing was compiled.

What each one takes and gives stands at its wrapper in `layers.ops`, in the same letters. The files are named as the
headers of the compiled kernels, csrc/*.h, which follow the same rules.
"""

from .depthwise import depthwise_weight_gradient
from .grouping import gather_displacements, group_keypoints, group_peaks
from .peaks import find_peaks
from .rendering import render_targets
from .resizing import convolve_resized, convolve_resized_backward
from .retrieval import graphs_to_boxes
from .voting import hough_vote, smooth_votes

__all__ = [
    "convolve_resized",
    "convolve_resized_backward",
    "depthwise_weight_gradient",
    "find_peaks",
    "gather_displacements",
    "graphs_to_boxes",
    "group_keypoints",
    "group_peaks",
    "hough_vote",
    "render_targets",
    "smooth_votes",
]

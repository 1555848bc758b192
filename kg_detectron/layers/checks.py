"""What the operators ask of their arguments, compiled or not. Every error names the argument."""

import math

import torch
from torch import Tensor

from ..graph import GROUP_OFFSET_CHANNELS, NUM_KEYPOINTS


def _check_maps(name: str, maps: Tensor, channels: int | None = None) -> None:
    if maps.dim() != 4 or not maps.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor (N,C,H,W), got {maps.dtype} of shape {tuple(maps.shape)}"
        )
    if channels is not None and maps.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got shape {tuple(maps.shape)}")


def _check_positive(name: str, value: float, zero: bool = False) -> None:
    if not (value > 0 or zero and value == 0) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a {'non-negative' if zero else 'positive'} finite number, got {value}")


def check_votes(heatmap: Tensor, offsets: Tensor, radius: float) -> None:
    """For `hough_vote`."""
    _check_maps("heatmap", heatmap)
    n, k, h, w = heatmap.shape
    _check_maps("offsets", offsets, 2 * k)
    if offsets.shape != (n, 2 * k, h, w) or offsets.device != heatmap.device:
        raise ValueError(
            f"offsets: expected shape {(n, 2 * k, h, w)} on {heatmap.device}, "
            f"got {tuple(offsets.shape)} on {offsets.device}"
        )
    _check_positive("radius", radius)


def check_smoothing(votes: Tensor, sigma: float) -> None:
    """For `smooth_votes`."""
    _check_maps("votes", votes)
    _check_positive("sigma", sigma, zero=True)


def check_threshold(scores: Tensor, threshold: float) -> None:
    """For `find_peaks`."""
    _check_maps("scores", scores)
    if math.isnan(threshold):
        raise ValueError(f"threshold: expected a number, got {threshold}")


def check_grouping(
    peaks: Tensor, scores: Tensor, group_offsets: Tensor, match_radius: float, reject_radius: float, hops: int
) -> None:
    """For `group_keypoints`, but for the positions of the peaks: they are looked at where the peaks are."""
    _check_maps("group_offsets", group_offsets, GROUP_OFFSET_CHANNELS)
    if peaks.dim() != 2 or peaks.shape[1] != 4 or peaks.dtype != torch.int64:
        raise ValueError(f"peaks: expected int64 (P,4), got {peaks.dtype} of shape {tuple(peaks.shape)}")
    if scores.shape != peaks.shape[:1] or not scores.is_floating_point():
        raise ValueError(
            f"scores: expected floating-point ({peaks.shape[0]},), got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    if not peaks.device == scores.device == group_offsets.device:
        raise ValueError(
            f"peaks, scores and group_offsets: expected one device, "
            f"got {peaks.device}, {scores.device} and {group_offsets.device}"
        )
    if hops not in (1, 2):
        raise ValueError(f"hops: expected 1 or 2, got {hops}")
    _check_positive("match_radius", match_radius, zero=True)
    _check_positive("reject_radius", reject_radius, zero=True)


def check_graphs(graphs: Tensor) -> None:
    """For `graphs_to_boxes`."""
    if graphs.dim() != 3 or graphs.shape[1:] != (NUM_KEYPOINTS, 3) or not graphs.is_floating_point():
        raise ValueError(
            f"graphs: expected a floating-point tensor (G,5,3), got {graphs.dtype} of shape {tuple(graphs.shape)}"
        )

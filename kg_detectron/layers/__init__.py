"""Operators of the keypoint graph. Until they are compiled, their PyTorch reference is what runs."""

from .reference import find_peaks, graphs_to_boxes, group_keypoints, hough_vote, smooth_votes

__all__ = ["find_peaks", "graphs_to_boxes", "group_keypoints", "hough_vote", "smooth_votes"]

"""Keypoint-graph cell instance segmentation. Importing this package never imports Detectron2."""

__version__ = "0.1.0"

"""Trained models on images, with the core alone."""

from .model_file import load_model, save_model
from .predictor import predict
from .tiling import predict_tiled

__all__ = ["load_model", "predict", "predict_tiled", "save_model"]

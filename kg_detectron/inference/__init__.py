"""Trained models on images, with the core alone."""

from .export import export_run
from .model_file import load_model, save_model
from .predictor import predict
from .tiling import predict_tiled

__all__ = ["export_run", "load_model", "predict", "predict_tiled", "save_model"]

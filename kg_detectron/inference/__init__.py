"""Trained models on images, with the core alone."""

from .export import export_run
from .model_file import load_model, save_model
from .predictor import predict

__all__ = ["export_run", "load_model", "predict", "save_model"]

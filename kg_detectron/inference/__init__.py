"""Trained models on images, with the core alone."""

from .model_file import load_model, save_model
from .predictor import predict

__all__ = ["load_model", "predict", "save_model"]

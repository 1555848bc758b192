"""Trained models on images, with the core alone."""

from kg_detectron.inference.model_file import export_run, kept_models, load_model, save_model
from kg_detectron.inference.predictor import predict

__all__ = ["export_run", "kept_models", "load_model", "predict", "save_model"]

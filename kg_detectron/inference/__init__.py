"""Trained models on images, with the core alone."""

from kg_detectron.inference.export import export_run
from kg_detectron.inference.model_file import load_model, save_model
from kg_detectron.inference.predictor import predict
from kg_detectron.inference.tiling import predict_tiled

__all__ = ["export_run", "load_model", "predict", "predict_tiled", "save_model"]

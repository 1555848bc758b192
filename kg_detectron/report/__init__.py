"""A page to look at: predictions of one or several models on one dataset, image by image."""

from .dataset import model_names, report_dataset

__all__ = ["model_names", "report_dataset"]

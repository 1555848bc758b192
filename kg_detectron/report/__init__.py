"""A page to look at: predictions of one or several models on one dataset, image by image."""

from kg_detectron.report.build import explain_image, model_names, report_dataset

__all__ = ["explain_image", "model_names", "report_dataset"]

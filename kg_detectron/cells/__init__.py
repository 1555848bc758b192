"""What a prediction is: the masks of cells, their run lengths, and their separation. No model code."""

from kg_detectron.cells.masks import MaskCrops, label_dtype

__all__ = ["MaskCrops", "label_dtype"]

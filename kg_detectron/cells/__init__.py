"""What a prediction is: cells, their masks, run lengths, and separation. No model code."""

from kg_detectron.cells.cells import Cells
from kg_detectron.cells.masks import MaskCrops, label_dtype

__all__ = ["Cells", "MaskCrops", "label_dtype"]

"""What a prediction is: cells, their masks, run lengths, and separation. No model code."""

from kg_detectron.cells.cells import Cells, clip_boxes
from kg_detectron.cells.masks import MaskCrops, label_dtype

__all__ = ["Cells", "MaskCrops", "clip_boxes", "label_dtype"]

"""The Detectron2 half of kg_detectron: importing it registers models and datasets."""

from kg_detectron.d2 import meta_architecture, model_zoo  # noqa: F401  (register)
from kg_detectron.d2.config import add_kg_config
from kg_detectron.d2.datasets import register_all_cells, register_cells, register_files
from kg_detectron.d2.mapper import CellMapper

register_all_cells()

__all__ = ["CellMapper", "add_kg_config", "register_all_cells", "register_cells", "register_files"]

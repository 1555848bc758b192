"""Classes in Detectron2: the same names in the config, the datasets and the model, whatever ids the files have."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from kg_detectron.d2.datasets import register_cells
from kg_detectron.modeling import method_class
from kg_detectron.modeling.settings import parts
from kg_detectron.training.dataset import class_counts

# NUM_CLASSES that nobody has chosen: ours, and Detectron2's own default.
_UNSET = (1, 80)


def put_classes(cfg: CfgNode, names: Sequence[str], counts: Sequence[int] = ()) -> None:
    """Write the classes into a config (in place): ``MODEL.CELLS.CLASSES`` and ``MODEL.ROI_HEADS.NUM_CLASSES``.

    Args:
        names: of the classes.
        counts: cells of each in the training data, which balance the class loss.

    Raises:
        ValueError: ``NUM_CLASSES`` is another number already.
    """
    check_classes(cfg, len(names))
    cfg.MODEL.CELLS.CLASSES.NAMES = list(names)
    cfg.MODEL.CELLS.CLASSES.CELLS_OF_CLASS = list(counts)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)


def check_classes(cfg: CfgNode, count: int | None = None) -> None:
    """Refuse a number of classes that does not go with the names; ``count`` of these, by default those of the config.

    Raises:
        ValueError: ``MODEL.ROI_HEADS.NUM_CLASSES`` is another number.
    """
    count = len(cfg.MODEL.CELLS.CLASSES.NAMES) if count is None else count
    number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if number not in (*_UNSET, count):
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES: expected {count}, as many as there are names of classes "
            f"(MODEL.CELLS.CLASSES.NAMES, or the categories of the training data), got {number}"
        )


def classes_from_datasets(cfg: CfgNode) -> None:
    """Let a config have the classes of its datasets (in place), and its datasets the classes of the config.

    Names that the config states stay. Otherwise several categories with annotations in ``DATASETS.TRAIN`` are the
    classes; with one nothing changes. All datasets then number their categories by these names.

    Raises:
        OSError, ValueError: a file that cannot be read; ``NUM_CLASSES`` is another number; a method that tells no
            classes apart.
    """
    counts: dict[str, int] = {}
    for name in _cell_datasets(cfg.DATASETS.TRAIN):
        json_file = MetadataCatalog.get(name).json_file
        if not Path(json_file).is_file():  # an evaluation needs no training data, and a training names the file
            continue
        for category, number in class_counts(json_file).items():
            counts[category] = counts.get(category, 0) + number
    names = list(cfg.MODEL.CELLS.CLASSES.NAMES)
    if len(names) < 2:
        names = list(counts)
    if len(names) < 2:
        return
    if cfg.MODEL.META_ARCHITECTURE == "CellInstanceSegmentation" and "classes" not in dict(
        parts(method_class(cfg.MODEL.CELLS.METHOD).Settings)
    ):
        raise ValueError(
            f"method {cfg.MODEL.CELLS.METHOD} tells no classes apart, and the data have {len(names)}: "
            f"{', '.join(names)}; kg-detectron convert --merge-categories makes one of them"
        )
    found = [counts.get(name, 0) for name in names]
    put_classes(cfg, names, found if any(found) else cfg.MODEL.CELLS.CLASSES.CELLS_OF_CLASS)
    for name in _cell_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.VALIDATION, *cfg.DATASETS.TEST]):
        metadata = MetadataCatalog.get(name)
        json_file, image_root = metadata.json_file, metadata.image_root
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_cells(name, json_file, image_root, names)


def _cell_datasets(names: Iterable[str]) -> list[str]:
    """Those of `register_cells`, each once."""
    return [name for name in dict.fromkeys(names) if MetadataCatalog.get(name).get("evaluator_type") == "cells"]

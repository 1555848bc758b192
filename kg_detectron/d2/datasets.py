"""Registration of cell datasets with Detectron2."""

import os
from collections.abc import Iterable
from typing import Any

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
)
from detectron2.structures import BoxMode

from kg_detectron.io.coco import load_coco


def register_cells(name: str, json_file: str, image_root: str) -> None:
    """Register a dataset of cells in COCO format under ``name``.

    The files are read when the dataset is first asked for, and need not exist before. Then ``thing_classes`` and
    ``thing_dataset_id_to_contiguous_id`` join the metadata, as the file names them.

    Errors, when the dataset is read: those of `load_coco`, which name the file.
    """

    def load() -> list[dict[str, Any]]:
        dataset = load_coco(json_file, image_root)
        MetadataCatalog.get(name).set(
            thing_classes=list(dataset.category_names),
            thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(dataset.category_ids)},
        )
        return [
            {**record, "annotations": [{**cell, "bbox_mode": BoxMode.XYWH_ABS} for cell in record["annotations"]]}
            for record in dataset.records
        ]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="cells")


def register_all_cells(root: str | None = None) -> None:
    """Register neural_, dsb2018_ and usiigaci_{train,val,test}, and synthetic_{train,val}.

    The layout is ROOT/NAME/SPLIT/*.png with ROOT/NAME/instances_SPLIT.json; ``root`` is by default the environment's
    DETECTRON2_DATASETS, or ``datasets``. Names that are registered already stay.
    """
    root = root or os.environ.get("DETECTRON2_DATASETS", "datasets")
    splits = dict.fromkeys(("neural", "dsb2018", "usiigaci"), ["train", "val", "test"])
    splits["synthetic"] = ["train", "val"]
    for dataset, parts in splits.items():
        for split in parts:
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                folder = os.path.join(root, dataset)
                register_cells(name, os.path.join(folder, f"instances_{split}.json"), os.path.join(folder, split))


def register_files(names: Iterable[str]) -> None:
    """Register every one of `names` that is the path of a COCO JSON file (it ends in ``.json``), under that path.

    Its images are named from the file's folder, as `kg-detectron convert` names them. Names that are registered already
    stay.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for name in names:
        if name.endswith(".json") and name not in DatasetCatalog:
            if not os.path.isfile(name):
                raise FileNotFoundError(f"dataset {name}: there is no such file")
            register_cells(name, name, os.path.dirname(name))

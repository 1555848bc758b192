"""Registration of cell datasets with Detectron2."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
)
from detectron2.structures import BoxMode

from kg_detectron.io.coco import load_coco


def register_cells(name: str, json_file: str, image_root: str, class_names: Sequence[str] | None = None) -> None:
    """Register a dataset of cells in COCO format under ``name``.

    The files are read when the dataset is first asked for, and need not exist before. Then ``thing_classes`` and
    ``thing_dataset_id_to_contiguous_id`` join the metadata, as the file names them.

    A cell whose category is not known has ``category_id`` 0 and ``unclassified``.

    Args:
        class_names: of the classes 0, 1, ..., to which the categories of the file go by their names; by default all
            its categories, by rising id.

    Errors, when the dataset is read: those of `load_coco`, which name the file; a category that is none of the classes.
    """

    def load() -> list[dict[str, Any]]:
        dataset = load_coco(json_file, image_root)
        names = list(dataset.category_names if class_names is None else class_names)
        classes = [names.index(category) if category in names else None for category in dataset.category_names]
        ids = {id: index for id, index in zip(dataset.category_ids, classes, strict=True) if index is not None}
        for index in range(len(names)):  # Detectron2 wants an id of each class, also where the file has none
            if index not in ids.values():
                ids[max((*ids, *dataset.category_ids)) + 1] = index
        MetadataCatalog.get(name).set(thing_classes=names, thing_dataset_id_to_contiguous_id=ids)

        def annotation(cell: dict[str, Any]) -> dict[str, Any]:
            category = cell["category_id"]
            if category is None:
                return {**cell, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "unclassified": True}
            if classes[category] is None:
                raise ValueError(
                    f"{json_file}: its category {dataset.category_names[category]!r} is none of the classes of the "
                    f"model: {', '.join(names)}"
                )
            return {**cell, "bbox_mode": BoxMode.XYWH_ABS, "category_id": classes[category]}

        return [
            {**record, "annotations": [annotation(cell) for cell in record["annotations"]]}
            for record in dataset.records
        ]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="cells", cell_classes=class_names
    )


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

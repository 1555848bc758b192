"""Cells as a COCO dataset of one image."""

from pathlib import Path
from typing import TYPE_CHECKING

from pycocotools import mask as coco_mask

from kg_detectron.io.coco import write_coco

if TYPE_CHECKING:
    from kg_detectron.export.result import Result


def write(path: Path, result: "Result") -> None:
    """Write one annotation a cell: ``bbox`` is the network's box, ``segmentation`` the mask, ``score`` its score."""
    height, width = result.masks.size
    columns = result.cells.boxes.tolist(), result.scores, result.labels, result.masks.rle()
    annotations = []
    for id, ((x1, y1, x2, y2), score, label, rle) in enumerate(zip(*columns, strict=True), start=1):
        counts = rle["counts"]
        annotation = {
            "id": id,
            "image_id": 1,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": {
                "size": [height, width],
                "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
            },
            "area": int(coco_mask.area(rle)),
            "iscrowd": 0,
        }
        annotations.append(annotation)
    images = [{"id": 1, "file_name": result.file_name, "height": height, "width": width}]
    known = range(1, len(result.category_names) + 1)
    categories = [{"id": label, "name": result.category(label)} for label in sorted({*known, *result.labels})]
    write_coco(path, images, annotations, categories, "cells found by kg_detectron")

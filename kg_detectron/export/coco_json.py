"""Cells as a COCO dataset of one image."""

from pathlib import Path
from typing import TYPE_CHECKING

from kg_detectron.io.coco import rle_annotation, write_coco

if TYPE_CHECKING:
    from kg_detectron.export.result import Result


def write(path: Path, result: "Result") -> None:
    """Write one annotation a cell: ``bbox`` is the network's box, ``segmentation`` the mask, ``score`` its score."""
    height, width = result.masks.size
    columns = result.cells.boxes.tolist(), result.scores, result.labels, result.masks.rle()
    annotations = [
        rle_annotation(rle, image_id=1, annotation_id=number, category_id=label, box=box, score=score)
        for number, (box, score, label, rle) in enumerate(zip(*columns, strict=True), start=1)
    ]
    images = [{"id": 1, "file_name": result.file_name, "height": height, "width": width}]
    known = range(1, len(result.category_names) + 1)
    categories = [{"id": label, "name": result.category(label)} for label in sorted({*known, *result.labels})]
    write_coco(path, images, annotations, categories, "cells found by kg_detectron")

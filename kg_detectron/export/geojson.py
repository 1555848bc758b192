"""Cells as GeoJSON, as QuPath imports it (File > Import objects from file)."""

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kg_detectron.io.atomic import replacing

if TYPE_CHECKING:
    from kg_detectron.export.result import Result

_NAMESPACE = uuid.UUID("4f9f2f4c-6b51-5d0e-9d3d-0c6f8f2f3b5a")  # of our ids


def write(path: Path, result: "Result") -> None:
    """Write a FeatureCollection of detections, one polygon a cell: whole or not at all.

    Coordinates are pixels of the image, x to the right and y down, at the corners of pixels; holes are inner rings. A
    cell's ``name`` is its id, 1..R; its ``measurements`` are the columns of the csv, in the spelling that QuPath reads
    since version 0.2. ``id`` is a UUID, the same in every run on the same image. The geometry of a plane of a stack has
    its ``plane``: z and t from 0, c -1 for all channels.
    """
    write_stack(path, [result])


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the cells of all planes of a stack as one FeatureCollection, each with its plane."""
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        separator = ""
        for result in results:
            for feature in _features(result):
                file.write(separator + json.dumps(feature, separators=(",", ":"), allow_nan=False))
                separator = ","
        file.write("]}\n")


def _features(result: "Result") -> Iterator[dict[str, Any]]:
    columns = {name: values for name, values in result.measurements.items() if name != "class"}
    plane = {}
    if result.page:
        position = dict(result.position)
        # Stacks along an axis that QuPath does not know lie along z.
        time = position.pop("T", 0)
        depth = position.pop("Z", None)
        others = list(position.values())
        plane = {"plane": {"c": -1, "z": others[0] if depth is None and others else depth or 0, "t": time}}
    for i, (rings, label) in enumerate(zip(result.outlines, result.labels, strict=True)):
        x, y = rings[0][0].tolist()
        values = ((name, values[i].item()) for name, values in columns.items())
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMESPACE, f"{result.file_name} {result.page} {i + 1} {x} {y}")),
            "geometry": {
                "type": "Polygon",
                "coordinates": [[*ring.tolist(), ring[0].tolist()] for ring in rings],
                **plane,
            },
            "properties": {
                "objectType": "detection",
                "name": str(i + 1),
                "classification": {
                    "name": result.category(label),
                    "color": list(result.category_colour(label)),
                },
                "measurements": [{"name": name, "value": value} for name, value in values if np.isfinite(value)],
            },
        }

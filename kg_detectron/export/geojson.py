"""Cells as GeoJSON, as QuPath imports it (File > Import objects from file)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kg_detectron.io.atomic import replacing


def write_geojson(path: str | Path, outlines: Sequence[Sequence[np.ndarray]], scores: Sequence[float]) -> None:
    """Write a FeatureCollection of detections, one polygon a cell: whole or not at all.

    Coordinates are pixels of the image, x to the right and y down, at the corners of pixels; holes are inner rings. A
    cell's ``name`` is its id, 1..N; its measurements are ``id`` and ``score``, in the spelling that QuPath reads since
    version 0.2.

    Args:
        path: the file; an existing one is replaced.
        outlines: of each cell its rings (K,2), the outer one first (`outline.outlines`).
        scores: of each cell.
    """
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*ring.tolist(), ring[0].tolist()] for ring in rings]},
            "properties": {
                "objectType": "detection",
                "name": str(id),
                "measurements": [{"name": "id", "value": id}, {"name": "score", "value": score}],
            },
        }
        for id, (rings, score) in enumerate(zip(outlines, scores, strict=True), start=1)
    ]
    collection = {"type": "FeatureCollection", "features": features}
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(collection, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")

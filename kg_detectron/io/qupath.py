"""Cells from GeoJSON, as QuPath exports its objects (File > Export objects as GeoJSON). H, W: pixels of the image."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon

from kg_detectron.io.coco import read_json

GEOJSON = ".geojson"
_CELLS = ("detection", "cell", "tile")  # types of objects that are cells; annotations are regions beside them
_MAX_POINTS = 1_000_000


class Outlined(NamedTuple):
    """A cell: its mask (H, W) bool, and the name of its class or None."""

    mask: NDArray[np.bool_]
    category: str | None


def read_geojson(path: str | Path, size: tuple[int, int]) -> list[Outlined]:
    """Read the cells of an image.

    Where there are detections or cells, these are taken, and annotations are regions that are left out; otherwise
    annotations are the cells. A pixel belongs to a cell where its centre lies inside the polygon and in none of its
    holes. Coordinates are pixels of the image at full resolution.

    Args:
        path: a FeatureCollection, a list of features, or one feature.
        size: (H, W) of the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no GeoJSON, or a feature that is no polygon in the image. The message names the file and feature.
    """
    content = read_json(path, dict, list)
    features = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(features, list) or not all(isinstance(one, dict) for one in features):
        raise ValueError(f"{path}: expected GeoJSON features, got {str(content)[:80]}")
    numbered = [(number, one) for number, one in enumerate(features) if _type(one) in _CELLS]
    cells = []
    for number, feature in numbered or list(enumerate(features)):
        where = f"{path}: feature {number}"
        mask = _mask(feature.get("geometry"), size, where)
        if not mask.any():
            raise ValueError(f"{where} has no pixel in the image of {size[0]} x {size[1]} pixels (height, width)")
        cells.append(Outlined(mask, _category(feature, where)))
    return cells


def _type(feature: dict[str, Any]) -> object:
    properties = feature.get("properties")
    return properties.get("objectType") if isinstance(properties, dict) else None


def _category(feature: dict[str, Any], where: str) -> str | None:
    """``{"name": "Tumor"}``, or of derived classes ``{"names": ["Tumor", "Positive"]}``."""
    properties = feature.get("properties")
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if classification is None:
        return None
    names = classification.get("names", [classification.get("name")]) if isinstance(classification, dict) else [None]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: expected a classification with a name, got {str(classification)[:80]}")
    return ": ".join(names)


def _mask(geometry: Any, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"{where}: expected a Polygon or MultiPolygon, got {kind}")
    polygons = geometry.get("coordinates")
    mask = np.zeros(size, bool)
    try:
        for rings in [polygons] if kind == "Polygon" else polygons:
            part = np.zeros(size, bool)
            for index, ring in enumerate(rings):
                points = np.asarray(ring, np.float64)[:, :2]
                if not np.isfinite(points).all() or not 3 <= len(points) <= _MAX_POINTS:
                    raise ValueError
                # Centres of pixels are whole numbers here.
                rows, columns = polygon(points[:, 1] - 0.5, points[:, 0] - 0.5, size)
                part[rows, columns] = index == 0
            mask |= part
    except (ValueError, TypeError, IndexError):
        raise ValueError(f"{where}: its coordinates are no rings of points x, y") from None
    return mask

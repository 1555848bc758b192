"""The part of an image in which cells are looked for: the tissue of a slide, and the regions that a user draws.

H, W: height and width of an image in pixels; coordinates are pixels of it, x to the right and y down.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kg_detectron.io.lazy import LazyPlane

# Levels by which red, green and blue differ in tissue at least, of 255, and the highest such limit that an image sets.
_LEAST_COLOUR, _MOST_COLOUR = 8, 40
_SIDE = 4096  # of the mask, pixels at most

Polygon = list[np.ndarray]  # its rings (K, 2) of x, y: the outer one, then the holes


@dataclass(frozen=True)
class Area:
    """A part of an image.

    Attributes:
        size: (H, W) of the image.
        mask: (h, w) bool, the part, made coarser; a pixel that it touches counts.
        polygons: the exact regions; None where the mask is all there is.
    """

    size: tuple[int, int]
    mask: np.ndarray
    polygons: list[Polygon] | None = None

    def touches(self, x1: float, y1: float, x2: float, y2: float) -> bool:
        """Whether any of the part lies in a window."""
        (height, width), (h, w) = self.size, self.mask.shape
        rows = slice(max(0, int(y1 * h // height)), max(0, int(-(-y2 * h // height))))
        columns = slice(max(0, int(x1 * w // width)), max(0, int(-(-x2 * w // width))))
        return bool(self.mask[rows, columns].any())

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Which of the points (N, 2), x and y, lie in one of the polygons; all where there are none: (N,) bool."""
        if self.polygons is None:
            return np.ones(len(points), bool)
        from matplotlib.path import Path as Outline  # slow to import

        inside = np.zeros(len(points), bool)
        for outer, *holes in self.polygons:
            within = Outline(outer).contains_points(points)
            for hole in holes:
                within &= ~Outline(hole).contains_points(points)
            inside |= within
        return inside

    @property
    def share(self) -> float:
        """The part of the image, 0..1, as the mask has it."""
        return float(self.mask.mean())


def area_of(image: np.ndarray | LazyPlane, regions: Sequence[str], *, tissue: bool) -> Area | None:
    """The area in which the cells of an image are looked for; None for all of it.

    Args:
        image: (H, W, 3).
        regions: see `regions_of`.
        tissue: leave out what is glass.
    """
    size = (image.shape[0], image.shape[1])
    polygons = [polygon for text in regions for polygon in _polygons(text)]
    if not polygons and not tissue:
        return None
    if tissue:
        assert isinstance(image, LazyPlane)
        mask = tissue_mask(image.overview())
    else:
        step = max(1, -(-max(size) // _SIDE))
        mask = np.ones((-(-size[0] // step), -(-size[1] // step)), bool)
    if polygons:
        drawn = np.zeros(mask.shape, np.uint8)
        scale = np.array([mask.shape[1] / size[1], mask.shape[0] / size[0]])
        for outer, *_ in polygons:
            points = np.floor(outer * scale).astype(np.int32)
            cv2.fillPoly(drawn, [points], 1)
            cv2.polylines(drawn, [points], True, 1, thickness=2)
        mask = mask & drawn.astype(bool)
    return Area(size, mask, polygons or None)


def tissue_mask(overview: np.ndarray) -> np.ndarray:
    """Where a slide in colour shows tissue, (h, w) bool: where it is coloured more than glass.

    The limit is Otsu's between the two, within bounds, so that neither a slide without any tissue nor one without any
    glass is cut at random.

    Args:
        overview: (h, w, 3) of 0..255.
    """
    colour = overview.max(axis=2).astype(np.uint8) - overview.min(axis=2).astype(np.uint8)
    colour = cv2.medianBlur(np.ascontiguousarray(colour), 5)
    limit, _ = cv2.threshold(colour, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = (colour > min(max(limit, _LEAST_COLOUR), _MOST_COLOUR)).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel).astype(bool)


def regions_of(given: Sequence[str]) -> tuple[str, ...]:
    """Regions as a run records them, from what a user gives.

    Args:
        given: rectangles ``X,Y,WIDTH,HEIGHT`` in pixels, and GeoJSON files with polygons, such as QuPath exports.

    Returns:
        Each region as the JSON of its polygons, which holds when the file is gone.

    Raises:
        ValueError: neither of both, or a file without any polygon.
        OSError: a file that cannot be read.
    """
    return tuple(_as_text(_rectangle(text) or _read_polygons(Path(text))) for text in given)


def _rectangle(text: str) -> list[list[list[list[float]]]] | None:
    parts = text.split(",")
    try:
        x, y, width, height = map(float, parts)
    except ValueError:
        if not Path(text).exists() and (len(parts) == 4 or not Path(text).suffix):
            raise ValueError(f"region: expected four numbers X,Y,WIDTH,HEIGHT or a file, got {text}") from None
        return None
    if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
        raise ValueError(f"region: expected a width and height above 0, got {text}")
    return [[[[x, y], [x + width, y], [x + width, y + height], [x, y + height]]]]


def _read_polygons(path: Path) -> list[list[list[list[float]]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        features = content if isinstance(content, list) else content.get("features", [content])
        polygons: list[Any] = []
        for feature in features:
            geometry = feature.get("geometry", feature) or {}  # a feature may have none
            if geometry.get("type") == "Polygon":
                polygons.append(geometry["coordinates"])
            elif geometry.get("type") == "MultiPolygon":
                polygons += geometry["coordinates"]
        rings = [np.array(ring, float)[:, :2] for polygon in polygons for ring in polygon]
        if not rings or not all(np.isfinite(ring).all() and len(ring) >= 3 for ring in rings):
            raise ValueError("it has no polygon")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: expected a GeoJSON of polygons, or X,Y,WIDTH,HEIGHT: {error}") from None
    return polygons


def _as_text(polygons: list[Any]) -> str:
    return json.dumps(polygons, separators=(",", ":"))


def _polygons(text: str) -> list[Polygon]:
    return [[np.array(ring, float)[:, :2] for ring in polygon] for polygon in json.loads(text)]

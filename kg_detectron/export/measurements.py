"""What can be measured of each cell, as a table."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from kg_detectron.io.atomic import replacing
from kg_detectron.io.lazy import BLOCK, LazyPlane

if TYPE_CHECKING:
    from kg_detectron.cells.masks import MaskCrops
    from kg_detectron.export.result import Result

# What shapes are described by; lengths get their unit behind the name.
_LENGTHS = (
    "perimeter",
    "axis_major_length",
    "axis_minor_length",
    "feret_diameter_max",
    "equivalent_diameter_area",
)
_SHAPES = ("eccentricity", "solidity", "orientation_rad")
_INTENSITIES = ("mean", "min", "max", "std")


def measure(
    masks: "MaskCrops",
    boxes: np.ndarray,
    scores: np.ndarray,
    image: np.ndarray,
    pixel_size: float | None = None,
    channel_names: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Measure R cells; the unit is in the names of the columns.

    Places are continuous: pixel i reaches from i to i + 1, and its centre is at i + 0.5.

    Args:
        masks: R cells, which may overlap. Of one without any pixel there are no values but its area, 0.
        boxes: (R, 4) xyxy, as the network gave them, pixels.
        scores: (R,).
        image: (H, W), (H, W, 3) BGR or (H, W, C); intensities are in its own units.
        pixel_size: micrometres a pixel; with it, lengths and areas come in micrometres as well.
        channel_names: of the C channels, in the order of the array. Without names, three channels are blue, green, red.
    Returns:
        Columns (R,): ``id`` (1..R), ``score``, ``area_px``, ``centroid_x_px`` and ``y``, ``box_x1_px``, ``y1``, ``x2``
        and ``y2``; as `skimage.measure.regionprops` has them ``perimeter_px`` (Crofton's, in four directions),
        ``axis_major_length_px``, ``axis_minor_length_px``, ``feret_diameter_max_px``, ``equivalent_diameter_area_px``,
        ``eccentricity``, ``solidity``, ``orientation_rad``; with a pixel size, areas and lengths again in ``um2`` and
        ``um``. For every channel ``mean_intensity_NAME``, ``min``, ``max`` and ``std``; of a grey image without
        ``_NAME``.
    """
    image = image[..., None] if image.ndim == 2 else image
    count, channels = len(masks), image.shape[2]
    area, centroid = np.zeros(count, np.int64), np.full((count, 2), np.nan)
    variances, outlines = np.full((count, 3), np.nan), np.full((count, 3), np.nan)
    intensity = {name: np.full((count, channels), np.nan) for name in _INTENSITIES}
    order = range(count)
    if isinstance(image, LazyPlane):  # neighbours one after the other, for it keeps what it read last
        rows, columns = (masks.windows[:, axis].numpy() // BLOCK for axis in (1, 0))
        order = np.lexsort((columns, rows)).tolist()
    for i, (crop, (x1, y1, x2, y2)) in zip(order, masks.pixels(order), strict=True):
        y, x = np.nonzero(crop)
        area[i] = len(x)
        if not len(x):
            continue
        centre = x.mean(), y.mean()
        centroid[i] = x1 + centre[0] + 0.5, y1 + centre[1] + 0.5
        dx, dy = x - centre[0], y - centre[1]
        variances[i] = dx @ dx, dx @ dy, dy @ dy
        outlines[i] = _outline(crop)
        pixels = image[y1:y2, x1:x2][crop].astype(np.float64)
        for name in _INTENSITIES:
            intensity[name][i] = getattr(pixels, name)(axis=0)
    shapes = _ellipses(variances / np.maximum(area, 1)[:, None])
    shapes["equivalent_diameter_area"] = 2 * np.sqrt(area / math.pi)
    shapes["perimeter"], shapes["feret_diameter_max"], hull = outlines.T
    shapes["solidity"] = area / np.maximum(hull, 1)

    boxes = np.asarray(boxes, np.float64)
    lengths = {"centroid_x": centroid[:, 0], "centroid_y": centroid[:, 1]}
    lengths |= {f"box_{side}": boxes[:, s] for s, side in enumerate(("x1", "y1", "x2", "y2"))}
    lengths |= {name: shapes[name] for name in _LENGTHS}
    columns = {"id": np.arange(1, count + 1), "score": np.asarray(scores), "area_px": area}
    columns |= {f"{name}_px": values for name, values in lengths.items()}
    if pixel_size is not None:
        columns["area_um2"] = area * pixel_size**2
        columns |= {f"{name}_um": values * pixel_size for name, values in lengths.items()}
    columns |= {name: shapes[name] for name in _SHAPES}
    for c, suffix in _channel_suffixes(channels, channel_names):
        columns |= {f"{name}_intensity{suffix}": intensity[name][:, c] for name in _INTENSITIES}
    return columns


def _outline(crop: np.ndarray) -> tuple[float, float, float]:
    """Crofton's perimeter, the largest Feret diameter, and the pixels of the convex hull, of a cell's pixels (h, w)."""
    hull = _convex_hull(crop)
    places = _ends(hull)  # which regionprops finds by contours
    squares = (places**2).sum(1)
    distances = squares[:, None] + squares - 2 * places @ places.T
    feret = math.sqrt(max(0.0, distances.max(initial=0)))
    return _perimeter(crop), feret, float(np.count_nonzero(hull))


def _perimeter(crop: np.ndarray) -> float:
    """Crofton's perimeter, from the number of runs of pixels along rows, columns and both diagonals."""
    height, width = crop.shape
    padded = np.pad(crop, 1)
    rows, columns, *diagonals = (
        np.count_nonzero(crop & ~padded[y : y + height, x : x + width]) for y, x in ((1, 0), (0, 1), (0, 0), (0, 2))
    )
    return math.pi / 4 * (rows + columns + sum(diagonals) / math.sqrt(2))


def _convex_hull(crop: np.ndarray) -> np.ndarray:
    """The pixels (h, w) whose centres lie in the convex hull of a cell's pixels, or on its edge."""
    corners = cv2.convexHull((2 * _ends(crop)).astype(np.int32))[:, 0].astype(np.int64)  # (y, x), twice
    y, x = 2 * np.arange(crop.shape[0])[:, None], 2 * np.arange(crop.shape[1])
    hull = np.ones(crop.shape, bool)
    for (y1, x1), (y2, x2) in zip(np.roll(corners, 1, axis=0), corners, strict=True):
        hull &= (x2 - x1) * (y - y1) <= (y2 - y1) * (x - x1)
    return hull


def _ends(pixels: np.ndarray) -> np.ndarray:
    """The ends (N, 2), yx, of the rows and columns of pixels (h, w): the middles of their outer edges."""
    ends = []
    for lines in (pixels, pixels.T):
        line = np.flatnonzero(lines.any(1))
        first, last = lines[line].argmax(1), lines.shape[1] - lines[line, ::-1].argmax(1)
        points = np.stack((np.tile(line, 2), np.concatenate((first - 0.5, last - 0.5))), axis=1)
        ends.append(points if lines is pixels else points[:, ::-1])
    return np.concatenate(ends)


def _ellipses(variances: np.ndarray) -> dict[str, np.ndarray]:
    """The ellipses of (R, 3) variances of x, of x and y, and of y; as in regionprops."""
    xx, xy, yy = variances.T
    middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major, minor = middle + half, np.maximum(middle - half, 0)
    return {
        "axis_major_length": 4 * np.sqrt(major),
        "axis_minor_length": 4 * np.sqrt(minor),
        "eccentricity": np.sqrt(1 - np.divide(minor, major, out=np.ones_like(major), where=major != 0)),
        "orientation_rad": np.where(xx == yy, np.where(xy > 0, 1, -1) * math.pi / 4, np.arctan2(2 * xy, yy - xx) / 2),
    }


def _channel_suffixes(channels: int, names: Sequence[str]) -> list[tuple[int, str]]:
    """Of every column of intensities its channel and what stands behind its name."""
    if channels == 1:
        return [(0, "")]
    if len(names) != channels:
        if channels == 3:
            return [(2, "_red"), (1, "_green"), (0, "_blue")]
        names = [f"channel{c}" for c in range(1, channels + 1)]
    suffixes: list[str] = []
    for c, name in enumerate(names, start=1):
        suffix = "_" + "_".join(name.split())
        suffixes.append(suffix if suffix != "_" and suffix not in suffixes else f"{suffix.rstrip('_')}_channel{c}")
    return list(enumerate(suffixes))


def write(path: Path, result: "Result") -> None:
    """Write the measurements of one image as CSV."""
    write_table(path, result.measurements)


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the measurements of all planes of a stack as one CSV; ids begin anew on every page."""
    tables = [result.measurements for result in results]
    write_table(path, {name: np.concatenate([table[name] for table in tables]) for name in tables[0]})


def write_table(path: str | Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns of one length as CSV, numbers to ten digits: whole or not at all."""
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([value if isinstance(value, str) else f"{value:.10g}" for value in row])

"""What can be measured of each cell, as a table."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kg_detectron.io.atomic import replacing
from kg_detectron.io.lazy import BLOCK, LazyPlane

if TYPE_CHECKING:
    from kg_detectron.cells.masks import MaskCrops
    from kg_detectron.export.result import Result

# Of skimage.measure.regionprops, by what the columns are called; lengths get their unit behind the name.
_LENGTHS = {
    "perimeter": "perimeter_crofton",
    "axis_major_length": "axis_major_length",
    "axis_minor_length": "axis_minor_length",
    "feret_diameter_max": "feret_diameter_max",
    "equivalent_diameter_area": "equivalent_diameter_area",
}
_SHAPES = {"eccentricity": "eccentricity", "solidity": "solidity", "orientation_rad": "orientation"}
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
        masks: R cells, none empty.
        boxes: (R, 4) xyxy, as the network gave them, pixels.
        scores: (R,).
        image: (H, W), (H, W, 3) BGR or (H, W, C); intensities are in its own units.
        pixel_size: micrometres a pixel; with it, lengths and areas come in micrometres as well.
        channel_names: of the C channels, in the order of the array. Without names, three channels are blue, green, red.
    Returns:
        Columns (R,): ``id`` (1..R), ``score``, ``area_px``, ``centroid_x_px`` and ``y``, ``box_x1_px``, ``y1``, ``x2``
        and ``y2``, and of `skimage.measure.regionprops` ``perimeter_px`` (Crofton's formula in four directions),
        ``axis_major_length_px``, ``axis_minor_length_px``, ``feret_diameter_max_px``, ``equivalent_diameter_area_px``,
        ``eccentricity``, ``solidity``, ``orientation_rad``; with a pixel size, areas and lengths again in ``um2`` and
        ``um``. For every channel ``mean_intensity_NAME``, ``min``, ``max`` and ``std``; of a grey image without
        ``_NAME``.
    """
    from skimage.measure import regionprops

    image = image[..., None] if image.ndim == 2 else image
    count, channels = len(masks), image.shape[2]
    area, centroid = np.zeros(count, np.int64), np.zeros((count, 2))
    shapes = {name: np.zeros(count) for name in (*_LENGTHS, *_SHAPES)}
    intensity = {name: np.zeros((count, channels)) for name in _INTENSITIES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hulls of single pixels
        order = range(count)
        if isinstance(image, LazyPlane):  # neighbours one after the other, for it keeps what it read last
            rows, columns = (masks.windows[:, axis].numpy() // BLOCK for axis in (1, 0))
            order = np.lexsort((columns, rows)).tolist()
        for i, (crop, (x1, y1, x2, y2)) in zip(order, masks.pixels(order), strict=True):
            y, x = np.nonzero(crop)
            area[i] = len(x)
            centroid[i] = x1 + x.mean() + 0.5, y1 + y.mean() + 0.5
            (region,) = regionprops(np.pad(crop, 1).view(np.uint8))
            for name, attribute in (_LENGTHS | _SHAPES).items():
                shapes[name][i] = getattr(region, attribute)
            pixels = image[y1:y2, x1:x2][crop].astype(np.float64)
            for name in _INTENSITIES:
                intensity[name][i] = getattr(pixels, name)(axis=0)

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

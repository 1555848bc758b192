"""What can be measured of each cell, as a table."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from skimage.measure import perimeter_crofton

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.io.atomic import replacing


def measure(
    masks: MaskCrops, boxes: np.ndarray, scores: np.ndarray, image: np.ndarray, pixel_size: float | None = None
) -> dict[str, np.ndarray]:
    """Measure N cells; the unit is in the names of the columns.

    Places are continuous: pixel i reaches from i to i + 1, and its centre is at i + 0.5.

    Args:
        masks: N cells, none empty.
        boxes: (N,4) xyxy, as the network gave them, pixels.
        scores: (N,).
        image: (H,W), (H,W,3) BGR or (H,W,C); intensities are in its own units.
        pixel_size: micrometres a pixel; with it, lengths and areas come in micrometres as well.
    Returns:
        Columns (N,): ``id`` (1..N), ``score``, ``area_px``, ``centroid_x_px`` and ``y``, ``box_x1_px``, ``y1``, ``x2``
        and ``y2``, ``perimeter_px`` (Crofton's formula in four directions); with a pixel size, all but id and score
        again in ``um`` and ``um2``; ``mean_intensity`` of a grey image, ``mean_intensity_red``, ``green`` and ``blue``
        of one with three channels, or ``mean_intensity_channel1`` and so on.
    """
    image = np.atleast_3d(image)
    area, perimeter = np.zeros(len(masks), np.int64), np.zeros(len(masks))
    centroid, intensity = np.zeros((len(masks), 2)), np.zeros((len(masks), image.shape[2]))
    for i, (crop, (x1, y1, x2, y2)) in enumerate(masks.pixels()):
        y, x = np.nonzero(crop)
        area[i] = len(x)
        centroid[i] = x1 + x.mean() + 0.5, y1 + y.mean() + 0.5
        perimeter[i] = perimeter_crofton(np.pad(crop, 1), directions=4)
        intensity[i] = image[y1:y2, x1:x2][crop].mean(axis=0, dtype=np.float64)

    boxes = np.asarray(boxes, np.float64)
    lengths = {"centroid_x": centroid[:, 0], "centroid_y": centroid[:, 1]}
    lengths |= {f"box_{side}": boxes[:, s] for s, side in enumerate(("x1", "y1", "x2", "y2"))}
    lengths["perimeter"] = perimeter
    columns = {"id": np.arange(1, len(masks) + 1), "score": np.asarray(scores), "area_px": area}
    columns |= {f"{name}_px": values for name, values in lengths.items()}
    if pixel_size is not None:
        columns["area_um2"] = area * pixel_size**2
        columns |= {f"{name}_um": values * pixel_size for name, values in lengths.items()}
    if image.shape[2] == 1:
        names = ["mean_intensity"]
    elif image.shape[2] == 3:
        names, intensity = [f"mean_intensity_{colour}" for colour in ("red", "green", "blue")], intensity[:, ::-1]
    else:
        names = [f"mean_intensity_channel{c}" for c in range(1, image.shape[2] + 1)]
    return columns | dict(zip(names, intensity.T, strict=True))


def write_table(path: str | Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns of one length as CSV, numbers to ten digits: whole or not at all."""
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([f"{value:.10g}" for value in row] for row in zip(*columns.values(), strict=True))

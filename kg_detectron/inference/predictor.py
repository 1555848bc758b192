"""Prediction for one image of any size."""

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.inference.ensemble import MIRRORS, join_cells
from kg_detectron.inference.run_settings import Settings
from kg_detectron.inference.tiling import check_tile, detect_tiled
from kg_detectron.io.lazy import LazyPlane
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.modeling.preprocessing import NetworkImage, as_tensor


@torch.no_grad()
def predict(
    model: InstanceNet,
    image: np.ndarray,
    *,
    scale: float | None = None,
    diameter: float | None = None,
    pixel_size: float | None = None,
    normalisation: str | None = None,
    tile: int = Settings.tile,
    overlap: int = Settings.overlap,
    ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Cells:
    """Find the cells of an image.

    The image gets the levels and the scale that the model was trained with. One that is then larger than a tile is
    predicted tile by tile, with the result of the whole image.

    Args:
        model: in evaluation mode.
        image: (H, W, 3), BGR, of any type and levels that the model's normalisation takes, as `read_image` gives it: an
            array, or anything with ``shape``, ``ndim`` and ``dtype`` that is sliced like one, such as `numpy.memmap`
            or `kg_detectron.io.lazy.LazyPlane`.
        scale: pixels of the network's input for one of the image; 1 keeps the pixels.
        diameter: median diameter of the cells, pixels of the image; it sets the scale.
        pixel_size: micrometres of a pixel; it sets the scale where the model knows its own. At most one of these three
            may be given; without any the model estimates the scale from the image.
        normalisation: "fixed" or "percentile" instead of the model's own.
        tile: largest side of a tile, pixels of the network's input, a multiple of 32. Around it the network sees as
            much again as its results depend on; so larger tiles take less time a pixel, and more memory.
        overlap: largest side of a cell, pixels of the network's input, that is segmented together with the others of
            its tile. Larger cells are segmented alone, up to a side of ``tile + overlap``; those beyond are left out,
            and ``notes`` of the result says so.
        ensemble: predict all four mirror images and join the cells, see `kg_detectron.inference.ensemble`: more
            accurate, and three times as slow.
        progress: called after each step with the number of steps done and of all.

    Returns:
        The cells, by falling score. ``scale``, ``scale_source`` and ``notes`` tell how they were found.

    Raises:
        ValueError: an image of another shape, type or range, arguments that do not fit, or a model in training mode.

    Example:
        >>> model = load_model("nuclei")
        >>> cells = predict(model, read_image("image.tif"))
        >>> labels = cells.above(model.threshold).masks.label_image()
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, call model.eval() first")
    check_tile(tile, overlap)
    if ensemble and isinstance(image, LazyPlane):
        raise ValueError("ensemble: the image is too large to be mirrored, for it is read piece by piece")
    preprocessing = model.preprocessing
    if normalisation is not None:
        preprocessing = dataclasses.replace(preprocessing, normalisation=normalisation)
    detections: list[Cells] = []
    for mirror in MIRRORS if ensemble else MIRRORS[:1]:
        mirrored = mirror.apply(image) if ensemble else image
        seen, source = model.network_image(
            mirrored, scale=scale, diameter=diameter, pixel_size=pixel_size, preprocessing=preprocessing
        )
        if preprocessing.resize == "isotropic":  # the mirror images get the same scale
            scale, diameter, pixel_size = seen.scale[0], None, None
        steps = _part_of_progress(progress or _no_progress, len(detections), len(MIRRORS) if ensemble else 1)
        cells = _detect(model, seen, tile, overlap, steps)
        cells = cells.in_frame((image.shape[0], image.shape[1]), seen.scale)
        detections.append(mirror.undo(dataclasses.replace(cells, scale_source=source)))
    return join_cells(detections) if ensemble else detections[0]


def _detect(
    model: InstanceNet, seen: NetworkImage, tile: int, overlap: int, progress: Callable[[int, int], None]
) -> Cells:
    if max(seen.shape[:2]) <= tile or not model.tiled:
        (cells,) = model.detect([as_tensor(seen[:, :], model.place)])
        progress(1, 1)
        return cells
    cells = detect_tiled(cast(KeypointGraphNet, model), seen, tile=tile, overlap=overlap, progress=progress)
    return dataclasses.replace(cells, scores=model.scores(cells.scores))


def _no_progress(done: int, steps: int) -> None:
    pass


def _part_of_progress(progress: Callable[[int, int], None], part: int, parts: int) -> Callable[[int, int], None]:
    """For one of several parts of equally many steps."""
    return lambda done, steps: progress(part * steps + done, parts * steps)

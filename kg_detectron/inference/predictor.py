"""Prediction for one image of any size."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.inference.area import Area
from kg_detectron.inference.ensemble import MIRRORS, Mirror, join_cells
from kg_detectron.inference.run_settings import Settings
from kg_detectron.inference.tile_store import TileStore
from kg_detectron.inference.tiling import TiledDetection, Window, check_tile
from kg_detectron.io.images import Page, channels_of_nuclei, undecided
from kg_detectron.io.lazy import LazyPlane
from kg_detectron.io.normalisation import has_finite_value
from kg_detectron.io.setting import check_score
from kg_detectron.io.stains import SINGLE_COLOURS
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.modeling.cell_size import choose_channel
from kg_detectron.modeling.preprocessing import HAEMATOXYLIN, NetworkImage, Preprocessing

HAEMATOXYLIN_NOTE = (
    "The network was shown how much haematoxylin is where, for there it expects more cells than in colours."
)
VIEW_NOTES = {HAEMATOXYLIN: HAEMATOXYLIN_NOTE} | {
    colour: f"The network was shown the {colour} of the picture alone, for there it is surest of the cells."
    for colour in SINGLE_COLOURS
}

SCALE_BAR_NOTE = "A scale bar is drawn into the image; the network was shown the image without it."
NO_VALUE_NOTE = "The image has no finite value: all are NaN or infinite."


@torch.no_grad()
def predict(
    model: InstanceNet,
    image: np.ndarray,
    *,
    scale: float | None = None,
    diameter: float | None = None,
    pixel_size: float | None = None,
    normalisation: str | None = None,
    single_colours: bool = True,
    min_score: float = 0.0,
    tile: int = Settings.tile,
    overlap: int = Settings.overlap,
    ensemble: bool = False,
    area: Area | None = None,
    store: TileStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cells:
    """Find the cells of an image.

    The image gets the levels and the scale that the model was trained with. One that is then larger than a tile is
    predicted tile by tile, with the result of the whole image.

    Args:
        model: in evaluation mode.
        image: (H, W, 3), BGR, as `read_image` gives it, or (H, W), grey, of any type and levels that the model's
            normalisation takes: an array, or anything with ``shape``, ``ndim`` and ``dtype`` that is sliced like one,
            such as `numpy.memmap` or `kg_detectron.io.lazy.LazyPlane`.
        scale: pixels of the network's input for one of the image; 1 keeps the pixels.
        diameter: median diameter of the cells, pixels of the image; it sets the scale.
        pixel_size: micrometres of a pixel; it sets the scale where the model knows its own. At most one of these three
            may be given; without any the model estimates the scale from the image.
        normalisation: "fixed" or "percentile" instead of the model's own.
        single_colours: False shows the network all colours of a picture of several dyes, see
            `Preprocessing.single_colours`.
        min_score: cells of a lower score, 0..1, are left out, before time is spent on their masks; ``model.threshold``
            gives those that the model takes for true.
        tile: largest side of a tile, pixels of the network's input, a multiple of 32. Around it the network sees as
            much again as its results depend on; so larger tiles take less time a pixel, and more memory.
        overlap: largest side of a cell, pixels of the network's input, that is segmented together with the others of
            its tile. Larger cells are segmented alone, up to a side of ``tile + overlap``; those beyond are left out,
            and ``notes`` of the result says so.
        ensemble: predict all four mirror images and join the cells, see `kg_detectron.inference.ensemble`: more
            accurate, and three times as slow.
        area: the part of the image in which cells are looked for. Tiles in which nothing of it lies are left out, and
            cells whose box has its centre outside its polygons.
        store: where what is computed of tiles is kept, and taken from where it is there.
        progress: called after each step with the number of steps done and of all.

    Returns:
        The cells, by falling score. ``scale``, ``scale_source`` and ``notes`` tell how they were found.

    Raises:
        ValueError: an image of another shape, type or range, arguments that do not fit, or a model in training mode.

    Example:
        >>> model = load_model("nuclei")
        >>> cells = predict(model, read_image("image.tif"), min_score=model.threshold)
        >>> labels = cells.masks.label_image()
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, call model.eval() first")
    check_tile(tile, overlap)
    check_score("min_score", min_score)
    if ensemble and isinstance(image, LazyPlane):
        raise ValueError("ensemble: the image is too large to be mirrored, for it is read piece by piece")
    preprocessing = _preprocessing(model, normalisation, single_colours)
    detections: list[Cells] = []
    view: str | None = None
    for mirror in MIRRORS if ensemble else MIRRORS[:1]:
        part = None if store is None else store.part(str(len(detections)))
        mirrored = mirror.apply(image) if ensemble else image
        seen, source = _seen(model, mirrored, preprocessing, scale, diameter, pixel_size, view, part)
        view = seen.view
        if preprocessing.resize == "isotropic":  # the mirror images get the same scale
            scale, diameter, pixel_size = seen.scale[0], None, None
        steps = _part_of_progress(progress or _no_progress, len(detections), len(MIRRORS) if ensemble else 1)
        wanted = None if area is None else _wanted(area, mirror, seen)
        # Of an ensemble, the mean of the scores counts.
        lowest = 0.0 if ensemble else min_score
        tiled = _tiled(model, seen, lowest, tile, overlap, wanted, part)
        if tiled is None:
            cells = model.detect_seen(seen, min_score=lowest)
            steps(1, 1)
        else:
            cells = model.rated(tiled.cells(steps))
        cells = cells.in_frame((image.shape[0], image.shape[1]), seen.scale, seen.border)
        notes = (*cells.notes, VIEW_NOTES[view]) if view in VIEW_NOTES else cells.notes
        notes = (*notes, SCALE_BAR_NOTE) if seen.painted else notes
        detections.append(mirror.undo(dataclasses.replace(cells, scale_source=source, view=view, notes=notes)))
    cells = (join_cells(detections) if ensemble else detections[0]).above(min_score)
    if not has_finite_value(image):
        cells = dataclasses.replace(cells, notes=(*cells.notes, NO_VALUE_NOTE))
    if area is None:
        return cells
    centres = ((cells.boxes[:, :2] + cells.boxes[:, 2:]) / 2).cpu().double().numpy()
    return cells[torch.from_numpy(area.contains(centres)).to(cells.boxes.device)]


def _wanted(area: Area, mirror: Mirror, seen: NetworkImage) -> Callable[[Window], bool]:
    """Whether the area touches a window of the network's input, of a mirror image too."""
    (height, width), (scale_y, scale_x) = area.size, seen.scale

    def touches(window: Window) -> bool:
        x1, x2 = (min(max(x / scale_x - seen.border, 0), width) for x in (window.x1, window.x2))
        y1, y2 = (min(max(y / scale_y - seen.border, 0), height) for y in (window.y1, window.y2))
        if mirror.flip_x:
            x1, x2 = width - x2, width - x1
        if mirror.flip_y:
            y1, y2 = height - y2, height - y1
        return area.touches(x1, y1, x2, y2)

    return touches


@torch.no_grad()
def tiled_steps(
    model: InstanceNet,
    image: np.ndarray,
    *,
    scale: float | None,
    diameter: float | None,
    pixel_size: float | None,
    normalisation: str | None,
    single_colours: bool,
    min_score: float,
    tile: int,
    overlap: int,
    area: Area | None,
    store: TileStore,
) -> TiledDetection | None:
    """The steps of `predict`, without an ensemble, for processes that share them by a store; None for an image that is
    not predicted in tiles. The arguments are those of `predict`."""
    preprocessing = _preprocessing(model, normalisation, single_colours)
    part = store.part("0")
    seen, _ = _seen(model, image, preprocessing, scale, diameter, pixel_size, None, part)
    wanted = None if area is None else _wanted(area, MIRRORS[0], seen)
    return _tiled(model, seen, min_score, tile, overlap, wanted, part)


def clear_channel(
    model: InstanceNet,
    channels: Mapping[int, np.ndarray],
    *,
    scale: float | None = None,
    diameter: float | None = None,
    pixel_size: float | None = None,
    normalisation: str | None = None,
) -> int | None:
    """The channel of an image with several in which the model is clearly surest of the cells.

    Args:
        model: in evaluation mode.
        channels: (H, W, 3) each, grey, of one image, by number.
        scale, diameter, pixel_size, normalisation: those of `predict`.

    Returns:
        A number, the first where no channel shows a cell; None where it is about as sure of another one.
    """
    preprocessing = _preprocessing(model, normalisation, single_colours=False)
    height, width = next(iter(channels.values())).shape[:2]
    known = preprocessing.known_scale((height, width), scale, diameter, pixel_size)
    return choose_channel(model, channels, preprocessing, known)


def channel_of_page(model: InstanceNet, page: Page, **given: Any) -> tuple[int, str]:
    """The channel of a page to look for cells in: the one with a stain of nuclei, by name, or else the one that the
    model is surest of.

    Args:
        model: in evaluation mode.
        page: with several channels, of which none is chosen.
        given: see `clear_channel`.

    Returns:
        Its number, from 1, and what chose it.

    Raises:
        ImageChoiceError: somebody has to choose it.
    """
    names = page.channel_names
    if len(stained := channels_of_nuclei(names)) == 1:
        return stained[0], "by its name"
    channels = {number: page.of_channels((number,)).pixels for number in range(1, len(names) + 1)}
    number = clear_channel(model, channels, **given)
    if number is None:
        raise undecided(names)
    return number, "the model's choice"


def _preprocessing(model: InstanceNet, normalisation: str | None, single_colours: bool) -> Preprocessing:
    own = model.preprocessing
    return dataclasses.replace(
        own,
        normalisation=normalisation or own.normalisation,
        single_colours=single_colours and own.single_colours,
    )


def _seen(
    model: InstanceNet,
    image: np.ndarray,
    preprocessing: Preprocessing,
    scale: float | None,
    diameter: float | None,
    pixel_size: float | None,
    view: str | None,
    store: TileStore | None,
) -> tuple[NetworkImage, str]:
    """The image as the network sees it, and where its scale comes from; what the model chose is kept in the store."""
    sizes = {"scale": scale, "diameter": diameter, "pixel_size": pixel_size}
    if store is None or preprocessing.resize != "isotropic":
        return model.network_image(image, **sizes, preprocessing=preprocessing, view=view)

    def choose() -> list[float | str]:
        seen, source = model.network_image(image, **sizes, preprocessing=preprocessing, view=view)
        return [seen.scale[0], source, seen.view]

    value, source, view = store.get("view", choose)
    return model.network_image(image, scale=value, preprocessing=preprocessing, view=view)[0], source


def _tiled(
    model: InstanceNet,
    seen: NetworkImage,
    min_score: float,
    tile: int,
    overlap: int,
    wanted: Callable[[Window], bool] | None,
    store: TileStore | None,
) -> TiledDetection | None:
    """The steps of an image that is larger than a tile, not counting its border, where the method knows how; None for
    others."""
    if max(seen.shape[:2]) - 2 * seen.border * max(seen.scale) <= tile or not model.tiled:
        return None
    return TiledDetection(
        cast(KeypointGraphNet, model),
        seen,
        min_score=min_score,
        tile=tile,
        overlap=overlap,
        wanted=wanted,
        store=store,
    )


def _no_progress(done: int, steps: int) -> None:
    pass


def _part_of_progress(progress: Callable[[int, int], None], part: int, parts: int) -> Callable[[int, int], None]:
    """For one of several parts of equally many steps."""
    return lambda done, steps: progress(part * steps + done, parts * steps)

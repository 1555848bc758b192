"""Cells over an image, in colours that neighbours do not share."""

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from kg_detectron.cells.label_plane import LabelImage
from kg_detectron.cells.masks import MaskCrops
from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import write_png
from kg_detectron.io.scale_bars import without_scale_bars

if TYPE_CHECKING:
    from kg_detectron.export.result import Result

# Okabe and Ito's colours, which people with any kind of colour vision tell apart, with grey in the place of black.
PALETTE = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [213, 94, 0],
        [0, 158, 115],
        [240, 228, 66],
        [204, 121, 167],
        [0, 114, 178],
        [153, 153, 153],
    ],
    np.uint8,
)[:, ::-1]  # BGR
_GAP = 3  # pixels up to which cells do not share a colour, where the palette allows
_BAND = 512  # rows that are worked on at a time, which bounds the memory beyond the picture's own
_SAMPLE = 1_000_000  # values that tell the range of an image


def write(path: Path, result: "Result") -> None:
    """Write the outlines of the cells over the image as PNG."""
    with replacing(path) as unfinished:
        write_png(unfinished, draw_cells(result.image, result.label_image, colours=result.colours))


def draw_cells(
    image: np.ndarray,
    masks: MaskCrops | LabelImage,
    *,
    mode: Literal["contour", "fill"] = "contour",
    width: int = 1,
    opacity: float = 0.4,
    colours: np.ndarray | None = None,
) -> np.ndarray:
    """Draw cells over an image.

    Args:
        image: (H,W), (H,W,3) BGR or (H,W,C), of any type; shown as `stretched` gives it.
        masks: the cells, or their label image (H,W); where they overlap the first one is on top.
        mode: ``contour`` draws the outermost pixels of each cell, ``fill`` tints its inside as well.
        width: of the contour, pixels.
        opacity: of the tint, 0..1.
        colours: (R,3) uint8 RGB, of each cell; by default those that `colour_indices` chooses.
    Returns:
        (H,W,3) uint8 BGR.
    Raises:
        ValueError: for an unknown mode, or an image of another size than the masks'.
    """
    if mode not in ("contour", "fill"):
        raise ValueError(f"mode: expected contour or fill, got {mode!r}")
    labels = masks.label_image() if isinstance(masks, MaskCrops) else masks
    if image.shape[:2] != labels.shape:
        raise ValueError(f"image: expected the size of the masks, {labels.shape}, got {image.shape}")
    canvas = stretched(image)
    of_cells = PALETTE[colour_indices(labels)] if colours is None else colours[:, ::-1]
    colours = np.concatenate((np.zeros((1, 3), np.uint8), of_cells))
    for band, centre in _bands(labels, margin=width):
        rows = canvas[centre]
        inside = slice(centre.start - band.start, centre.stop - band.start)
        here = labels[band]
        edge = _edge(here, width)[inside]
        here = here[inside]
        if mode == "fill":
            tinted = cv2.addWeighted(rows, 1 - opacity, colours[here], opacity, 0)
            np.copyto(rows, tinted, where=(here > 0)[..., None])
        rows[edge] = colours[here[edge]]
    return canvas


def stretched(image: np.ndarray) -> np.ndarray:
    """An image (H,W) or (H,W,C) of any type as (H,W,3) uint8 to look at.

    The darkest and the brightest 0.2 % become black and white, not counting drawn scale bars; the channels of a
    colour image share the range, so that its colours stay. Of an image with another number of channels the mean of
    the channels is shown, each in its range.
    """
    channels = np.atleast_3d(image)
    is_colour = channels.shape[2] == 3
    step = max(1, round((image.size / _SAMPLE) ** 0.5))
    sample = without_scale_bars(channels)[::step, ::step].astype(np.float32)
    axes = None if is_colour else (0, 1)
    sample = np.where(np.isnan(sample).all(axis=axes, keepdims=True), 0, sample)  # black where there is no number
    low, high = np.nanpercentile(sample, (0.2, 99.8), axis=axes)
    span = np.maximum(high - low, np.finfo(np.float32).tiny)
    canvas = np.empty((*image.shape[:2], 3), np.uint8)
    for _, rows in _bands(image, margin=0):
        shown = ((channels[rows] - low) * (255 / span)).clip(0, 255)
        shown = shown if is_colour else shown.mean(axis=2, keepdims=True)
        canvas[rows] = np.nan_to_num(shown).round()
    return canvas


def colour_indices(labels: LabelImage) -> np.ndarray:
    """Colours for the cells 1..N of a label image (H,W): (N,) indices into `PALETTE`, the same for the same image.

    Cells that touch, corners included, never share a colour where each is one 4-connected piece: such cells can be
    drawn on paper with each line of touch crossed once at most, so that some cell has at most seven neighbours, and so
    on when it is taken away. Coloured in the opposite order, each finds one of eight colours free. Of the free ones it
    takes one that no cell within three pixels has, if there is such a one, and then the one least used so far.
    """
    ids = range(1, int(labels.max(initial=0)) + 1)
    touching, near = ({id: set[int]() for id in ids} for _ in range(2))
    for neighbours, gap in ((touching, 1), (near, _GAP)):
        for one, other in _neighbours(labels, gap).tolist():
            neighbours[one].add(other)
            neighbours[other].add(one)
    colours: dict[int, int] = {}
    used = [0] * len(PALETTE)
    used[-1] = len(ids)  # grey is not easily seen: the last resort
    for id in _smallest_last(touching):
        taken = {colours.get(other) for other in touching[id]}
        close = {colours.get(other) for other in near[id]}
        colour = min(range(len(PALETTE)), key=lambda c: (c in taken, c in close, used[c]))  # noqa: B023
        colours[id] = colour
        used[colour] += 1
    return np.array([colours[id] for id in ids], np.int64)


def _smallest_last(neighbours: Mapping[int, set[int]]) -> list[int]:
    """Ids, the last of which has fewest neighbours, the one before it fewest without that one, and so on."""
    left = {id: len(others) for id, others in neighbours.items()}
    queue = [(count, id) for id, count in left.items()]
    heapify(queue)
    order = []
    while queue:
        count, id = heappop(queue)
        if left.get(id) != count:
            continue  # taken, or queued again with fewer
        order.append(id)
        del left[id]
        for other in neighbours[id] & left.keys():
            left[other] -= 1
            heappush(queue, (left[other], other))
    return order[::-1]


def _neighbours(labels: LabelImage, gap: int) -> np.ndarray:
    """(E,2) pairs of ids that lie up to `gap` pixels apart along a row, a column or a diagonal, each once."""
    pairs = [np.zeros(0, np.int64)]
    base = int(labels.max(initial=0)) + 1
    for band, _ in _bands(labels, margin=gap):
        here = labels[band]
        for k in range(1, gap + 1):
            for a, b in (
                (here[:, :-k], here[:, k:]),
                (here[:-k], here[k:]),
                (here[:-k, :-k], here[k:, k:]),
                (here[:-k, k:], here[k:, :-k]),
            ):
                meet = (a != b) & (a > 0) & (b > 0)
                a, b = a[meet].astype(np.int64), b[meet].astype(np.int64)
                pairs.append(np.unique(np.minimum(a, b) * base + np.maximum(a, b)))
    return np.stack(np.divmod(np.unique(np.concatenate(pairs)), base), axis=1)


def _edge(labels: np.ndarray, width: int) -> np.ndarray:
    """(h,w) bool: pixels of cells with a pixel outside the cell up to `width` rows or columns away."""
    padded = np.pad(labels, width)
    height, columns = labels.shape
    edge = np.zeros(labels.shape, bool)
    for k in range(1, width + 1):
        for dy, dx in ((-k, 0), (k, 0), (0, -k), (0, k)):
            edge |= labels != padded[width + dy : width + dy + height, width + dx : width + dx + columns]
    return edge & (labels > 0)


def _bands(image: LabelImage, margin: int) -> Iterator[tuple[slice, slice]]:
    """Rows of an image piece by piece: with a margin on both sides where there is one, and without."""
    height = image.shape[0]
    for start in range(0, height, _BAND):
        stop = min(start + _BAND, height)
        yield slice(max(start - margin, 0), min(stop + margin, height)), slice(start, stop)

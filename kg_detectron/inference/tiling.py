"""Prediction for images larger than memory, tile by tile, with the result of the whole image.

Up to the peaks, and for each mask, the network looks at a bounded part of the image; between the two there are only
peaks, few enough to be treated for the whole image at once. So every map is computed on a tile with as much of its
surroundings as its values depend on, and only the peaks in the tile itself are kept; grouping, retrieval and NMS see
the peaks of all tiles and never learn where the seams were; then the masks are cut from the features around them, and
the cells of all tiles are ranked together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cells.masks import runs_of_areas
from kg_detectron.inference.tile_store import TileStore
from kg_detectron.modeling import KeypointGraphNet, Peaks
from kg_detectron.modeling.backbone import STRIDES
from kg_detectron.modeling.preprocessing import NetworkImage, as_tensor
from kg_detectron.modeling.segmentation_branch import Segmented
from kg_detectron.modeling.trunk import SCALES

# Parts of the image begin at multiples of it. The largest stride would do for the maps; twice that lets the edges of
# crops, which are rounded to a pixel of c4 and half to even, come out as in the whole image.
GRID = 2 * STRIDES[-1]

# Of the boxes that are segmented at once. Eight times as many took twice the memory in all with the paper's network.
CROP_PIXELS = 2**18

# Bytes that the maps c1..c4 of a whole image may take to be computed once, and kept until all masks are made. Tiles of
# a larger image compute them twice, with surroundings of some hundred pixels.
KEPT_BYTES = 2**29


class Window(NamedTuple):
    """A part of the image: input pixels, x2 and y2 exclusive."""

    x1: int
    y1: int
    x2: int
    y2: int

    def grown(self, margin: int, whole: "Window") -> "Window":
        """At least ``margin`` more pixels on every side, to the grid, but none outside ``whole``."""
        return Window(
            max((self.x1 - margin) // GRID * GRID, whole.x1),
            max((self.y1 - margin) // GRID * GRID, whole.y1),
            min(_on_grid(self.x2 + margin), whole.x2),
            min(_on_grid(self.y2 + margin), whole.y2),
        )

    def tiles(self, side: int) -> list["Window"]:
        """Windows of about equal size, sides at most ``side``, that cover this one, row by row."""
        (xs, dx), (ys, dy) = (
            (range(low, high, step), step)
            for low, high in ((self.x1, self.x2), (self.y1, self.y2))
            for step in (_on_grid(-(-(high - low) // -(-(high - low) // side))),)
        )
        return [Window(x, y, min(x + dx, self.x2), min(y + dy, self.y2)) for y in ys for x in xs]

    def cut(self, values: Tensor, place: "Window", stride: int) -> Tensor:
        """The part of a map [N,C,h,w] that lies in this window; ``place`` is the window of the map."""
        x1, x2 = ((x - place.x1) // stride for x in (self.x1, self.x2))
        y1, y2 = ((y - place.y1) // stride for y in (self.y1, self.y2))
        return values[:, :, y1:y2, x1:x2]


def _on_grid(length: int) -> int:
    """The next multiple of `GRID`."""
    return -(-length // GRID) * GRID


def _joined(parts: list[Peaks]) -> Peaks:
    """Peaks of parts of an image, in the order of those of the whole image."""
    peaks, scores, displacements = map(torch.cat, zip(*parts, strict=True))
    group, keypoint, y, x = peaks.T.cpu().numpy()
    order = torch.from_numpy(np.lexsort((x, y, keypoint, -scores.cpu().numpy(), group))).to(peaks.device)
    return Peaks(peaks[order], scores[order], displacements[order])


def _compact(crops: list[Tensor], threshold: float, scale: tuple[float, float]) -> list[Tensor]:
    """Crops that take less memory: bool at a scale of 1, else probabilities in 16 bits, which are resized later."""
    if scale == (1.0, 1.0):
        return [crop >= threshold for crop in crops]
    return [crop.half() for crop in crops]


def check_tile(tile: int, overlap: int) -> None:
    """Raise a ValueError for a tile or overlap that does not fit."""
    if tile <= 0 or tile % GRID:
        raise ValueError(f"tile: expected a positive multiple of {GRID} pixels, got {tile}")
    if overlap < 0:
        raise ValueError(f"overlap: expected 0 or more pixels, got {overlap}")


class TiledDetection:
    """The cells of an image of any size, in memory that the tile bounds, with the result of the whole image.

    The same boxes, scores and masks in the same order, on seams and in corners of tiles too, up to the rounding of
    floats, which differs with the size of a convolution's input: scores agree to about 1e-6, and what is closer to a
    tie or to a threshold than that may come out either way. Not local at all are group normalisation (norm "GN"), whose
    statistics become those of a tile, and votes that travel further than twice the disc radius, which training never
    asks for; with them the result is an approximation.

    The steps are peaks of every tile, boxes of all of them, masks of every tile. With a store each may run in a process
    of its own, as long as those before it are done. All of them belong under `torch.no_grad`.

    Args:
        model: in evaluation mode.
        image: as the network sees it; it is only read in slices of a tile and its surroundings.
        tile, overlap, min_score: see `kg_detectron.inference.predictor.predict`; cells of a lower score may remain.
        wanted: whether anything in a window is looked for; tiles in which nothing is are left out.
        store: where the parts of the result are kept, and taken from where they are there.

    Attributes:
        tiles: the windows, pixels of the network's input.

    Raises:
        ValueError: the backbone states no receptive radius.
    """

    def __init__(
        self,
        model: KeypointGraphNet,
        image: NetworkImage,
        *,
        tile: int,
        overlap: int,
        min_score: float = 0.0,
        wanted: Callable[[Window], bool] | None = None,
        store: TileStore | None = None,
    ) -> None:
        if model.backbone.receptive_radius is None:
            raise ValueError(
                f"tile: the backbone {model.settings.backbone.backbone} states no receptive radius, so its images are "
                f"not cut into tiles: expected {max(image.shape[:2])} or more for an image that the network sees at "
                f"{image.shape[1]} x {image.shape[0]} pixels, got {tile}"
            )
        self.model, self.image, self.tile, self.overlap, self.min_score = model, image, tile, overlap, min_score
        self._network = _LocalNetwork(model, image)
        self._kept = store.get if store is not None else _computed
        tiles = self._network.whole.tiles(tile)
        # A cell at the edge of a tile shows itself in the neighbour too.
        self._is_part = wanted is not None
        if wanted is not None:
            tiles = [core for core in tiles if wanted(core.grown(overlap, self._network.whole))]
        self.tiles = tiles
        # Parts of an image, and processes that share one, need not all features.
        self._network.keeps_features &= wanted is None and store is None

    def peaks(self, index: int) -> Peaks:
        """The peaks of a tile."""
        core = self.tiles[index]
        values = self._kept(f"peaks_{core.x1}_{core.y1}", lambda: tuple(self._network.peaks(core)))
        return Peaks(*(value.to(self.model.place.device) for value in values))

    def boxes(self, progress: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor, int]:
        """Boxes (R, 4) and scores (R,) of all tiles, and how many were too long; `progress` gets the tiles done."""
        found = self._kept("boxes", lambda: self._assembled(progress))
        boxes, scores = (found[name].to(self.model.place.device) for name in ("boxes", "scores"))
        return boxes, scores, found["too_long"]

    def _assembled(self, progress: Callable[[int], None] | None) -> dict[str, Any]:
        parts = []
        for index in range(len(self.tiles)):
            parts.append(self.peaks(index))
            if progress is not None:
                progress(len(parts))
        model = self.model
        strides = [model.keypoint_branch.head(scale).stride for scale in model.keypoint_branch.scales]
        peaks = _joined(parts or [self._network.no_peaks()])
        ((boxes, scores),) = model.decoder.assemble(peaks, [self.image.shape[:2]], strides)
        reaches = model.can_reach(self.min_score, scores)
        boxes, scores = boxes[reaches], scores[reaches]
        fits = _longest(boxes) <= self.tile + self.overlap
        return {"boxes": boxes[fits], "scores": scores[fits], "too_long": len(fits) - int(fits.sum())}

    def masks(self, index: int, boxes: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Of the boxes whose centre lies in a tile: their indices, and what `_masks` gives of each."""
        core = self.tiles[index]
        centre = ((boxes[:, :2] + boxes[:, 2:]) / 2).cpu()
        inside = ((centre >= centre.new_tensor(core[:2])) & (centre < centre.new_tensor(core[2:]))).all(1)
        cells = inside.nonzero()[:, 0]
        return cells, self._kept(f"masks_{core.x1}_{core.y1}", lambda: self._masks(boxes, cells))

    def _masks(self, boxes: Tensor, cells: Tensor) -> dict[str, Any]:
        """Crops, windows, blur, classes and confidence of some of the boxes."""
        crops: list[Any] = [None] * len(cells)
        windows, blur = torch.zeros(len(cells), 4, dtype=torch.long), boxes.new_zeros(len(cells))
        labels, confidence = torch.ones(len(cells), dtype=torch.long), boxes.new_ones(len(cells))
        large = _longest(boxes)[cells] > self.overlap
        rows = torch.arange(len(cells))
        for together in (rows[~large], *rows[large].split(1)):
            if len(together):
                (masks, labels_of_masks, confidence_of_masks), blur_of_masks = self._network.masks(
                    boxes[cells[together]]
                )
                blur[together] = blur_of_masks.to(blur)
                labels[together] = labels_of_masks.to(labels)
                confidence[together] = confidence_of_masks.to(confidence)
                windows[together] = masks.windows
                for row, crop in zip(together.tolist(), masks.crops, strict=True):
                    crops[row] = crop
        return {"crops": crops, "windows": windows, "blur": blur, "labels": labels, "confidence": confidence}

    def cells(self, progress: Callable[[int, int], None]) -> Cells:
        """All steps that are not done yet, and the cells.

        Args:
            progress: called after each step with the number of steps done and of all.

        Returns:
            The cells in the frame of the image, the masks as bool crops, or at a scale other than 1 as float16 crops.
        """
        model, count = self.model, len(self.tiles)
        boxes, scores, too_long = self.boxes(lambda done: progress(done, 2 * count))
        notes: tuple[str, ...] = ()
        if too_long:
            notes = (
                f"{too_long} boxes longer than tile + overlap = {self.tile + self.overlap} "
                "pixels of the network's input are left out",
            )
        crops: list[Any] = [None] * len(boxes)
        places = torch.zeros(len(boxes), 4, dtype=torch.long)
        blur, confidence = torch.zeros_like(scores), torch.ones_like(scores)
        labels = torch.ones_like(scores, dtype=torch.long)
        for index in range(count):
            cells, found = self.masks(index, boxes)
            blur[cells] = found["blur"].to(blur)
            labels[cells] = found["labels"].to(labels)
            confidence[cells] = found["confidence"].to(confidence)
            places[cells] = found["windows"]
            for cell, crop in zip(cells.tolist(), found["crops"], strict=True):
                crops[cell] = crop.to(model.place.device)
            progress(count + index + 1, 2 * count)
        if self._is_part:
            # Boxes may have their centre in a tile that was left out.
            there = torch.tensor([crop is not None for crop in crops], dtype=torch.bool)
            boxes, scores, blur, labels, confidence, places = (
                values[there] for values in (boxes, scores, blur, labels, confidence, places)
            )
            crops = [crop for crop in crops if crop is not None]
        masks = MaskCrops(crops, places, self.image.shape[:2], model.segmentation.settings.mask_threshold)
        return replace(model.finish(boxes, scores, Segmented(masks, labels, confidence), blur), notes=notes)


def _longest(boxes: Tensor) -> Tensor:
    """The longer side of each box (R,), on the CPU."""
    return (boxes[:, 2:] - boxes[:, :2]).amax(1).cpu()


def _computed(name: str, compute: Callable[[], Any]) -> Any:
    return compute()


class _LocalNetwork:
    """The network on parts of an image, with the values that it has on the whole image.

    Args:
        model: in evaluation mode.
        image: (H, W, 3) of 0..255, anything that is sliced like an array.
    """

    def __init__(self, model: KeypointGraphNet, image: NetworkImage) -> None:
        self.model = model
        self.image = image
        # Images are padded on the right and below, in parts as a whole.
        self.whole = Window(0, 0, *(-(-side // model.divisor) * model.divisor for side in image.shape[1::-1]))
        self._deep: list[Tensor] | None = None
        pixels = self.whole.x2 * self.whole.y2
        of_pixel = sum(c / s**2 for c, s in zip(model.backbone.channels[1:], STRIDES[1:], strict=True))
        self.keeps_features = pixels * of_pixel * model.place.element_size() <= KEPT_BYTES
        branch = model.keypoint_branch
        self.step_radii = branch.trunk.receptive_radius
        # Input pixels around a tile on which each scale's heads need to be computed.
        self.head_margins = {
            scale: (branch.head(scale).receptive_radius + model.decoder.receptive_radius) * STRIDES[scale - 1]
            for scale in branch.scales
        }

    def pixels(self, window: Window) -> Tensor:
        """(3,h,w) of the image, without padding."""
        return as_tensor(self.image[window.y1 : window.y2, window.x1 : window.x2], self.model.place)

    def peaks(self, core: Window) -> Peaks:
        """The peaks in a window, all scales, where they are in the image."""
        decoded, places = self._decoded(core, self.head_margins)
        maps, origins = [], []
        for scale in self.model.keypoint_branch.scales:
            heads = self.model.keypoint_branch.head(scale)
            window = core.grown(self.head_margins[scale], self.whole)
            maps.append(heads(window.cut(decoded[scale], places[scale], heads.stride)))
            origins.append([window.y1 // heads.stride, window.x1 // heads.stride])
        peaks, scores, displacements = self.model.decoder.find(maps)
        stride = peaks.new_tensor([m.stride for m in maps])[peaks[:, 0], None]
        peaks[:, 2:] += peaks.new_tensor(origins)[peaks[:, 0]]
        place = peaks[:, 2:] * stride
        first, last = place.new_tensor([core.y1, core.x1]), place.new_tensor([core.y2, core.x2])
        inside = ((place >= first) & (place < last)).all(1)
        return Peaks(peaks[inside], scores[inside], displacements[inside])

    def no_peaks(self) -> Peaks:
        """Peaks of nothing, with the shapes and types of those of a tile."""
        place = self.model.place
        return Peaks(place.new_zeros(0, 4, dtype=torch.long), place.new_zeros(0), place.new_zeros(0, 4, 2))

    def masks(self, boxes: Tensor) -> tuple[Segmented, Tensor]:
        """What is in boxes (R,4), input pixels, that lie close together; `CellRanking.blur` (R,) of each."""
        margin = math.ceil(self.model.segmentation.settings.mask_margin)
        around = Window(*boxes[:, :2].amin(0).long().tolist(), *boxes[:, 2:].amax(0).ceil().long().tolist())
        if self.model.segmentation.settings.cut_from == "features":
            # The edges of crops are rounded, to pixels of c4 at most.
            place = around.grown(margin + STRIDES[-1], self.whole)
            maps = self._features([place] * 5)
        else:
            decoded, places = self._decoded(around, {1: margin + 1})
            maps, place = [decoded[1]], places[1]
        # The branch reads pixels as rows of channels: one copy in that layout, not one for each of the parts below.
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        origin = torch.tensor([place.x1, place.y1] * 2)
        # Without the padding of the image.
        size = (min(place.y2, self.image.shape[0]) - place.y1, min(place.x2, self.image.shape[1]) - place.x1)
        threshold = self.model.segmentation.settings.mask_threshold
        # Some at a time: the branch itself takes as many together as suits training on large GPUs.
        counts = runs_of_areas((boxes[:, 2:] - boxes[:, :2]).prod(1), CROP_PIXELS)
        crops, windows, blurs, labels, confidence = [], [], [], [], []
        for part in (boxes - origin.to(boxes)).split(counts):
            ((masks, labels_of_part, confidence_of_part),) = self.model.segmentation.predict_cells(maps, [part], [size])
            crops += _compact(masks.crops, threshold, self.image.scale)
            windows.append(masks.windows + origin)
            blurs.append(self.model.ranking.blur(masks))
            labels.append(labels_of_part)
            confidence.append(confidence_of_part)
        masks = MaskCrops(crops, torch.cat(windows), self.image.shape[:2], threshold)
        return Segmented(masks, torch.cat(labels), torch.cat(confidence)), torch.cat(blurs)

    def _features(self, places: Sequence[Window | None]) -> list[Any]:
        """c0..c4, each on a window of its own, or None; that of c4 holds the others."""
        assert places[-1] is not None
        radii = self.model.backbone.receptive_radius
        if self.keeps_features:
            if self._deep is None:
                pixels = self.model.batch([self.pixels(self.whole)])
                self._deep = self.model.backbone.deep_features(pixels)
            kept = [
                None if place is None else place.cut(feature, self.whole, stride)
                for feature, place, stride in zip(self._deep, places[1:], STRIDES[1:], strict=True)
            ]
            if places[0] is None:
                return [None, *kept]
            inner = places[0].grown(radii[0], self.whole)
            c0 = self.model.backbone.image_features(self.model.batch([self.pixels(inner)]))
            return [places[0].cut(c0, inner, 1), *kept]
        outer = places[-1].grown(max(radii), self.whole)
        pixels = self.model.batch([self.pixels(outer)])
        # Copies, so that what lies around the windows does not stay in memory. c0, which is the largest, is not even
        # computed there.
        deep = [
            None if place is None else place.cut(feature, outer, stride).clone()
            for feature, place, stride in zip(
                self.model.backbone.deep_features(pixels), places[1:], STRIDES[1:], strict=True
            )
        ]
        if places[0] is None:
            return [None, *deep]
        inner = places[0].grown(radii[0], self.whole)
        c0 = self.model.backbone.image_features(inner.cut(pixels, outer, 1))
        return [places[0].cut(c0, inner, 1), *deep]

    def _decoded(self, core: Window, margins: dict[int, int]) -> tuple[dict[int, Tensor], dict[int, Window]]:
        """Decoder maps and their windows, by scale, right in ``core`` and a margin of each scale around it.

        A map needs no more surroundings than what is made of it, the shallow ones, which cost most, the least.

        Args:
            core: the window.
            margins: input pixels, for each scale that is of interest.
        """
        places, margin = {}, 0
        for scale, radius in self.step_radii.items():
            margin = max(margin, margins.get(scale, 0)) + radius * STRIDES[scale - 1]
            places[scale] = core.grown(margin, self.whole)
        features = self._features([*map(places.get, SCALES), places[max(places)]])
        decoded, deep, place = {}, features.pop(), places[max(places)]
        for scale in reversed(places):
            deep = places[scale].cut(deep, place, STRIDES[scale])
            place = places[scale]
            deep = decoded[scale] = self.model.keypoint_branch.trunk.up(scale, deep, features.pop())
        return decoded, places

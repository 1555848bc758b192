"""Prediction for images larger than memory, tile by tile, with the result of the whole image.

Up to the peaks, and for each mask, the network looks at a bounded part of the image; between the two there are only
peaks, few enough to be treated for the whole image at once. So every map is computed on a tile with as much of its
surroundings as its values depend on, and only the peaks in the tile itself are kept; grouping, retrieval and NMS see
the peaks of all tiles and never learn where the seams were; then the masks are cut from the features around them.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..masks import MaskCrops
from ..modeling import KeypointGraphNet
from ..modeling.backbone import SIZE_DIVISIBILITY, STRIDES
from ..modeling.keypoint_branch import UpCombine

# Parts of the image begin at multiples of it. The largest stride would do for the maps; twice that lets the edges of
# crops, which are rounded to a pixel of c4 and half to even, come out as in the whole image.
GRID = 2 * SIZE_DIVISIBILITY


class Window(NamedTuple):
    """A part of the image on the grid: input pixels, x2 and y2 exclusive."""

    x1: int
    y1: int
    x2: int
    y2: int

    def grown(self, margin: int, whole: "Window") -> "Window":
        """At least ``margin`` more pixels on every side, but none outside ``whole``."""
        margin = _on_grid(margin)
        return Window(
            max(self.x1 - margin, whole.x1),
            max(self.y1 - margin, whole.y1),
            min(self.x2 + margin, whole.x2),
            min(self.y2 + margin, whole.y2),
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


@torch.no_grad()
def predict_tiled(
    model: KeypointGraphNet,
    image: np.ndarray,
    *,
    tile: int = 1024,
    overlap: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor | MaskCrops]:
    """Find the cells of an image of any size, at its own pixels, in memory that the tile bounds.

    The result is that of the whole image, on seams and in corners of tiles too: the same boxes, scores and masks in the
    same order. Equal means up to the rounding of floats, which may differ with the size of a convolution's input: scores
    agree to about 1e-5, and two peaks, boxes or mask pixels of equal score to that accuracy may change places. Two
    things are not local, and make the results approximate: group normalisation (norm "GN"), whose statistics become
    those of a tile; and votes that travel further than twice the disc radius, which training never asks for.

    Args:
        model: in evaluation mode.
        image: (H,W,3) BGR, numbers in 0..255, as `io.read_image` gives it; an array or anything that is sliced like
            one, such as `numpy.memmap`. Only slices of at most a tile and its surroundings are read.
        tile: side of a tile, pixels, a multiple of 32. Time per pixel falls and memory grows with it: around a tile of
            1024 the paper's network sees 384 more pixels on every side.
        overlap: cells with no side longer than it, pixels, are segmented together with their tile; one that is larger
            in a window of its own. What no window holds, a box with a side longer than ``tile + overlap``, is
            left out, with a warning.
        progress: called after each step with the number of steps done and their total.

    Returns:
        As `predict`, masks as bool crops.

    Raises:
        ValueError: for an image of another shape, a tile or overlap that does not fit, or a model in training mode.
    """
    if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected shape (H,W,3), got {tuple(image.shape)}")
    if tile < GRID or tile % GRID:
        raise ValueError(f"tile: expected a positive multiple of {GRID} pixels, got {tile}")
    if overlap < 0:
        raise ValueError(f"overlap: expected 0 or more pixels, got {overlap}")
    if model.training:
        raise ValueError("model: expected evaluation mode, call model.eval() first")

    network = _LocalNetwork(model, image)
    tiles = network.whole.tiles(tile)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, 2 * len(tiles))

    found = []
    for core in tiles:
        found.append(network.peaks(core))
        report(len(found))
    ((boxes, scores),) = assemble(model.decoder, found, [image.shape[:2]])

    longest = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    fits = longest <= tile + overlap
    if not fits.all():
        left_out = len(fits) - int(fits.sum())
        warnings.warn(
            f"{left_out} boxes longer than tile + overlap = {tile + overlap} pixels are left out", stacklevel=2
        )
        boxes, scores, longest = boxes[fits], scores[fits], longest[fits]

    crops: list[Tensor | None] = [None] * len(boxes)
    places = torch.zeros(len(boxes), 4, dtype=torch.long)
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2).cpu()
    for done, core in enumerate(tiles, len(tiles) + 1):
        own = ((centre >= centre.new_tensor(core[:2])) & (centre < centre.new_tensor(core[2:]))).all(1).nonzero()[:, 0]
        large = longest[own] > overlap
        for together in (own[~large], *own[large].split(1)):
            if len(together):
                masks = network.masks(boxes[together])
                places[together] = masks.windows
                for i, crop in zip(together.tolist(), masks.crops, strict=True):
                    crops[i] = crop >= model.mask_threshold
        report(done)
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": torch.ones_like(scores, dtype=torch.long),
        "masks": MaskCrops(crops, places, image.shape[:2], model.mask_threshold),
    }


class _LocalNetwork:
    """The network on parts of an image, with the values that it has on the whole image.

    Args:
        model: in evaluation mode.
        image: (H,W,3), anything that is sliced like an array.
    """

    def __init__(self, model: KeypointGraphNet, image: np.ndarray) -> None:
        self.model = model
        self.image = image
        # Images are padded on the right and below, in parts as a whole.
        self.whole = Window(0, 0, *(-(-side // SIZE_DIVISIBILITY) * SIZE_DIVISIBILITY for side in image.shape[1::-1]))
        branch = model.keypoint_branch
        # Input pixels around a tile on which each scale's heads need to be computed.
        self.head_margins = {
            int(name[1]): (heads.reach + model.decoder.reach) * heads.stride for name, heads in branch.heads.items()
        }

    def peaks(self, core: Window) -> list[tuple]:
        """The peaks of each scale in a window."""
        found = []
        decoded = self._decoded(core, self.head_margins)
        for name, heads in self.model.keypoint_branch.heads.items():
            scale = int(name[1])
            values, place = decoded[scale]
            own = core.grown(self.head_margins[scale], self.whole)
            maps = heads(own.cut(values, place, heads.stride))
            found.append(find(self.model.decoder, maps, core, own))
        return found

    def masks(self, boxes: Tensor) -> MaskCrops:
        """The masks of boxes (R,4), input pixels, that lie close together."""
        x1, y1, x2, y2 = (*boxes[:, :2].amin(0).floor().tolist(), *boxes[:, 2:].amax(0).ceil().tolist())
        around = Window(
            *(int(v) for v in (x1 // GRID * GRID, y1 // GRID * GRID, -(-x2 // GRID) * GRID, -(-y2 // GRID) * GRID))
        )
        around = around.grown(0, self.whole)
        if self.model.segmentation == "branch":
            around = around.grown(STRIDES[-1], self.whole)  # edges of crops are rounded to pixels of c4
            place = around.grown(max(self.model.backbone.reach), self.whole)
            maps = [around.cut(f, place, s) for f, s in zip(self._features(place), STRIDES, strict=True)]
        else:
            values, place = self._decoded(around, {1: 1})[1]
            maps = [around.cut(values, place, 1)]
        origin = torch.tensor(around[:2] * 2)
        size = (around.y2 - around.y1, around.x2 - around.x1)
        (masks,) = self.model.mask_head.predict_masks(
            maps, [boxes - origin.to(boxes)], [size], self.model.mask_threshold
        )
        masks.windows += origin
        return masks

    def _features(self, window: Window) -> list[Tensor]:
        """c0..c4 on a window, as if it were an image."""
        x1, y1, x2, y2 = window
        pixels = np.asarray(self.image[y1:y2, x1:x2], dtype=np.float32)
        pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(self.model.pixel_mean.device)
        return self.model.backbone(self.model.normalised_batch([pixels]))

    def _decoded(self, core: Window, margins: dict[int, int]) -> dict[int, tuple[Tensor, Window]]:
        """Decoder maps of scales 1..4 and their windows, right in ``core`` and a margin of each scale around it.

        The maps of a scale need no more surroundings than what is made of them: that halves the work of the paper's
        network and saves most of the memory.

        Args:
            core: the window.
            margins: input pixels, for each scale that is of interest.
        """
        places, margin = {}, 0
        for scale in (1, 2, 3, 4):
            margin = max(margin, margins.get(scale, 0)) + UpCombine.REACH * STRIDES[scale - 1]
            places[scale] = core.grown(margin, self.whole)
        place = core.grown(margin + max(self.model.backbone.reach), self.whole)
        # Copies, so that what lies around them is given back.
        *shallow, deep = (
            places[min(scale, 4)].cut(f, place, stride).clone()
            for scale, (f, stride) in enumerate(zip(self._features(place), STRIDES, strict=True), 1)
        )
        decoded, place = {}, places[4]
        for scale in (4, 3, 2, 1):
            deep = places[scale].cut(deep, place, STRIDES[scale])
            deep, place = self.model.keypoint_branch.up(scale, deep, shallow[scale - 1]), places[scale]
            decoded[scale] = deep, place
        return decoded


from torchvision.ops import nms

from ..layers import find_peaks, graphs_to_boxes, group_keypoints, hough_vote, smooth_votes


def find(d, maps, core, own):
    votes = hough_vote(maps.heatmap.float().sigmoid(), maps.single_offset.float(), d.radius)
    peaks, scores = find_peaks(smooth_votes(votes, d.smooth_sigma), d.peak_threshold)
    disp = maps.group_offset[0][:, peaks[:, 2], peaks[:, 3]].T
    peaks = peaks + torch.tensor([0, 0, own.y1, own.x1]) // maps.stride
    ok = (
        (peaks[:, 2] * maps.stride >= core.y1)
        & (peaks[:, 2] * maps.stride < core.y2)
        & (peaks[:, 3] * maps.stride >= core.x1)
        & (peaks[:, 3] * maps.stride < core.x2)
    )
    return peaks[ok], scores[ok], disp[ok], maps.stride


def assemble(d, found, sizes):
    bs, ss = [], []
    for parts in zip(*found):
        p, s, o = (torch.cat([q[i] for q in parts]) for i in range(3))
        st = parts[0][3]
        order = np.lexsort((p[:, 3], p[:, 2], p[:, 1], -s))
        p, s, o = p[order], s[order], o[order]
        h, w = (-(-x // 16) * 16 // st for x in sizes[0])
        dense = torch.zeros(1, 40, h, w)
        dense[0][:, p[:, 2], p[:, 3]] = o.T
        graphs, image = group_keypoints(p, s, dense, d.radius + 1, 2 * d.radius, hops=d.hops)
        corners, scores, graph = graphs_to_boxes(graphs, d.corner_and_centre)
        b = (corners + 0.5) * st - 0.5
        b[:, 2:] += 1
        bs.append(b)
        ss.append(scores)
    boxes, scores = torch.cat(bs), torch.cat(ss)
    h, w = sizes[0]
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([w, h, w, h]))
    own = (boxes[:, 2:] > boxes[:, :2]).all(1)
    keep = nms(boxes[own], scores[own], d.nms_threshold)
    return [(boxes[own][keep], scores[own][keep])]

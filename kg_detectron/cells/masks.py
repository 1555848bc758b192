"""Masks of many cells, kept as crops with their places."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from kg_detectron.cells.run_lengths import RLE, decode_runs, encode_runs, foreground

_PIXELS_TOGETHER = 2**22  # of crops, whose extents are found at once: about a hundred bytes each


class MaskCrops:
    """The masks of the cells of one image: mask probabilities inside each cell's box, nothing outside it.

    Iterating gives one dense mask at a time, which is all that Detectron2's COCO export asks for; `rle` encodes all of
    them without making a dense one.

    Args:
        crops: R tensors (h,w), probabilities, or bool.
        windows: (R,4) int64 xyxy, the place of each crop in the image, pixels.
        size: (H, W) of the image.
        threshold: probability from which a pixel belongs to the cell.

    Raises:
        ValueError: where a crop and its window differ in size, or a window leaves the image.
    """

    def __init__(self, crops: list[Tensor], windows: Tensor, size: tuple[int, int], threshold: float = 0.5) -> None:
        if windows.shape != (len(crops), 4):
            raise ValueError(f"windows: expected shape {(len(crops), 4)}, got {tuple(windows.shape)}")
        for i, (crop, (x1, y1, x2, y2)) in enumerate(zip(crops, windows.tolist(), strict=True)):
            if tuple(crop.shape) != (y2 - y1, x2 - x1):
                raise ValueError(f"crops[{i}]: expected shape {(y2 - y1, x2 - x1)}, got {tuple(crop.shape)}")
            if x1 < 0 or y1 < 0 or x2 > size[1] or y2 > size[0]:
                raise ValueError(f"windows[{i}]: {(x1, y1, x2, y2)} leaves the image of {size[0]} x {size[1]} pixels")
        self.crops = list(crops)
        self.windows = windows
        self.size = (int(size[0]), int(size[1]))
        self.threshold = threshold

    @classmethod
    def from_rle(cls, rles: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None) -> "MaskCrops":
        """The masks of COCO run-length encodings, each cropped to its pixels; an empty mask has a window without area.

        Args:
            rles: ``{"size": [H, W], "counts": str, bytes or list of lengths}``, all of one size.
            size: (H, W) of the image; needed where `rles` is empty.
        Raises:
            ValueError: where there is no size, one differs, or the runs do not fill the image. It names the mask.
        """
        if size is None and not rles:
            raise ValueError("size: expected (H, W), for there is no mask to take it from")
        height, width = size = tuple(size or rles[0]["size"])
        crops, windows = [], np.zeros((len(rles), 4), np.int64)
        for i, rle in enumerate(rles):
            counts = rle["counts"]
            runs = np.asarray(counts, np.int64) if isinstance(counts, list) else decode_runs(counts)
            if tuple(rle["size"]) != size or runs.min(initial=0) < 0 or runs.sum() != height * width:
                raise ValueError(f"rles[{i}]: expected runs that fill an image of {height} x {width} pixels")
            pixels = foreground(runs)
            x, y = np.divmod(pixels, height)
            x1, y1, x2, y2 = (x[0], y.min(), x[-1] + 1, y.max() + 1) if len(pixels) else (0, 0, 0, 0)
            crop = np.zeros((y2 - y1, x2 - x1), bool)
            crop[y - y1, x - x1] = True
            crops.append(torch.from_numpy(crop))
            windows[i] = x1, y1, x2, y2
        return cls(crops, torch.from_numpy(windows), size)

    @classmethod
    def from_label_image(cls, labels: np.ndarray) -> "MaskCrops":
        """The masks of a label image, in the order of their ids, each cropped to its pixels.

        Args:
            labels: (H,W) integers, 0 background; a memory-mapped array is read, never copied whole. Ids may have gaps.
        Raises:
            ValueError: for another shape or type, and for negative ids.
        """
        if labels.ndim != 2 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels: expected integers (H,W), got {labels.dtype} {labels.shape}")
        if labels.dtype.kind == "i" and labels.min(initial=0) < 0:
            raise ValueError(f"labels: expected ids from 0, got {labels.min()}")
        if labels.max(initial=0) > labels.size:  # find_objects makes a list of as many places as the highest id
            ids, numbers = np.unique(labels, return_inverse=True)
            labels = numbers.reshape(labels.shape) + (ids[0] != 0)
        crops, windows = [], []
        for i, place in enumerate(scipy.ndimage.find_objects(labels), start=1):
            if place is not None:
                rows, columns = place
                crops.append(torch.from_numpy(labels[place] == i))
                windows.append([columns.start, rows.start, columns.stop, rows.stop])
        return cls(crops, torch.tensor(windows, dtype=torch.int64).reshape(-1, 4), labels.shape)

    def __len__(self) -> int:
        return len(self.crops)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, item: int) -> Tensor: ...

    @overload
    def __getitem__(self, item: "slice | Tensor | list[int]") -> "MaskCrops": ...

    def __getitem__(self, item: "int | slice | Tensor | list[int]") -> "Tensor | MaskCrops":
        """One dense mask (H,W), bool, for an int; a container of several for a slice, index list or bool tensor."""
        if isinstance(item, int):
            dense = self.crops[item].new_zeros(self.size, dtype=torch.bool)
            x1, y1, x2, y2 = self.windows[item].tolist()
            dense[y1:y2, x1:x2] = self._binary(item)
            return dense
        chosen = torch.arange(len(self))[item if isinstance(item, slice) else torch.as_tensor(item).cpu()].tolist()
        return MaskCrops([self.crops[i] for i in chosen], self.windows[chosen], self.size, self.threshold)

    def _binary(self, i: int) -> Tensor:
        crop = self.crops[i]
        return crop if crop.dtype == torch.bool else crop >= self.threshold

    def extents(self) -> Tensor:
        """The box of the pixels of each mask, (R,4) int64 xyxy; of a mask without any pixel, its window."""
        areas = (self.windows[:, 2:] - self.windows[:, :2]).prod(1)
        parts = torch.arange(len(self)).split(runs_of_areas(areas, _PIXELS_TOGETHER))
        return torch.cat([self.windows[:0], *map(self._extents, parts)])

    def _extents(self, masks: Tensor) -> Tensor:
        """Those of some masks (n,), one at least, together."""
        # The pixels of all of them, numbered through their crops.
        inside = torch.cat([self._binary(i).flatten() for i in masks.tolist()]).nonzero()[:, 0]
        windows = self.windows[masks]
        sizes = (windows[:, 2:] - windows[:, :2]).to(inside.device)
        ends = sizes.prod(1).cumsum(0)
        crop = torch.searchsorted(ends, inside, right=True)
        at, width = inside - (ends - sizes.prod(1))[crop], sizes[crop, 0]
        at, crop = torch.stack((at % width, at // width), dim=1), crop[:, None].expand(-1, 2)
        low = torch.zeros_like(sizes).scatter_reduce(0, crop, at, "amin", include_self=False)
        high = sizes.scatter_reduce(0, crop, at + 1, "amax", include_self=False)
        return windows[:, :2].repeat(1, 2) + torch.cat((low, high), dim=1).cpu()

    def pixels(self, order: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, tuple[int, int, int, int]]]:
        """Each cell as a bool array (h,w) and its window x1, y1, x2, y2; in another order if one is given."""
        chosen = range(len(self)) if order is None else list(order)
        windows = self.windows if order is None else self.windows[chosen]  # of a few, not of all for each few
        for i, window in zip(chosen, windows.tolist(), strict=True):
            yield self._binary(i).numpy(force=True), tuple(window)

    def to(self, *args: Any, **kwargs: Any) -> "MaskCrops":
        """The crops moved as by `Tensor.to`; the places stay on the CPU."""
        return MaskCrops([c.to(*args, **kwargs) for c in self.crops], self.windows, self.size, self.threshold)

    def resized(self, size: tuple[int, int]) -> "MaskCrops":
        """The same cells in an image of another size (H, W), resampled bilinearly, pixel centre to pixel centre."""
        if tuple(size) == self.size:
            return self
        scale = torch.tensor([size[1] / self.size[1], size[0] / self.size[0]] * 2, dtype=torch.float64)
        # A pixel belongs to the window where its centre lies inside; every cell keeps at least one pixel.
        windows = (self.windows * scale - 0.5).ceil().long()
        limit = torch.tensor([size[1], size[0]])
        low = torch.minimum(windows[:, :2], limit - 1)
        windows = torch.cat((low, torch.maximum(windows[:, 2:], low + 1)), dim=1)
        crops = []
        for crop, before, after in zip(self.crops, self.windows.tolist(), windows.tolist(), strict=True):
            grid = []
            for axis in (0, 1):
                centre = torch.arange(after[axis], after[axis + 2], dtype=torch.float64) + 0.5
                place = (centre / scale[axis] - before[axis]) / (before[axis + 2] - before[axis])
                grid.append((2 * place - 1).to(crop.device, torch.float32))
            y, x = torch.meshgrid(grid[1], grid[0], indexing="ij")
            sampled = grid_sample(
                crop[None, None].float(), torch.stack((x, y), dim=2)[None], padding_mode="border", align_corners=False
            )[0, 0]
            crops.append(sampled >= 0.5 if crop.dtype == torch.bool else sampled)
        return MaskCrops(crops, windows, size, self.threshold)

    def cropped(self, size: tuple[int, int], first: int = 0) -> "MaskCrops":
        """The part of each mask within an image of size (H, W), whose first pixel is y, x = ``first`` of this one."""
        limit = torch.tensor([size[1], size[0]] * 2)
        windows = torch.minimum((self.windows - first).clamp(min=0), limit)
        crops = []
        for crop, (x1, y1, _, _), (left, top, right, bottom) in zip(
            self.crops, self.windows.tolist(), windows.tolist(), strict=True
        ):
            x, y = max(0, left + first - x1), max(0, top + first - y1)
            crops.append(crop[y : y + bottom - top, x : x + right - left])
        return MaskCrops(crops, windows, size, self.threshold)

    def rle(self) -> list[RLE]:
        """COCO run-length encodings of all masks, compressed."""
        height, width = self.size
        encoded = []
        for crop, (x1, y1, _, _) in self.pixels():
            place = np.flatnonzero(crop.T)  # COCO counts down the columns
            pixel = place + place // max(len(crop), 1) * (height - len(crop)) + (x1 * height + y1)
            new = np.diff(pixel, prepend=-2) > 1
            edges = np.stack((pixel[new], pixel[np.roll(new, -1)] + 1), axis=1).ravel()
            counts = np.diff(edges, prepend=0, append=height * width)
            if counts[-1] == 0:  # the mask reaches the last pixel
                counts = counts[:-1]
            encoded.append(encode_runs(counts, self.size))
        return encoded

    def label_image(self, out: np.ndarray | None = None) -> np.ndarray:
        """(H,W) of ids: 1..N in the order of the container, 0 background. Where masks overlap, the first one wins.

        Args:
            out: where to write, an (H,W) integer array (a `numpy.memmap` for an image larger than memory); by default a
                new one, uint16 up to 65,535 cells and uint32 above.
        Returns:
            `out`, or the new array.
        Raises:
            ValueError: for an `out` of another shape, or of a type that cannot hold N.
        """
        if out is None:
            out = np.zeros(self.size, label_dtype(len(self)))
        elif out.shape != self.size or out.dtype.kind not in "iu" or np.iinfo(out.dtype).max < len(self):
            raise ValueError(
                f"out: expected integers {self.size} that hold {len(self)} ids, got {out.dtype} {out.shape}"
            )
        else:
            out[...] = 0
        for i, (x1, y1, x2, y2) in reversed(list(enumerate(self.windows.tolist()))):
            out[y1:y2, x1:x2][self._binary(i).numpy(force=True)] = i + 1
        return out


def runs_of_areas(areas: Tensor, pixels: int) -> list[int]:
    """Lengths of the runs, in their order, in which areas (N,) come to about so many pixels together."""
    run = torch.div(areas.cumsum(0), pixels, rounding_mode="floor")
    return run.unique_consecutive(return_counts=True)[1].tolist()


def label_dtype(count: int) -> type[np.unsignedinteger]:
    """The type of a label image of so many cells: uint16 up to 65,535, uint32 above."""
    return np.uint16 if count <= np.iinfo(np.uint16).max else np.uint32

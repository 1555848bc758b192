"""Masks of many cells, kept as crops with their places."""

from collections.abc import Iterator

import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import grid_sample


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

    def __len__(self) -> int:
        return len(self.crops)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

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

    def to(self, *args: object, **kwargs: object) -> "MaskCrops":
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

    def rle(self) -> list[dict]:
        """COCO run-length encodings of all masks, compressed: ``{"size": [H, W], "counts": bytes}``."""
        height, width = self.size
        encoded = []
        for i, (x1, y1, _, _) in enumerate(self.windows.tolist()):
            column, row = self._binary(i).T.nonzero().cpu().unbind(1)
            pixel = (column + x1) * height + row + y1  # COCO counts down the columns
            new = torch.ones(len(pixel), dtype=torch.bool)
            new[1:] = pixel[1:] != pixel[:-1] + 1
            start, end = pixel[new], pixel[new.roll(-1)] + 1
            edges = torch.stack((start, end), dim=1).flatten()
            counts = torch.diff(edges, prepend=edges.new_zeros(1), append=edges.new_tensor([height * width])).tolist()
            if counts[-1] == 0:  # the mask reaches the last pixel
                counts.pop()
            encoded.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
        return encoded

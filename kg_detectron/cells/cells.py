"""The cells that were found in one image."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kg_detectron.cells.masks import MaskCrops

_TENSORS = ("boxes", "scores", "labels", "masks")


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (R, 4), xyxy, cut at the edges of an image of a size (H, W)."""
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


@dataclass(frozen=True)
class Cells:
    """The cells of one image, by falling score.

    As in torchvision's detection models ``cells["boxes"]`` is ``cells.boxes``, and so on.

    Attributes:
        boxes: (R, 4) xyxy continuous (x2 = last pixel + 1), pixels of the image.
        scores: (R,), falling.
        labels: (R,) int64, the class of each; 1 where there is one class.
        masks: R masks.
        scale: pixels of the network's input for one of the image, (y, x).
        scale_source: where the scale comes from: "given", "diameter", "pixel size", "estimated", "training size", ...
        view: what the network was shown of the image, see `kg_detectron.modeling.preprocessing.Preprocessing.views`.
        notes: sentences about what a user should know, such as cells that were left out.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: MaskCrops
    scale: tuple[float, float] = (1.0, 1.0)
    scale_source: str = ""
    view: str = ""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.masks.size

    def __len__(self) -> int:
        return len(self.boxes)

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that hold one value for each cell."""
        return _TENSORS

    def __iter__(self) -> Iterator[str]:
        return iter(_TENSORS)

    def __getitem__(self, item: Any) -> Any:
        """The field of a name; or some cells, for a slice, an index list, or a tensor of indices or bools."""
        if isinstance(item, str):
            if item not in _TENSORS:
                raise KeyError(item)
            return getattr(self, item)
        if isinstance(item, list):
            item = torch.tensor(item, dtype=torch.long)
        return dataclasses.replace(self, **{name: getattr(self, name)[item] for name in _TENSORS})

    def above(self, score: float) -> "Cells":
        """The cells of this score or a higher one."""
        return self[self.scores >= score]

    def in_frame(self, size: tuple[int, int], scale: tuple[float, float], border: int = 0) -> "Cells":
        """The same cells in the frame of the image that the network saw resized; those outside it are left out.

        Args:
            size: (H, W) of the image.
            scale: (y, x), pixels of this frame for one of the image.
            border: pixels of the image that this frame begins before it; cells of which only these show a pixel are
                left out too.
        """
        y, x = scale
        height, width = (side + 2 * border for side in size)
        # Where the image ends inside a pixel of the network's input, its frame goes on a little further.
        whole = max(round(self.size[0] / y), height), max(round(self.size[1] / x), width)
        boxes = clip_boxes(self.boxes / self.boxes.new_tensor([x, y, x, y]) - border, size)
        cells = dataclasses.replace(self, boxes=boxes, masks=self.masks.resized(whole), scale=scale)
        if whole == tuple(size):
            return cells
        cells = cells[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        masks = cells.masks.cropped(size, border)
        cut = (masks.windows + border != cells.masks.windows).any(1).nonzero()[:, 0]
        there = torch.ones(len(cells), dtype=torch.bool)
        there[cut] = torch.tensor([bool(crop.any()) for crop, _ in masks.pixels(cut.tolist())], dtype=torch.bool)
        return dataclasses.replace(cells, masks=masks)[there.to(boxes.device)]

"""What a writer gets: the cells of one image, and all that is known of the image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cells.class_colours import class_colours
from kg_detectron.cells.label_plane import LabelImage, LabelPlane, label_image_of
from kg_detectron.export.measurements import measure
from kg_detectron.export.outlines import outlines

# What the writers of stacks take of a plane that is computed from its pixels, by kind.
_OF_PIXELS = {"csv": ("measurements",), "geojson": ("measurements", "outlines"), "roi": ("outlines", "colours")}


@dataclass(frozen=True)
class Result:
    """The cells of one image. H, W: its height and width in pixels; R cells, C channels.

    Attributes:
        cells: of the image, in most cases separated: no pixel in two cells, each cell one piece.
        image: (H, W), (H, W, 3) BGR or (H, W, C), at its own depth. It is what the overlay shows.
        source: name of the image file.
        pixel_size: micrometres; None where it is unknown.
        channels: (H, W, C), all channels of the file, which are measured; `image` where None.
        channel_names: of `channels`.
        page: number of the image in its file, from 1; 0 where the file is no stack.
        position: of the image in its stack, by the letter of the axis, from 0, such as ``{"T": 4, "Z": 0}``.
        category_names: of the labels 1, 2, ...
        category_colours: (red, green, blue) of each of them, 0..255; by default those of `class_colours`.
        scratch: a folder for temporary files of very large images.
    """

    cells: Cells
    image: np.ndarray
    source: str
    pixel_size: float | None = None
    channels: np.ndarray | None = None
    channel_names: tuple[str, ...] = ()
    page: int = 0
    position: Mapping[str, int] = field(default_factory=dict)
    category_names: tuple[str, ...] = ("cell",)
    category_colours: tuple[tuple[int, int, int], ...] = ()
    scratch: Path | None = None

    def __post_init__(self) -> None:
        size = self.masks.size
        for name, image in (("image", self.image), ("channels", self.channels)):
            if image is not None and (image.ndim not in (2, 3) or image.shape[:2] != size):
                raise ValueError(
                    f"{name}: expected (H,W) or (H,W,C) of {size}, the size of the masks, got {image.shape}"
                )
        if self.pixel_size is not None and not 0 < self.pixel_size < float("inf"):
            raise ValueError(f"pixel_size: expected micrometres above 0, got {self.pixel_size}")

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def file_name(self) -> str:
        """The image's file name without its folder."""
        return PurePath(self.source).name

    @cached_property
    def masks(self) -> MaskCrops:
        """The masks on the CPU."""
        return self.cells.masks.to("cpu")

    @cached_property
    def boxes(self) -> np.ndarray:
        """(R, 4) float64 xyxy."""
        return self.cells.boxes.cpu().double().numpy()

    @cached_property
    def scores(self) -> list[float]:
        """R numbers."""
        return self.cells.scores.tolist()

    @cached_property
    def labels(self) -> list[int]:
        """R categories, from 1."""
        return self.cells.labels.tolist()

    def category(self, label: int) -> str:
        """The name of a category."""
        if label <= len(self.category_names):
            return self.category_names[label - 1]
        return f"{self.category_names[0]} {label}"

    def category_colour(self, label: int) -> tuple[int, int, int]:
        """The colour of a category, (red, green, blue)."""
        colours = self.category_colours or class_colours(max(len(self.category_names), *self.labels, label))
        return colours[(label - 1) % len(colours)]

    @cached_property
    def label_image(self) -> LabelImage:
        """(H, W) ids 1..R, 0 background; of a large image drawn by window, see `LabelPlane`.

        Raises:
            ValueError: cells overlap.
        """
        labels = label_image_of(self.masks)
        blocks = labels.blocks() if isinstance(labels, LabelPlane) else [labels]
        count = sum(np.count_nonzero(block) for block in blocks)
        if count != sum(np.count_nonzero(crop) for crop, _ in self.masks.pixels()):
            raise ValueError("cells: some overlap; expected the result of separate_cells")
        return labels

    @cached_property
    def outlines(self) -> list[list[np.ndarray]]:
        """Of each cell its rings (K, 2), the outer one first, see `kg_detectron.export.outlines`."""
        return outlines(self.masks)

    @cached_property
    def colours(self) -> np.ndarray:
        """(R, 3) uint8 RGB, those of the overlay: of several categories their own; otherwise neighbours differ."""
        if len(self.category_names) > 1:
            of_cells = [self.category_colour(label) for label in self.labels]
            return np.array(of_cells, np.uint8).reshape(-1, 3)
        from kg_detectron.export.overlay import PALETTE, colour_indices

        return PALETTE[colour_indices(self.label_image), ::-1]

    @cached_property
    def measurements(self) -> dict[str, np.ndarray]:
        """Columns (R,) by name, see `measure`; of a plane of a stack its ``page``, ``t`` and ``z``, from 1, as well."""
        columns = measure(
            self.masks,
            self.boxes,
            np.array(self.scores),
            self.image if self.channels is None else self.channels,
            self.pixel_size,
            self.channel_names if self.channels is not None else (),
        )
        if self.page:
            columns["page"] = np.full(len(self), self.page)
            columns |= {axis.lower(): np.full(len(self), index + 1) for axis, index in self.position.items()}
        if len(self.category_names) > 1:
            columns["class"] = np.array([self.category(label) for label in self.labels], object)
        return columns

    def forget_pixels(self, kinds: Sequence[str]) -> None:
        """Compute what writers of stacks of some kinds need, and let the image and its labels go, which bounds the
        memory."""
        for name in {name for kind in kinds for name in _OF_PIXELS.get(kind, ())}:
            getattr(self, name)
        vars(self).pop("label_image", None)
        object.__setattr__(self, "image", np.zeros((0, 0), np.uint8))
        object.__setattr__(self, "channels", None)

"""What happens to an image before the network sees it: levels, scale, padding. It belongs to the model.

H, W: height and width of an image in pixels; h, w: of the network's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from kg_detectron.io.lazy import LazyPlane
from kg_detectron.io.normalisation import Levels, Normalisation
from kg_detectron.io.resize import resize_image
from kg_detectron.io.stains import (
    SINGLE_COLOURS,
    HaematoxylinLevels,
    SingleColour,
    colours_of_dyes,
    haematoxylin_levels,
    single_colour,
)
from kg_detectron.modeling.settings import require

# Windows of an image are read in blocks of so many network pixels a side, and a scale maps a block to whole pixels of
# the image, so that an image that is resized window by window is the image that is resized at once.
BLOCK = 32
# Sides of the blocks in image pixels: scales from 8 down to 1/16.
_BLOCK_SIDES = (4, 512)

RESIZE = ("isotropic", "squeeze")

# The views of `Preprocessing.views`; that of a single colour has its name.
COLOURS, HAEMATOXYLIN = "colours", "haematoxylin"
View = Levels | HaematoxylinLevels | SingleColour


class Scale(NamedTuple):
    """How much an image is resized: pixels of the network's input for one of the image, or a size (h, w)."""

    value: float | tuple[int, int]
    source: str


@dataclass(frozen=True)
class Preprocessing:
    """Levels, scale and padding (the published ones by default).

    Attributes:
        normalisation: how grey levels become 0..255: "fixed" takes 8-bit images as they are, 16-bit ones / 257 and
            float ones * 255; "percentile" maps the values of each channel at two percentiles of the whole image.
        percentiles: the two, of 0..100.
        resize: "squeeze": every image becomes `size`, not keeping its aspect, as in the published training; images
            more than twice as large keep their pixels. "isotropic": one scale for both axes, by which the cells get
            the diameter that the model was trained for.
        size: height and width for "squeeze", pixels.
        diameter: median diameter of the cells in the network's input, pixels, for "isotropic"; the diameter of a cell
            is that of the circle of its area, 2 sqrt(area / pi).
        enlargement: a prediction shows the cells larger than the training did, by this factor: small cells are found
            that would be missed, and outlines are finer, for more time. A model that was trained on windows of many
            scales knows them so. Ours.
        border: a prediction that does not squeeze the image continues it on every side as its mirror image, by so many
            pixels of the network's input, rounded up to whole pixels of the image. Of what is found there only the
            part in the image counts. A cell that the edge cuts looks whole so, and fewer of these are missed. Ours.
        diameters: the diameters of the training cells in the network's input, pixels, at the percentiles 5, 25, 50, 75
            and 95; empty where unknown.
        image_diameter: median diameter of the cells in the images of the training, pixels of these images, where they
            are all about as large; None where they are not, or unknown. The search for the scale of an image begins
            there. Ours.
        pixel_size: micrometres of a pixel of the network's input; None where unknown.
        haematoxylin: whether a stained image is also looked at as a grey one of its density of haematoxylin, see
            `kg_detectron.io.stains`; prediction takes the view in which the model expects more cells. Ours.
        single_colours: whether a picture of several dyes in fluorescence is also looked at in each of its colours
            alone, as a grey image; prediction takes the view in which the model is surest of the cells. Ours.
        pixel_mean, pixel_std: the network sees (levels - mean) / std, channels BGR.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    NODE: ClassVar[str] = "INPUT"

    normalisation: str = "fixed"
    percentiles: tuple[float, float] = (1.0, 99.8)
    resize: str = "squeeze"
    size: tuple[int, int] = (512, 512)
    diameter: float = 28.0
    enlargement: float = 1.0
    border: int = 0
    diameters: tuple[float, ...] = ()
    image_diameter: float | None = None
    pixel_size: float | None = None
    haematoxylin: bool = False
    single_colours: bool = False
    pixel_mean: tuple[float, float, float] = field(default=(127.5, 127.5, 127.5), metadata={"key": "MODEL.PIXEL_MEAN"})
    pixel_std: tuple[float, float, float] = field(default=(255.0, 255.0, 255.0), metadata={"key": "MODEL.PIXEL_STD"})

    def __post_init__(self) -> None:
        self.levels_rule()  # checks both
        require(self.resize in RESIZE, "resize", f"one of {', '.join(RESIZE)}", self.resize)
        require(len(self.size) == 2 and min(self.size) >= 1, "size", "a positive height and width", self.size)
        require(0 < self.diameter < float("inf"), "diameter", "pixels above 0", self.diameter)
        require(0 < self.enlargement < float("inf"), "enlargement", "a number above 0", self.enlargement)
        require(self.border >= 0, "border", "0 or more pixels", self.border)
        for name, unit in (("image_diameter", "pixels"), ("pixel_size", "micrometres")):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), name, f"{unit} above 0", value)
        for name in ("pixel_mean", "pixel_std"):
            require(len(getattr(self, name)) == 3, name, "three numbers", getattr(self, name))
        require(min(self.pixel_std) > 0, "pixel_std", "numbers above 0", self.pixel_std)

    @property
    def predicted_diameter(self) -> float:
        """Median diameter of the cells in the network's input in a prediction, pixels."""
        return self.enlargement * self.diameter

    def given_scale(self, scale: float | None, diameter: float | None, pixel_size: float | None) -> "Scale | None":
        """The scale that somebody asks for; None where nothing is given.

        Args:
            scale: pixels of the network's input for one of the image.
            diameter: median diameter of the cells, pixels of the image.
            pixel_size: micrometres of a pixel of the image.

        Raises:
            ValueError: more than one is given, one is not above 0, or the model does not know its own pixel size.
        """
        named = {"scale": scale, "diameter": diameter, "pixel_size": pixel_size}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: expected one of these at most, for each sets the scale")
        for name, value in given.items():
            require(0 < value < float("inf"), name, "a number above 0", value)
        if scale is not None:
            return _limited(scale, "given")
        if diameter is not None:
            return _limited(self.predicted_diameter / diameter, f"diameter of {diameter:g} pixels")
        if pixel_size is not None:
            if self.pixel_size is None:
                raise ValueError(
                    "pixel_size: this model does not know the pixel size it was trained for; give a diameter"
                )
            return _limited(
                self.enlargement * pixel_size / self.pixel_size, f"pixel size of {pixel_size:g} micrometres"
            )
        return None

    def training_scale(self, size: tuple[int, int]) -> "Scale | None":
        """The scale of the published training for an image of size (H, W); None where cells decide ("isotropic")."""
        if self.resize != "squeeze":
            return None
        if any(side > 2 * limit for side, limit in zip(size, self.size, strict=True)):
            return Scale(1.0, "own pixels, for the image is more than twice as large as the training size")
        return Scale((self.size[0], self.size[1]), "training size")

    def known_scale(
        self, size: tuple[int, int], scale: float | None, diameter: float | None, pixel_size: float | None
    ) -> "Scale | None":
        """The scale of an image of size (H, W) that need not be estimated: the given one, or that of the training.

        Raises:
            ValueError: as `given_scale`.
        """
        return self.given_scale(scale, diameter, pixel_size) or self.training_scale(size)

    def levels(self, image: np.ndarray) -> Levels:
        """The levels of an image (H, W, 3) of any type that become 0 and 255.

        Raises:
            ValueError: a type whose white the "fixed" normalisation cannot know; see `Normalisation.levels`.
        """
        return self.levels_rule().levels(image)

    def views(self, image: np.ndarray, only: str | None = None) -> dict[str, View]:
        """How an image (H, W, 3) may be shown to the network, by name: one view, or more of one with several dyes.

        Args:
            image: its pixels.
            only: the view that was chosen before; None looks which there are.

        Raises:
            ValueError: the image has no such view, or as `levels` does.
        """
        names = (COLOURS, HAEMATOXYLIN, *SINGLE_COLOURS)
        require(only is None or only in names, "view", f"one of {', '.join(names)}", only)
        if isinstance(image, LazyPlane):
            image = image.overview()  # read once for all views
        levels = self.levels(image)
        if only == COLOURS:
            return {COLOURS: levels}
        if only in SINGLE_COLOURS:
            return {only: single_colour(only, levels)}
        if only == HAEMATOXYLIN:
            density = haematoxylin_levels(image, levels.high, is_stained=True)
            if density is None:
                raise ValueError(f"view: expected another one, for the image has no colours; got {only}")
            return {HAEMATOXYLIN: density}
        views: dict[str, View] = {COLOURS: levels}
        if self.haematoxylin and (density := haematoxylin_levels(image, levels.high)) is not None:
            views[HAEMATOXYLIN] = density
        elif self.single_colours:
            shown = colours_of_dyes(image)
            views |= {name: single_colour(name, levels) for name in shown}
            if len(shown) == 1:  # beside it, all colours show the noise of the others
                del views[COLOURS]
        return views

    def levels_rule(self) -> Normalisation:
        """How grey levels become 0..255."""
        return Normalisation(self.normalisation, tuple(self.percentiles))  # type: ignore[arg-type]  # which counts them

    def batch(self, images: Sequence[Tensor], divisor: int) -> Tensor:
        """The network's input (N, 3, h, w) of images (3, H, W) of 0..255, sides multiples of ``divisor``.

        Smaller images are continued to the right and below by their last pixels, for a grey frame would look like the
        edge of something.
        """
        height, width = (-(-max(image.shape[axis] for image in images) // divisor) * divisor for axis in (1, 2))
        first = images[0]
        mean, std = (first.new_tensor(v).reshape(-1, 1, 1) for v in (self.pixel_mean, self.pixel_std))
        batch = first.new_empty(len(images), 3, height, width)
        for image, place in zip(images, batch, strict=True):
            _, h, w = image.shape
            torch.sub(image, mean, out=place[:, :h, :w])
            place[:, :h, :w].div_(std)
            place[:, :h, w:] = place[:, :h, w - 1 : w]
            place[:, h:] = place[:, h - 1 : h]
        return batch


def _limited(scale: float, source: str) -> Scale:
    """A scale that somebody asks for; the source says so where it is not to be had."""
    smallest, largest = (BLOCK / side for side in reversed(_BLOCK_SIDES))
    if smallest <= scale <= largest:
        return Scale(scale, source)
    return Scale(scale, f"{source}, which asks for {scale:.3g}; the scale is {smallest:g} to {largest:g}")


def block_side(scale: float) -> int:
    """Pixels of the image in `BLOCK` pixels of the network's input, for the nearest scale that there is."""
    low, high = _BLOCK_SIDES
    return min(max(round(BLOCK / scale), low), high)


class NetworkImage:
    """An image as the network sees it, computed window by window when it is read: levels 0..255, resized.

    A window that is read alone equals that part of the whole, up to rounding.

    Args:
        image: (H, W, 3), or anything with a shape that is sliced like an array, such as `numpy.memmap`.
        levels: see `Preprocessing.views`.
        scale: pixels of the network's input for one of the image; rounded so that `BLOCK` of the former are whole
            pixels of the latter, or a size (h, w) to which the image is resized at once.
        border: see `Preprocessing.border`; 0 with a size.
        painted: whether scale bars of the image are painted over.

    Attributes:
        shape: (h, w, 3).
        scale: (y, x), as it came out.
        border: pixels of the image that its mirror image adds on every side.
        view: the name of the levels, see `Preprocessing.views`.
        painted: as given.
    """

    def __init__(
        self,
        image: np.ndarray,
        levels: View,
        scale: float | tuple[int, int],
        border: int = 0,
        *,
        painted: bool = False,
    ) -> None:
        self.image, self.levels, self.painted = image, levels, painted
        self.view = levels.name if isinstance(levels, SingleColour) else COLOURS
        if isinstance(levels, HaematoxylinLevels):
            self.view = HAEMATOXYLIN
        height, width = image.shape[:2]
        self.border = 0
        self._resized: np.ndarray | None = None
        if isinstance(scale, tuple):
            self._resized = resize_image(levels(np.asarray(image)), scale)
            self.shape = (*scale, 3)
            self.scale = scale[0] / height, scale[1] / width
        else:
            self._block = block_side(scale)
            self.scale = (BLOCK / self._block,) * 2
            self.border = -(-border * self._block // BLOCK)
            sides = (side + 2 * self.border for side in (height, width))
            self.shape = (*(-(-side * BLOCK // self._block) for side in sides), 3)

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """Rows and columns -> (h, w, 3) float32 of 0..255."""
        (y1, y2, _), (x1, x2, _) = (part.indices(side) for part, side in zip(window, self.shape, strict=False))
        if self._resized is not None:
            return self._resized[y1:y2, x1:x2]
        if self._block == BLOCK:
            return self._pixels(slice(y1, y2), slice(x1, x2))
        # Whole blocks, with one more on every side where interpolation looks beyond the window.
        first = [max(0, low // BLOCK - 1) for low in (y1, x1)]
        last = [-(-high // BLOCK) + 1 for high in (y2, x2)]
        rows, columns = (slice(a * self._block, b * self._block) for a, b in zip(first, last, strict=True))
        part = self._pixels(rows, columns)
        # Beyond the image its last pixels go on, so that all blocks are whole.
        missing = [(b - a) * self._block - side for a, b, side in zip(first, last, part.shape[:2], strict=True)]
        if any(missing):
            part = cv2.copyMakeBorder(part, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
        part = resize_image(part, ((last[0] - first[0]) * BLOCK, (last[1] - first[1]) * BLOCK))
        y, x = first[0] * BLOCK, first[1] * BLOCK
        return part[y1 - y : y2 - y, x1 - x : x2 - x]

    def _pixels(self, *window: slice) -> np.ndarray:
        """The levels of a window of the image with its border, cut at the border's edge."""
        if not self.border:
            return self.levels(np.asarray(self.image[window]))
        places = []
        for one, side in zip(window, self.image.shape, strict=False):
            place = np.arange(one.start, min(one.stop, side + 2 * self.border)) - self.border
            # The mirrors are the outermost pixels, which are not repeated.
            period = max(1, 2 * (side - 1))
            places.append(np.minimum(place % period, -place % period))
        (y1, x1), (y2, x2) = ([int(end(place)) for place in places] for end in (np.min, np.max))
        part = self.levels(np.asarray(self.image[y1 : y2 + 1, x1 : x2 + 1]))
        return part[np.ix_(places[0] - y1, places[1] - x1)]


def as_tensor(image: np.ndarray, like: Tensor) -> Tensor:
    """An image (H, W, 3) as a tensor (3, H, W), of the type and on the device of another one; of the same memory where
    these are its own."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(like)

"""The planes of an image layer, as the model takes them. H, W: height and width in pixels."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from napari.layers import Image

Place = tuple[int, ...]  # of a plane in its layer: an index for each axis before Y and X

COLOURS = "red, green, blue"
GREY = "grey"
_CHANNELS = {"red": 0, "green": 1, "blue": 2}


def channel_choices(layer: "Image | None") -> tuple[str, ...]:
    """The names that `read_plane` takes as the channel of a layer."""
    return (COLOURS, *_CHANNELS) if layer is not None and layer.rgb else (GREY,)


def layer_shape(layer: "Image") -> tuple[int, ...]:
    """The shape (..., H, W) of a layer, without its colours; of a pyramid the largest level."""
    shape = _level(layer).shape
    return tuple(shape[:-1] if layer.rgb else shape)


def all_places(layer: "Image") -> Iterator[Place]:
    """The places of all planes of a layer, in order; of a two-dimensional layer the one place ()."""
    return np.ndindex(layer_shape(layer)[:-2])


def shown_place(layer: "Image", step: tuple[int, ...]) -> Place:
    """The place of the plane that the viewer shows.

    Args:
        layer: of the viewer.
        step: the viewer's ``dims.current_step``; axes that the layer lacks come first.
    """
    shape = layer_shape(layer)
    lead = step[len(step) - len(shape) : -2] if len(shape) > 2 else ()
    return tuple(min(index, length - 1) for index, length in zip(lead, shape, strict=False))


def read_plane(layer: "Image", place: Place, channel: str) -> np.ndarray:
    """One plane, at its own depth.

    Args:
        layer: of grey or RGB(A) images.
        place: of the plane.
        channel: one of `channel_choices`.

    Returns:
        (H, W, 3) BGR of colours, otherwise (H, W).

    Raises:
        ValueError: another channel.
    """
    pixels = np.asarray(_level(layer)[place])
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if channel not in channel_choices(layer):
        raise ValueError(f"channel: expected one of {', '.join(channel_choices(layer))}, got {channel}")
    if channel == GREY:
        return pixels
    return pixels[..., 2::-1] if channel == COLOURS else pixels[..., _CHANNELS[channel]]


def pixel_size(layer: "Image") -> float | None:
    """Micrometres of a pixel, where the layer has square pixels and a unit of length; otherwise None."""
    (unit_y, unit_x), (y, x) = layer.units[-2:], layer.scale[-2:]
    if unit_y != unit_x or not np.isclose(y, x) or not unit_x.is_compatible_with("micrometer"):
        return None
    return float((x * unit_x).to("micrometer").magnitude)


def _level(layer: "Image") -> np.ndarray:
    return layer.data[0] if layer.multiscale else layer.data

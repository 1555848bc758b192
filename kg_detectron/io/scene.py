"""What readers of all formats hand over: scenes of pixels, upright, before channels are chosen.

H, W: height and width in pixels; C: channels.
"""

from dataclasses import dataclass

import numpy as np


class ImageChoiceError(ValueError):
    """A file can be read in several ways, and the one that was asked for, if any, does not fit.

    Attributes:
        option: of the command line that chooses: ``--axes``, ``--channels`` or ``--scene``.
        plain: the message without the advice to use the option.
    """

    def __init__(self, plain: str, advice: str, option: str) -> None:
        super().__init__(f"{plain}; {advice}")
        self.plain, self.advice, self.option = plain, advice, option

    def of_file(self, name: str) -> "ImageChoiceError":
        """The same error, with the name of the file in front."""
        return ImageChoiceError(f"{name}: {self.plain}", self.advice, self.option)


@dataclass(frozen=True, eq=False)
class Scene:
    """One image or stack of a file.

    Attributes:
        pixels: (..., H, W, C), upright; alpha is left out. May be a memory map.
        lead: the letters of the axes before H, such as "TZ".
        is_colour: the first three channels are red, green and blue.
        axes, shape: as the file stores them.
        name: of the scene; its number where it has none.
        channel_names: one a channel, or None.
        pixel_size: micrometres, or None; `source` says where it comes from.
        orientation: of TIFF and EXIF, 1..8, which has been applied.
        is_lossy: levels are not exact, as in JPEG.
        notes: sentences on what was assumed or left out.
        z_spacing: micrometres between two planes along Z, or None.
    """

    pixels: np.ndarray
    lead: str
    is_colour: bool
    axes: str
    shape: tuple[int, ...]
    name: str = "1"
    channel_names: tuple[str, ...] | None = None
    pixel_size: float | None = None
    source: str | None = None
    orientation: int = 1
    is_lossy: bool = False
    notes: tuple[str, ...] = ()
    z_spacing: float | None = None


@dataclass(frozen=True, eq=False)
class Decoded:
    """The scenes of a file that were asked for.

    Attributes:
        scenes: at least one.
        is_one_of_several: the file has scenes that can be told apart by name.
        notes: sentences on scenes that were left out.
    """

    scenes: list[Scene]
    is_one_of_several: bool = False
    notes: tuple[str, ...] = ()


def upright(pixels: np.ndarray, orientation: int, y: int) -> np.ndarray:
    """Turn and flip pixels as a TIFF or EXIF orientation asks for.

    Args:
        pixels: (..., H, W, ...), H at axis `y`.
        orientation: 1 (upright as stored) to 8; other values count as 1.
        y: the axis of H, from 0; W is the next one.

    Returns:
        A view of the pixels.
    """
    if not 2 <= orientation <= 8:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(y, y + 1)
    flips = {2: "x", 3: "yx", 4: "y", 5: "", 6: "x", 7: "yx", 8: "y"}[orientation]
    turn = [slice(None)] * y + [slice(None, None, -1 if axis in flips else None) for axis in "yx"]
    return pixels[tuple(turn)]


def pick_scene(names: list[str], wanted: int | str) -> int:
    """The index of the scene of a number from 1, or of a name in any case.

    Raises:
        ImageChoiceError: there is no such scene.
    """
    by_name = [index for index, name in enumerate(names) if name.casefold() == str(wanted).strip().casefold()]
    if by_name:
        return by_name[0]
    if str(wanted).strip().isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    listed = ", ".join(name if name == str(number) else f"{number} {name}" for number, name in enumerate(names, 1))
    scenes = "1 scene" if len(names) == 1 else f"{len(names)} scenes"
    raise ImageChoiceError(
        f"it has no scene {wanted}: it has {scenes}: {listed}", f"choose one with --scene {len(names)}", "--scene"
    )

"""Reading and writing images. H, W: height and width in pixels; channels are BGR, as everywhere in this package.

Images come with the levels of their files, whatever the type; a model's preprocessing makes them comparable.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from kg_detectron.io.grey import is_grey
from kg_detectron.io.lazy import LazyPlane
from kg_detectron.io.limits import MAX_PIXELS, check_size, check_tiff, no_limit_of_pillow
from kg_detectron.io.microscope import READERS, advice, decode_microscope
from kg_detectron.io.ome_zarr import decode_ome_zarr, is_ome_zarr
from kg_detectron.io.pictures import decode_picture
from kg_detectron.io.scene import Decoded, ImageChoiceError, Scene
from kg_detectron.io.setting import checked_channels
from kg_detectron.io.slides import ONLY_SLIDES, decode_slide
from kg_detectron.io.tiff import TIFF_SIGNATURES, decode_tiff

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageChoiceError",
    "ImageFile",
    "Page",
    "channels_of_nuclei",
    "check_size",
    "check_tiff",
    "checked_axes",
    "checked_channels",
    "decode_image",
    "list_channels",
    "no_limit_of_pillow",
    "only_page",
    "open_image",
    "read_image",
    "read_pages",
    "undecided",
    "write_png",
]

AnyPage = TypeVar("AnyPage", "Page", np.ndarray)

# Endings of image files. A file that is named itself may have any: its content decides.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".jp2", ".tif", ".tiff", ".btf", ".tf8"),
    *(".svs", ".ndpi", ".scn", ".bif", ".qptiff", ".lsm", ".stk"),  # TIFFs of slide scanners and microscopes
    *ONLY_SLIDES,
)

_MAP_FROM = 2**28  # bytes from which a TIFF is mapped into memory instead of read
_COLOUR_NAMES = ("red", "green", "blue")
_SAMPLE = 256  # rows and columns of an image that are looked at first to see whether it is grey
_BLOCK = 2**22  # values that are looked at together
_GREY_PIXELS, _GREY_LEVELS = 1024, 8  # of an image in one colour that is taken for a grey one, and no drawing
_STAINS_OF_NUCLEI = re.compile(r"dapi|hoechst|draq|nuc|h2b|histone|sytox|propidium|\bdna\b", re.IGNORECASE)
# JPEG leaves traces of a bright channel in black ones: levels of 255 that none of their pixels exceeds, and that only
# a part of them exceeds.
_TRACE, _FEW, _FEW_PART = 64, 24, 0.01


@dataclass(frozen=True, eq=False)
class Page:
    """One image of a file: a plane of a stack, or all there is.

    Attributes:
        pixels: (H, W, 3) BGR of the file's type and levels, upright; those of 1 bit are uint8, 0 and 255. A grey image
            has stride 0 along its last axis. May be a read-only view of the file.
        source: (H, W, C), all channels without alpha, in the order of the file, red first.
        channel_names: one a channel; their numbers from "1" where the file has no names.
        chosen: the channels in `pixels`, numbers from 1: one, or three as red, green and blue; none where one must be
            chosen, and `pixels` are those of the first.
        position: where the page is in its file: "scene" (a name), and "t", "z", "page" and so on, counted from 0. Only
            axes that the file has.
        pixel_size: micrometres, or None where it is unknown.
        orientation: of TIFF and EXIF, which has been applied; 1 where the image is stored upright.
        z_spacing: micrometres to the next plane along z, or None where it is unknown.
    """

    pixels: np.ndarray
    source: np.ndarray
    channel_names: tuple[str, ...]
    chosen: tuple[int, ...]
    position: dict[str, str | int]
    pixel_size: float | None = None
    orientation: int = 1
    z_spacing: float | None = None

    @property
    def planes(self) -> np.ndarray:
        """(C, H, W), all channels: a view of `source`, which must be an array."""
        return np.moveaxis(self.source, 2, 0)

    @property
    def is_lazy(self) -> bool:
        """Whether the pixels are read when they are sliced, see `LazyPlane`."""
        return isinstance(self.source, LazyPlane)

    def of_channels(self, chosen: tuple[int, ...]) -> "Page":
        """The same page with the pixels of one channel, or of three as red, green and blue; numbers from 1."""
        return replace(self, pixels=_bgr(self.source, chosen), chosen=chosen)


@dataclass(frozen=True, eq=False)
class ImageFile:
    """A file of images, and what it says of itself.

    Attributes:
        pages: at least one, in the order of the file.
        pixel_size: micrometres, the same for all pages; None where it is unknown or differs.
        pixel_size_source: what it was read from, such as "OME", "ImageJ" or "TIFF resolution".
        axes, shape: of the first scene, as stored, such as "TZCYX".
        scenes: names of the scenes that were read.
        orientation: of TIFF and EXIF, which has been applied; 1 where the images are stored upright.
        notes: what was assumed, ignored or left out, a sentence each.
    """

    pages: list[Page]
    pixel_size: float | None
    pixel_size_source: str | None
    axes: str
    shape: tuple[int, ...]
    scenes: tuple[str, ...]
    orientation: int
    notes: tuple[str, ...]


def open_image(
    path: str | Path,
    *,
    axes: str | None = None,
    channels: Sequence[int | str] | None = None,
    scene: int | str | None = None,
    max_pixels: int = MAX_PIXELS,
    ask: bool = True,
) -> ImageFile:
    """Read all images of a file, one of each plane of a stack, and what the file says of them.

    PNG, JPEG, JPEG 2000, WebP, BMP, GIF, PPM and TIFF of any kind and codec are read, with the extra ``formats`` also
    CZI, ND2 and LIF, with ``zarr`` images of OME-Zarr. The content decides the format, not the file name's ending.
    Alpha is dropped. Orientation (TIFF, EXIF) is applied. Every plane along T, Z and other axes is a page of its own,
    in the order of the file; of a pyramid the largest level is read; labels, macro images and thumbnails of slides are
    left out. An RGB image that is a grey one in one colour is read as grey. Large uncompressed TIFFs are mapped into
    memory.

    Args:
        path: the file.
        axes: axis order of TIFF stacks, overriding what the file declares, such as "CYX" or "TZYX": Y and X, C for
            channels, any other letter for planes. Plain grey and RGB images keep their own.
        channels: the channels to take, by number from 1 or by name in any case: one makes a grey image, three are red,
            green and blue. Needed where a file has several channels that are no colours. A grey file ignores it.
        scene: the scene to take, by number from 1 or by name. By default all are read.
        max_pixels: height x width (of compressed stacks: x planes) above which a file is refused.
        ask: whether channels that have to be chosen are an error, or left to the caller: see `Page.chosen`.

    Raises:
        OSError: the file is missing or cannot be opened.
        ImageChoiceError: axes, channels or scene must be chosen, or do not fit the file.
        ValueError: not an image, corrupt or too large. All messages begin with the file.
    """
    axes = None if axes is None else axes.strip().upper()
    channels = None if channels is None else checked_channels(channels)
    path = Path(path)
    decoded = _decode_file(path, axes, scene, max_pixels, as_stored=False)
    if axes is not None:
        checked_axes(axes)  # nothing has looked at it where the file is no stack
    with _naming(str(path)):
        return _image_file(decoded, axes, channels, ask=ask)


def read_pages(
    path: str | Path,
    *,
    axes: str | None = None,
    channels: Sequence[int | str] | None = None,
    scene: int | str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray]:
    """Read all images of a file: the pixels of :func:`open_image`, whose arguments and errors it shares.

    Returns:
        (H, W, 3) BGR images of the file's type and levels; those of 1 bit are uint8, 0 and 255. They may be read-only
        views of one array or of the file.
    """
    file = open_image(path, axes=axes, channels=channels, scene=scene, max_pixels=max_pixels)
    return [page.pixels for page in file.pages]


def read_image(
    path: str | Path,
    *,
    axes: str | None = None,
    channels: Sequence[int | str] | None = None,
    scene: int | str | None = None,
) -> np.ndarray:
    """Read a file that holds one image; arguments and errors as for :func:`open_image`.

    Returns:
        (H, W, 3) BGR, contiguous, of the file's type and levels.

    Raises:
        ValueError: also where the file has several pages.
    """
    pages = read_pages(path, axes=axes, channels=channels, scene=scene)
    return np.ascontiguousarray(only_page(pages, str(path)))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """:func:`read_image` for the content of a file that is in memory, such as a member of an archive.

    Args:
        data: the encoded file.
        name: what error messages call it.
    """
    with _naming(name):
        file = _image_file(_decode(data, None, None, MAX_PIXELS, as_stored=False), None, None)
    return np.ascontiguousarray(only_page(file.pages, name).pixels)


def decode_file(path: str | Path) -> Decoded:
    """Decode a file without a change of its numbers: for label images.

    Raises:
        OSError, ValueError: as for :func:`open_image`.
    """
    return _decode_file(Path(path), None, None, MAX_PIXELS, as_stored=True)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write an image as an 8-bit PNG: grey where its three channels are equal, RGB otherwise.

    Args:
        path: the file; an existing one is replaced.
        image: (H, W, 3) BGR in 0..255; float values are rounded.

    Raises:
        OSError: the file cannot be written.
    """
    if image.dtype != np.uint8:
        image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    pixels = np.ascontiguousarray(image[..., 0]) if is_grey(image) else image
    Path(path).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def checked_axes(axes: str) -> str:
    """An axis order in capital letters.

    Raises:
        ValueError: it is none: Y and X must be in it, and each letter once.
    """
    letters = axes.strip().upper()
    if not letters.isalpha() or len(set(letters)) != len(letters) or not {"Y", "X"} <= set(letters):
        raise ValueError(f"axes: expected letters with Y and X once each, such as TZYX or YXC, got {axes}")
    return letters


class _naming:
    """Errors of broken files -> ValueErrors that begin with the name of the file, and have it once."""

    def __init__(self, name: str, what: str = "an image") -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ImageChoiceError):
            raise error.of_file(self.name) from error
        # Whatever a decoder makes of broken bytes (struct.error, IndexError, ...), the user needs the file.
        if isinstance(error, Exception):
            text = str(error).replace(f"{self.name}: ", "").replace(self.name, "it") or type(error).__name__
            raise ValueError(f"{self.name}: cannot be read as {self.what}: {text}") from error


def only_page(pages: Sequence[AnyPage], name: str) -> AnyPage:
    """The page of a file that holds one image; ``name`` is what the error calls it.

    Raises:
        ValueError: there are several.
    """
    if len(pages) != 1:
        raise ValueError(f"{name}: it has {len(pages)} pages, expected one image")
    return pages[0]


def _decode_file(path: Path, axes: str | None, scene: int | str | None, max_pixels: int, *, as_stored: bool) -> Decoded:
    if path.is_dir() and is_ome_zarr(path) and not as_stored:
        with _naming(str(path)):
            return decode_ome_zarr(path, max_pixels)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: {advice(path.suffix) or 'it is a folder, expected an image file'}")
    try:
        with path.open("rb") as file:
            is_tiff = file.read(4) in TIFF_SIGNATURES
        is_read_by_name = is_tiff or path.suffix.lower() in (*READERS, *ONLY_SLIDES)
        source = path if is_read_by_name else path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except OSError as error:
        raise type(error)(f"{path}: it cannot be opened: {error.strerror or error}") from error
    with _naming(str(path), "a label image" if as_stored else "an image"):
        try:
            return _decode(source, axes, scene, max_pixels, as_stored=as_stored)
        except ValueError as error:
            hint = None if is_tiff or isinstance(error, ImageChoiceError) else advice(path.suffix)
            raise (ValueError(hint) if hint else error) from error


def _decode(
    source: Path | bytes, axes: str | None, scene: int | str | None, max_pixels: int, *, as_stored: bool
) -> Decoded:
    """A TIFF or microscope's file, or the content of any other."""
    if isinstance(source, Path) and source.suffix.lower() in READERS:
        return decode_microscope(source, scene, max_pixels)
    if isinstance(source, Path) and axes is None and scene is None and not as_stored:
        slide = decode_slide(source)
        if slide is not None:
            return slide
    if isinstance(source, Path) or source.startswith(TIFF_SIGNATURES):
        return decode_tiff(source, axes, scene, max_pixels, map_from=_MAP_FROM, as_stored=as_stored)
    return decode_picture(source, max_pixels, as_stored=as_stored)


def _image_file(
    decoded: Decoded, axes: str | None, channels: tuple[int | str, ...] | None, *, ask: bool = True
) -> ImageFile:
    pages: list[Page] = []
    notes = dict.fromkeys(decoded.notes)
    for scene in decoded.scenes:
        notes.update(dict.fromkeys(scene.notes))
        for page, note in _pages(scene, decoded.is_one_of_several, channels, ask=ask):
            pages.append(page)
            notes.update(dict.fromkeys(note))
    first = decoded.scenes[0]
    if axes is not None and not any(scene.lead or "C" in scene.axes for scene in decoded.scenes) and first.axes != axes:
        notes[f"it is no stack: the axis order {axes} was not needed"] = None
    sizes = {(scene.pixel_size, scene.source) for scene in decoded.scenes}
    if len(sizes) > 1:
        notes["its scenes have pixels of different sizes"] = None
    size, source = sizes.pop() if len(sizes) == 1 else (None, None)
    if first.orientation > 1:
        notes[f"its pixels were turned upright by its orientation {first.orientation} (TIFF, EXIF)"] = None
    scenes = tuple(scene.name for scene in decoded.scenes)
    return ImageFile(pages, size, source, first.axes, first.shape, scenes, first.orientation, tuple(notes))


def _pages(
    scene: Scene, is_one_of_several: bool, channels: tuple[int | str, ...] | None, *, ask: bool
) -> Iterator[tuple[Page, list[str]]]:
    """The pages of a scene, each with notes."""
    lengths = scene.pixels.shape[: len(scene.lead)]
    for place in np.ndindex(lengths):
        plane, notes = scene.pixels[place], []
        if plane.dtype == bool:
            plane = plane.astype(np.uint8) * 255
        if plane.dtype.kind not in "uif":
            raise ValueError(f"its values are of type {plane.dtype}, expected integers or real numbers")
        names = _channel_names(scene, plane.shape[2])
        is_colour = scene.is_colour
        # A plane that is read piece by piece is not read whole to see whether it is grey.
        is_small = not isinstance(plane, LazyPlane)
        if (
            is_small
            and is_colour
            and plane.shape[2] == 3
            and (grey := _grey_channel(plane, scene.is_lossy)) is not None
        ):
            shown, is_equal = grey
            what = "its red, green and blue are equal" if is_equal else f"it is a grey image in {_tint(plane, shown)}"
            notes.append(f"{what}: it was read as one grey image")
            plane, names, is_colour = plane[..., shown : shown + 1], ("1",), False
        chosen = _choice(names, is_colour, channels, ask=ask)
        if len(names) == 1 and channels not in (None, (1,)):
            notes.append(f"it has one channel, which was taken: the choice of {_listed(channels)} is for other files")
        elif channels is None and is_colour and len(names) > 3:
            notes.append(f"of its {len(names)} channels only red, green and blue were taken")
        position: dict[str, str | int] = {"scene": scene.name} if is_one_of_several else {}
        for axis, index, length in zip(scene.lead, place, lengths, strict=True):
            if length > 1:
                position["page" if axis in "IQ" else axis.lower()] = index
        about = scene.pixel_size, scene.orientation, scene.z_spacing
        yield Page(_bgr(plane, chosen or (1,)), plane, names, chosen, position, *about), notes


def _bgr(plane: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    """(H, W, C) and channels as red, green, blue from 1 -> (H, W, 3) BGR, a view where it can be one."""
    order = [number - 1 for number in chosen]
    if isinstance(plane, LazyPlane):
        return plane.take(order * 3 if len(order) == 1 else order[::-1])
    if len(order) == 1:
        return np.broadcast_to(plane[..., order[0] : order[0] + 1], (*plane.shape[:2], 3))
    return plane[..., 2::-1] if order == [0, 1, 2] else plane[..., order[::-1]]


def _channel_names(scene: Scene, count: int) -> tuple[str, ...]:
    if scene.channel_names is not None and len(scene.channel_names) == count:
        return scene.channel_names
    numbers = tuple(str(number) for number in range(1, count + 1))
    return (*_COLOUR_NAMES, *numbers[3:]) if scene.is_colour else numbers


def _choice(
    names: tuple[str, ...], is_colour: bool, channels: tuple[int | str, ...] | None, *, ask: bool
) -> tuple[int, ...]:
    """The numbers of the channels to take; none where one must be chosen, and not `ask`.

    Raises:
        ImageChoiceError: one must be chosen, or the file has not what was chosen.
    """
    if len(names) == 1:
        return (1,)
    if channels is None and is_colour:
        return (1, 2, 3)
    if channels is None and sorted(name.strip().casefold() for name in names) == sorted(_COLOUR_NAMES):
        channels = _COLOUR_NAMES  # a composite of ImageJ
    if channels is None:
        if ask:
            raise undecided(names)
        return ()
    numbers = []
    for channel in channels:
        same = [n for n, name in enumerate(names, 1) if name.strip().casefold() == str(channel).casefold()]
        if isinstance(channel, int) and channel <= len(names):
            same = [channel]
        if len(same) != 1:
            problem = f"it has {len(same)} channels called {channel}" if same else f"it has no channel {channel}"
            raise ImageChoiceError(f"{problem}: {list_channels(names)}", _channels_advice(names), "--channels")
        numbers += same
    return tuple(numbers)


def undecided(names: tuple[str, ...]) -> ImageChoiceError:
    """The error that asks for one of the channels of a file."""
    return ImageChoiceError(list_channels(names), _channels_advice(names), "--channels")


def list_channels(names: tuple[str, ...]) -> str:
    """How many channels a file has, and what they are called: the beginning of a sentence."""
    if names == tuple(str(number) for number in range(1, len(names) + 1)):
        return f"it has {len(names)} channels, without names"
    return f"it has {len(names)} channels: " + ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))


def channels_of_nuclei(names: Sequence[str]) -> list[int]:
    """The channels whose names are those of a stain of nuclei, numbers from 1."""
    return [number for number, name in enumerate(names, 1) if _STAINS_OF_NUCLEI.search(name)]


def _channels_advice(names: tuple[str, ...]) -> str:
    example = names[next(iter(channels_of_nuclei(names)), 1) - 1]
    if names.count(example) > 1 or not re.fullmatch(r"[\w.-]+", example):
        example = str(names.index(example) + 1)
    return f"choose one with --channels {example}"


def _listed(channels: Sequence[int | str] | None) -> str:
    return (
        "channels " + ", ".join(map(str, channels or ()))
        if len(channels or ()) > 1
        else f"channel {(channels or ('',))[0]}"
    )


def _tint(plane: np.ndarray, shown: int) -> str:
    peaks = [float(plane[..., c].max()) for c in range(3)]
    bright = [name for name, peak in zip(_COLOUR_NAMES, peaks, strict=True) if peak > 0.25 * peaks[shown]]
    return " and ".join(bright) or _COLOUR_NAMES[shown]


def _grey_channel(plane: np.ndarray, is_lossy: bool) -> tuple[int, bool] | None:
    """Whether an RGB image is a grey one in one colour: each channel a multiple of the brightest.

    Args:
        plane: (H, W, 3).
        is_lossy: levels are not exact, so that only black beside one bright channel can be told.

    Returns:
        The brightest channel, and whether all three are equal; None for an image of several colours, and for one of a
        single colour all over.
    """
    if plane.strides[2] == 0:
        return 0, True
    steps = [max(1, length // _SAMPLE) for length in plane.shape[:2]]
    sample = np.asarray(plane[:: steps[0], :: steps[1]], np.float64)
    peaks = sample.reshape(-1, 3).max(axis=0)
    if not np.isfinite(peaks).all():
        return None
    shown = int(peaks.argmax())

    def fits(part: np.ndarray, ratios: np.ndarray, slack: float) -> bool:
        part = np.asarray(part, np.float64)
        return bool((np.abs(part - ratios * part[..., shown : shown + 1]) <= slack).all())

    equal = np.ones(3)
    if fits(sample, equal, 0) and all(fits(block, equal, 0) for block in _blocks(plane)):
        return shown, True
    if peaks[shown] <= 0 or sample[..., 0].size < _GREY_PIXELS or len(np.unique(sample[..., shown])) < _GREY_LEVELS:
        return None
    if is_lossy:
        others = [c for c in range(3) if c != shown]
        black = np.eye(3)[shown]
        for block in (sample, *_blocks(plane)):
            if not fits(block, black, _TRACE):
                return None
        few = sum(int((block[..., others] > _FEW).any(axis=2).sum()) for block in _blocks(plane))
        return (shown, False) if few <= _FEW_PART * plane[..., 0].size else None
    # Levels of the others are rounded.
    ratios, slack = peaks / peaks[shown], 1.5 if plane.dtype.kind in "ui" else 0
    one_colour = fits(sample, ratios, slack) and all(fits(block, ratios, slack) for block in _blocks(plane))
    return (shown, False) if one_colour else None


def _blocks(plane: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK // max(1, plane[0].size))
    return (plane[start : start + rows] for start in range(0, len(plane), rows))

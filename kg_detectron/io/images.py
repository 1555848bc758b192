"""Reading and writing images. H, W: height and width in pixels; channels are BGR, as everywhere in this package.

Images come with the levels of their files, whatever the type; a model's preprocessing makes them comparable.
"""

import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import tifffile
from PIL import Image

# Height x width above which a header is not believed: a file of a few bytes can claim any size.
MAX_PIXELS = 1_000_000_000

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, classic and BigTIFF
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")  # of all that Pillow reads: one of them runs a program
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_COLOURS = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.PALETTE)
_MAP_FROM = 2**28  # bytes from which a TIFF is mapped into memory instead of read
_PIXEL_BYTES = 32  # of the largest pixel that is believed: four channels of float64
# Compressions that tifffile unpacks to whatever length they have, and how many times longer that can be.
_UNBOUNDED = {
    tifffile.COMPRESSION.ADOBE_DEFLATE: (zlib.decompressobj, 1032),
    tifffile.COMPRESSION.DEFLATE: (zlib.decompressobj, 1032),
    tifffile.COMPRESSION.LZMA: (lzma.LZMADecompressor, 10000),
}
_HARMLESS = 2**28  # bytes that a piece of a TIFF may unpack to without being looked at first


def read_pages(
    path: str | Path,
    *,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray]:
    """Read all images of a PNG, JPEG or TIFF file, one of each plane of a stack.

    Grey, RGB, palette and multi-channel images are read; alpha is dropped. The content decides the format, not the
    file name's ending. Every plane along T, Z and other axes of a TIFF is an image of its own, in the order of the
    file; of a pyramid the largest level is read. Large uncompressed TIFFs are mapped into memory, not read.

    Args:
        path: the file.
        axes: axis order of TIFF stacks, overriding what the file declares, such as "CYX" or "TZYX": Y and X, C for
            channels, any other letter for planes. Plain grey and RGB images keep their own.
        channels: the channels to take, counted from 1: one makes a grey image, three are red, green and blue. Needed
            where a file has several channels that are not declared to be colours.
        max_pixels: height x width (of compressed stacks: x planes) above which a file is refused.

    Returns:
        (H,W,3) BGR images of the file's type and levels; those of 1 bit are uint8, 0 and 255. They may be read-only
        views of one array or of the file.

    Raises:
        OSError: the file is missing or cannot be opened.
        ValueError: not an image, corrupt, too large, or of an ambiguous axis order or choice of channels. The message
            names the file.
    """
    if channels is not None and (len(channels) not in (1, 3) or min(channels) < 1):
        raise ValueError(f"channels: expected one or three numbers from 1, got {list(channels)}")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected an image file")
    with path.open("rb") as file:
        source = path if file.read(4) in _TIFF_SIGNATURES else path.read_bytes()
    return _decode(source, str(path), axes, channels, max_pixels)


def read_image(path: str | Path) -> np.ndarray:
    """Read a file that holds one image: `read_pages` where there are no pages and channels to choose from.

    Returns:
        (H,W,3) BGR, contiguous, of the file's type and levels.
    """
    return _only_page(read_pages(path), str(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """:func:`read_image` for the content of a file that is in memory, such as a member of an archive.

    Args:
        data: the encoded file.
        name: what error messages call it.
    """
    return _only_page(_decode(data, name, None, None, MAX_PIXELS), name)


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
    is_grey = all(np.array_equal(image[..., 0], image[..., c]) for c in (1, 2))
    pixels = np.ascontiguousarray(image[..., 0]) if is_grey else image
    Path(path).write_bytes(cv2.imencode(".png", pixels)[1])


def check_size(height: int, width: int, planes: int = 1, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse, by a ValueError, a size that no image has: what a header claims, for which no memory is taken yet."""
    if min(height, width) < 1:
        raise ValueError(f"its header says {width} x {height} pixels")
    if height * width * planes > max_pixels:
        pages = f" on {planes} pages" if planes > 1 else ""
        raise ValueError(
            f"its header says {width} x {height} pixels{pages}, more than the limit of {max_pixels} (--max-pixels)"
        )


def check_tiff(tiff: tifffile.TiffFile, chosen: Sequence[tifffile.TiffPageSeries], max_pixels: int) -> None:
    """Refuse, by a ValueError, series of a TIFF that would unpack to more than any image of `max_pixels` has."""
    packed = [series for series in chosen if series.dataoffset is None]
    for series in packed:
        check_size(series.keyframe.imagelength, series.keyframe.imagewidth, max_pixels=max_pixels)
    claimed, limit = sum(series.nbytes for series in packed), max_pixels * _PIXEL_BYTES
    if claimed > limit:
        raise ValueError(f"its header says {claimed} bytes, more than the limit of {limit} (--max-pixels)")
    for series in packed:
        decompressor, ratio = _UNBOUNDED.get(series.keyframe.compression, (None, 0))
        if decompressor is None:
            continue
        allowed = int(np.prod(series.keyframe.chunks)) * series.dtype.itemsize
        for page in filter(None, series.pages):
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
                if length * ratio > max(allowed, _HARMLESS):
                    tiff.filehandle.seek(offset)
                    if len(decompressor().decompress(tiff.filehandle.read(length), allowed + 1)) > allowed:
                        raise ValueError(f"a piece of it of {length} bytes unpacks to more than its {allowed} bytes")


@contextmanager
def no_limit_of_pillow() -> Iterator[None]:
    """Pillow's limit on sizes is a constant of the process; ours is checked instead, on the header alone."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _only_page(pages: list[np.ndarray], name: str) -> np.ndarray:
    if len(pages) != 1:
        raise ValueError(f"{name}: it has {len(pages)} pages, expected one image")
    return np.ascontiguousarray(pages[0])


def _decode(
    source: Path | bytes, name: str, axes: str | None, channels: Sequence[int] | None, max_pixels: int
) -> list[np.ndarray]:
    """A TIFF file, or the content of any."""
    try:
        if isinstance(source, Path) or source.startswith(_TIFF_SIGNATURES):
            # Of several files that belong together only the one that was named is read: the names of the others come
            # from its metadata, and may lead anywhere.
            with tifffile.TiffFile(
                source if isinstance(source, Path) else io.BytesIO(source), _multifile=False
            ) as tiff:
                planes = _tiff_planes(tiff, axes, max_pixels)
        else:
            planes = [_decode_other(source, max_pixels)]
        return [_to_bgr(plane, is_colour, channels) for plane, is_colour in planes]
    # Whatever a decoder makes of broken bytes (struct.error, IndexError, SyntaxError, ...), the user needs the file.
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def _to_bgr(plane: np.ndarray, is_colour: bool, channels: Sequence[int] | None) -> np.ndarray:
    """(H,W,C), red first where C are colours -> (H,W,3) BGR, a view where it can be one."""
    count = plane.shape[2]
    if channels is None and count > 1 and not is_colour:
        raise ValueError(f"it has {count} channels: choose one, or three as red, green and blue (--channels)")
    if channels is not None and max(channels) > count:
        raise ValueError(f"it has {count} channels, and no channel {max(channels)}")
    if plane.dtype == bool:
        plane = plane.astype(np.uint8) * 255
    if plane.dtype.kind not in "uif":
        raise ValueError(f"its values are of type {plane.dtype}, expected integers or real numbers")
    order = [channel - 1 for channel in channels] if channels is not None else list(range(count))
    if len(order) == 1:
        return np.broadcast_to(plane[..., order], (*plane.shape[:2], 3))
    return plane[..., 2::-1] if order == [0, 1, 2] else plane[..., order[::-1]]


def _decode_other(data: bytes, max_pixels: int) -> tuple[np.ndarray, bool]:
    """PNG, JPEG and the other `_FORMATS` -> (H,W,C), RGB or grey, and whether it is RGB."""
    with no_limit_of_pillow():
        Image.open(io.BytesIO(data), formats=_FORMATS).close()
    with no_limit_of_pillow(), iio.imopen(data, "r", plugin="pillow") as file:
        properties = file.properties()
        if properties.n_images is not None:
            raise ValueError(f"it holds {properties.n_images} frames, expected one image")
        check_size(*properties.shape[:2], max_pixels=max_pixels)
        if data.startswith(b"\x89PNG") and data[24] == 16 and data[25] != 0:
            # Pillow cuts PNGs of 16 bits and several channels to 8 bits; OpenCV keeps them.
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if image is None:
                raise ValueError("it is corrupt")
            return image[..., 2::-1], True
        image = file.read()
        mode = file.metadata(exclude_applied=False)["mode"]
    if mode == "LA" or image.ndim == 2:
        return image.reshape(*image.shape[:2], -1)[..., :1], False
    if mode not in ("RGB", "RGBA", "P", "PA"):
        raise ValueError(f"its colours are {mode}, expected grey, RGB or a palette")
    return image[..., :3], True


def _tiff_planes(tiff: tifffile.TiffFile, axes: str | None, max_pixels: int) -> list[tuple[np.ndarray, bool]]:
    """Every plane (H,W,C) of a TIFF, and whether its channels are RGB."""
    if not tiff.series:
        raise ValueError("it is corrupt: it has no page")
    # Slides hold a thumbnail and a label beside the pyramid, as series of their own.
    chosen = tiff.series[:1] if tiff.series[0].is_pyramidal else tiff.series
    check_tiff(tiff, chosen, max_pixels)
    return [plane for series in chosen for plane in _series_planes(tiff, series, axes, max_pixels)]


def _series_planes(
    tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, axes: str | None, max_pixels: int
) -> Iterator[tuple[np.ndarray, bool]]:
    page = series.keyframe
    order = _checked_axes(series, axes)
    size = dict(zip(order, series.shape, strict=True))
    mapped = series.dataoffset is not None and not series.is_multifile
    planes = 1 if mapped else int(np.prod([n for axis, n in size.items() if axis not in "YXSC"]))
    check_size(size["Y"], size["X"], planes, max_pixels)

    alphas = sum(sample in _ALPHA for sample in page.extrasamples)
    if page.compression not in tifffile.TIFF.DECOMPRESSORS and not alphas and page.samplesperpixel in (1, 3):
        # Without the package imagecodecs, tifffile lacks LZW and JPEG; OpenCV has them but multiplies by alpha.
        array = _decode_with_opencv(tiff, series)
        if array.ndim > series.ndim:  # a palette, applied
            order += "S"
    else:
        on_disk = mapped and tiff.filehandle.is_file and series.nbytes >= _MAP_FROM
        array = series.asarray(out="memmap" if on_disk else None)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            # The 16-bit table holds 8-bit colours, as v * 256 or v * 257.
            array = np.moveaxis(page.colormap[:, array] >> 8, 0, -1).astype(np.uint8)
            order += "S"
        elif page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
            array = np.invert(array)

    channel = order[-1] if order[-1] in "SC" else next((axis for axis in order if axis in "SC"), "")
    lead = [axis for axis in order if axis not in ("Y", "X", channel)]
    array = array.transpose([order.index(axis) for axis in (*lead, "Y", "X", *channel)])
    if not channel:
        array = array[..., None]
    elif channel == "S" and alphas:
        array = array[..., :-alphas]
    is_colour = channel == "S" and page.photometric in _COLOURS and array.shape[-1] == 3
    for place in np.ndindex(array.shape[: len(lead)]):
        yield array[place], is_colour


def _checked_axes(series: tifffile.TiffPageSeries, axes: str | None) -> str:
    """The axis order of a series: the file's, or the caller's for a stack."""
    own = series.axes
    what = f"it has axes {own} of {series.shape}"
    is_stack = any(axis not in "YXS" for axis in own)
    if is_stack and axes is not None:
        if len(axes) != series.ndim or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
            raise ValueError(f"{what}, which --axes {axes} does not fit: expected {series.ndim} letters, Y and X once")
        return axes
    if not {"Y", "X"} <= set(own) or len(set(own)) != len(own) or "Q" in own:
        example = "TZCYX"[-series.ndim :] if series.ndim > 2 else "YX"
        raise ValueError(f"{what}, an ambiguous order: name it with --axes, such as --axes {example}")
    if {"C", "S"} <= set(own):
        raise ValueError(f"{what}: channels of several samples each; name the one to take as planes with --axes")
    return own


def _decode_with_opencv(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> np.ndarray:
    """A series of pages -> its shape, with an axis of RGB behind where a palette was applied."""
    tiff.filehandle.seek(0)
    data = np.frombuffer(tiff.filehandle.read(), np.uint8)
    decoded, pages = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED)
    if not decoded or len(pages) != len(tiff.pages):
        raise ValueError(f"it is corrupt, or its compression {series.keyframe.compression.name} needs imagecodecs")
    array = np.stack([pages[page.index] for page in series.pages])
    lead = series.shape[: series.ndim - series.keyframe.ndim]
    if array.ndim == 4:
        array = array[..., ::-1]
    return array.reshape(*lead, *array.shape[1:])

"""What a file may claim: sizes that are checked before memory is taken for them.

H, W: height and width in pixels.
"""

import lzma
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tifffile
from PIL import Image

# Height x width above which a header is not believed: a file of a few bytes can claim any size.
MAX_PIXELS = 1_000_000_000

_PIXEL_BYTES = 32  # of the largest pixel that is believed: four channels of float64
_HEAD = 4096  # bytes of a compressed strip or tile in which its own header is looked for
_HARMLESS_BYTES = 2**28  # that a strip or tile may unpack to without being looked at first
_HARMLESS = 2**22  # pixels that a strip or tile may unpack to, whatever the TIFF says
# Compressions of TIFF: those of a stream that can be far longer than it should, with the largest ratio; and those of
# images with a header of their own.
_JPEG = {6, 7, 33007, 34892}
_STREAMS: dict[int, tuple[Callable[[], Any], int]] = {
    8: (zlib.decompressobj, 1032),
    32946: (zlib.decompressobj, 1032),
    34925: (lzma.LZMADecompressor, 10000),
}
_OTHER_IMAGES = {33003, 33004, 33005, 34712, 22610, 34887, 34933, 34934, 50001, 50002, 52546}


def check_size(height: int, width: int, planes: int = 1, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a size that no image has, before memory is taken for it.

    Args:
        height, width: in pixels, as a header claims them.
        planes: images of this size that are decoded together.
        max_pixels: limit of height x width x planes.

    Raises:
        ValueError: the size is not positive, or above the limit.
    """
    if min(height, width) < 1:
        raise ValueError(f"its header says {width} x {height} pixels")
    if height * width * planes > max_pixels:
        pages = f" on {planes} pages" if planes > 1 else ""
        raise ValueError(
            f"its header says {width} x {height} pixels{pages}, more than the limit of {max_pixels} (--max-pixels)"
        )


def check_tiff(tiff: tifffile.TiffFile, chosen: Sequence[tifffile.TiffPageSeries], max_pixels: int) -> None:
    """Refuse series of a TIFF that would unpack to more than any image of `max_pixels` has.

    Byte codecs (LZW, zstd, ...) get a buffer of the size of a strip or tile; zlib's and LZMA's streams are measured.
    Image codecs (JPEG, PNG, ...) believe the header that each strip or tile has of its own, so these are read first.

    Raises:
        ValueError: a size above the limit, or a strip or tile larger than the TIFF says.
    """
    packed = [series for series in chosen if series.dataoffset is None]
    for series in packed:
        check_size(series.keyframe.imagelength, series.keyframe.imagewidth, max_pixels=max_pixels)
    claimed, limit = sum(series.nbytes for series in packed), max_pixels * _PIXEL_BYTES
    if claimed > limit:
        raise ValueError(f"its header says {claimed} bytes, more than the limit of {limit} (--max-pixels)")
    for series in packed:
        page = series.keyframe
        if page.compression in _STREAMS:
            _check_streams(tiff, series)
        if page.compression not in _JPEG | _OTHER_IMAGES:
            continue
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        for piece in (page for page in series.pages if page is not None):
            for offset, length in zip(piece.dataoffsets, piece.databytecounts, strict=True):
                if not length:
                    continue
                tiff.filehandle.seek(offset)
                size = encoded_size(tiff.filehandle.read(min(length, _HEAD)))
                # An image codec may pad a piece.
                if size is not None and size[0] * size[1] > max(4 * rows * columns, _HARMLESS):
                    raise ValueError(
                        f"a piece of it of {length} bytes unpacks to {size[1]} x {size[0]} pixels, "
                        f"expected {columns} x {rows}"
                    )


def _check_streams(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    decompressor, ratio = _STREAMS[series.keyframe.compression]
    allowed = int(np.prod(series.keyframe.chunks)) * series.dtype.itemsize
    for page in (page for page in series.pages if page is not None):
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            if length * ratio > max(allowed, _HARMLESS_BYTES):
                tiff.filehandle.seek(offset)
                if len(decompressor().decompress(tiff.filehandle.read(length), allowed + 1)) > allowed:
                    raise ValueError(f"a piece of it of {length} bytes unpacks to more than its {allowed} bytes")


def encoded_size(head: bytes) -> tuple[int, int] | None:
    """The size that the header of an encoded image claims.

    Args:
        head: the first bytes of a PNG, JPEG, JPEG 2000, JPEG XL, JPEG XR, WebP or LERC image.

    Returns:
        (H, W), or None where it is not among these bytes.
    """
    try:
        if head.startswith(b"\x89PNG"):
            width, height = struct.unpack_from(">II", head, 16)
        elif head.startswith(b"\xff\xd8"):
            return _jpeg_size(head)
        elif (start := head.find(b"\xff\x4f\xff\x51")) >= 0:  # JPEG 2000, bare or in its boxes
            right, bottom, left, top = struct.unpack_from(">IIII", head, start + 8)
            width, height = right - left, bottom - top
        elif head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
            return _jpeg_xl_size(head)
        elif head.startswith(b"II\xbc"):
            return _jpeg_xr_size(head)
        elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return _webp_size(head)
        elif head.startswith(b"Lerc2 "):
            height, width = struct.unpack_from("<II", head, 14)
        else:
            return None
    except (struct.error, IndexError):
        return None
    return height, width


@contextmanager
def no_limit_of_pillow() -> Iterator[None]:
    """Pillow's limit on sizes is a constant of the process; ours is checked instead, on the header alone."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    place = 2
    while place + 9 <= len(head):
        marker = head[place + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without length
            place += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", head, place + 5)
            return height, width
        else:
            place += 2 + struct.unpack_from(">H", head, place + 2)[0]
    return None


def _jpeg_xl_size(head: bytes) -> tuple[int, int] | None:
    start = head.find(b"\xff\x0a", 0 if head.startswith(b"\xff\x0a") else 12)
    if start < 0:
        return None
    bits = int.from_bytes(head[start + 2 : start + 16], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    numerator, denominator = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return height, height * numerator // denominator if ratio else side()


def _jpeg_xr_size(head: bytes) -> tuple[int, int] | None:
    place = struct.unpack_from("<I", head, 4)[0]
    sides = {}
    for entry in range(struct.unpack_from("<H", head, place)[0]):
        tag, kind, _, value = struct.unpack_from("<HHII", head, place + 2 + 12 * entry)
        sides[tag] = value & (0xFFFF if kind == 3 else 0xFFFFFFFF)
    return (sides[0xBC81], sides[0xBC80]) if {0xBC80, 0xBC81} <= sides.keys() else None


def _webp_size(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", head, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", head, 26))
    return height, width

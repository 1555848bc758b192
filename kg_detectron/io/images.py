"""Reading and writing images. H, W: height and width in pixels; channels are BGR, as everywhere in this package."""

import io
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import tifffile

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, classic and BigTIFF
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)


def read_image(path: str | Path) -> np.ndarray:
    """Read a PNG, JPEG or TIFF file as a BGR image.

    Grey, RGB and palette images are read, with or without alpha, which is dropped. The content decides the format, not
    the file name's ending.

    Args:
        path: the file.

    Returns:
        (H, W, 3) BGR: uint8 for 8-bit and 1-bit files; float32 in 0..255 for 16-bit files (value / 257, so that
        an image and its 16-bit version x 257 are equal) and for float files (value x 255).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an image, corrupt, of several pages or channels that are not colours, or of a type or range
            that is not understood. The message names the file.
    """
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """:func:`read_image` for the content of a file that is in memory, such as a member of an archive.

    Args:
        data: the encoded file.
        name: what error messages call it.
    """
    try:
        image = _decode_tiff(data) if data.startswith(_TIFF_SIGNATURES) else _decode_other(data)
        return _to_8_bit_range(image)
    # Whatever a decoder makes of broken bytes (struct.error, IndexError, SyntaxError, ...), the user needs the file.
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


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


def _decode_other(data: bytes) -> np.ndarray:
    """PNG, JPEG and whatever else Pillow reads -> (H, W) or (H, W, 3) BGR."""
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] != b"\0":
        # Pillow cuts PNGs of 16 bits and several channels to 8 bits; OpenCV keeps them.
        return _decode_with_opencv(data)
    with iio.imopen(data, "r", plugin="pillow") as file:
        image = file.read()
        mode = file.metadata(exclude_applied=False)["mode"]
        frames = file.properties().n_images
    if frames is not None:
        raise ValueError(f"it holds {frames} frames, expected one image")
    if mode == "LA":
        return image[..., 0]
    if image.ndim == 2:
        return image
    if mode not in ("RGB", "RGBA", "P", "PA"):
        raise ValueError(f"its colours are {mode}, expected grey, RGB or a palette")
    return image[..., 2::-1]


def _decode_tiff(data: bytes) -> np.ndarray:
    """TIFF of one page -> (H, W) or (H, W, 3) BGR."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        if len(tiff.pages) == 0:
            raise ValueError("it is corrupt: it has no page")
        page = tiff.pages[0]
        # ImageJ writes large stacks as one page whose series is longer.
        if len(tiff.pages) > 1 or tiff.series[0].size != page.size:
            raise ValueError(f"it has axes {tiff.series[0].axes} of {tiff.series[0].shape}, expected one page")
        is_colour = page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        alphas = sum(sample in _ALPHA for sample in page.extrasamples)
        if page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel != alphas + (3 if is_colour else 1):
            raise ValueError(
                f"it has axes {page.axes} of {page.shape} and photometric interpretation {page.photometric.name}, "
                "expected grey, RGB or a palette"
            )
        # Without the package imagecodecs, tifffile lacks LZW and JPEG; OpenCV has them but multiplies by alpha.
        if page.compression not in tifffile.TIFF.DECOMPRESSORS and not alphas:
            return _decode_with_opencv(data)
        array = page.asarray()
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            # The 16-bit table holds 8-bit colours, as v * 256 or v * 257.
            return np.moveaxis(page.colormap[::-1, array] >> 8, 0, -1).astype(np.uint8)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            array = np.invert(array)
        if page.axes == "SYX":
            array = np.moveaxis(array, 0, -1)
        return array if array.ndim == 2 else array[..., 2::-1] if is_colour else array[..., 0]


def _decode_with_opencv(data: bytes) -> np.ndarray:
    """-> (H, W) or (H, W, 3) BGR, at the depth of the file."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("it is corrupt or of an unknown kind")
    return image if image.ndim == 2 else image[..., :3]


def _to_8_bit_range(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) of any type -> (H, W, 3), uint8 or float32 in 0..255."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif image.dtype == np.uint16:
        image = image.astype(np.float32) / 257
    elif image.dtype.kind == "f":
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(f"its values are in {low:g}..{high:g}, expected 0..1 for an image of type {image.dtype}")
        image = image.astype(np.float32) * 255
    elif image.dtype != np.uint8:
        raise ValueError(f"its values are of type {image.dtype}, expected 1, 8 or 16 bits unsigned, or float")
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)

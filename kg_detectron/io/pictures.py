"""Reading PNG, JPEG and the other formats of one plain picture."""

import io

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError

from kg_detectron.io.limits import check_size, encoded_size, no_limit_of_pillow
from kg_detectron.io.scene import Decoded, Scene, upright

# Of all that Pillow reads: one of them runs a program.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "JPEG2000")
_ORIENTATION = 274  # the EXIF tag
_PNG_16_BITS, _PNG_HAS_CHANNELS = 16, (2, 4, 6)  # of the header of a PNG: bit depth, colour types


def decode_picture(data: bytes, max_pixels: int, *, as_stored: bool = False) -> Decoded:
    """Read a picture.

    Args:
        data: the content of the file.
        max_pixels: limit of height x width.
        as_stored: numbers are kept: no palette is applied.

    Raises:
        Exception: whatever a decoder makes of broken bytes.
    """
    if not data:
        raise ValueError("it is empty")
    notes: tuple[str, ...] = ()
    with no_limit_of_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            raise ValueError(
                "it is corrupt, or no TIFF, PNG, JPEG, BMP, GIF or PPM image, nor WebP or JPEG 2000"
            ) from None
        with image:
            frames = getattr(image, "n_frames", 1)
            if image.format == "MPO":
                notes = (f"it holds {frames} pictures, of which the first was read",)
            elif frames != 1:
                raise ValueError(f"it holds {frames} frames, expected one image")
            check_size(image.height, image.width, max_pixels=max_pixels)
            if image.format == "PNG" and data[24] == _PNG_16_BITS and data[25] in _PNG_HAS_CHANNELS:
                pixels = imagecodecs.png_decode(data)  # Pillow cuts these to 8 bits
            elif image.format == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA"):  # these too
                if encoded_size(data) != (image.height, image.width):
                    raise ValueError("it is corrupt: its headers claim different sizes")
                pixels = imagecodecs.jpeg2k_decode(data)
            else:
                pixels = _pillow_pixels(image, as_stored)
            orientation = image.getexif().get(_ORIENTATION, 1)
            is_lossy = image.format in ("JPEG", "MPO", "WEBP", "JPEG2000")
    axes = "YXS" if pixels.shape[2] > 1 else "YX"
    shape = pixels.shape[: len(axes)]
    if pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]  # alpha
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    is_colour = pixels.shape[2] == 3
    scene = Scene(
        upright(pixels, orientation, 0), "", is_colour, axes, shape, orientation=orientation, is_lossy=is_lossy
    )
    return Decoded([scene], notes=notes)


def _pillow_pixels(image: Image.Image, as_stored: bool) -> np.ndarray:
    """(H, W, C) of 1 (grey), 2 (with alpha), 3 (RGB) or 4 channels."""
    if image.mode in ("P", "PA") and not as_stored:
        pixels = np.asarray(image.convert("RGB"))
    elif image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "F") or image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode == "I" and pixels.size and 0 <= pixels.min() and pixels.max() < 2**16:
            pixels = pixels.astype(np.uint16)  # Pillow's type for 16 bits in some formats
    else:
        raise ValueError(f"its colours are {image.mode}, expected grey, RGB or a palette")
    return pixels.reshape(*pixels.shape[:2], -1)

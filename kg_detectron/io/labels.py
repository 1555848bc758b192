"""Label images: a whole number a pixel, 0 background, 1..N the cells."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import ImageChoiceError, decode_file

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # JPEG does not keep numbers

_LARGE = 4096 * 4096  # pixels; larger images are written in tiles, which Fiji's own reader lacks (Bio-Formats has it)


def write_label_image(path: str | Path, labels: np.ndarray) -> None:
    """Write a label image as TIFF, compressed by zlib: whole or not at all, the same bytes for the same labels.

    Args:
        path: the file; an existing one is replaced.
        labels: (H,W) integers, or a memory-mapped array of them, which is written piece by piece.
    """
    options: dict[str, Any] = {"tile": (512, 512), "bigtiff": True} if labels.size > _LARGE else {}
    with replacing(path) as unfinished:
        tifffile.imwrite(
            unfinished, labels, photometric="minisblack", compression="zlib", metadata=None, software=False, **options
        )


def read_label_image(path: str | Path) -> np.ndarray:
    """Read a label image from TIFF (any codec), PNG or BMP.

    Orientation (TIFF, EXIF) is applied, as for images. The numbers of a palette image are its indices. Float images of
    whole numbers, and RGB images of three equal channels, are read as what they mean; alpha is dropped.

    Returns:
        (H, W) integers: of the type that is in the file, uint8 for 1 bit, uint32 or int64 for float numbers.

    Raises:
        OSError: the file is missing or cannot be opened.
        ValueError: no image, corrupt, too large, not of whole numbers, negative, or with channels or several pages. The
            message names the file.
    """
    try:
        decoded = decode_file(path)
    except ImageChoiceError as error:  # --axes and its like are for images
        raise ValueError(f"{error.plain}; expected one whole number a pixel in one image") from None
    pages = sum(int(np.prod(scene.pixels.shape[:-3])) for scene in decoded.scenes)
    scene = decoded.scenes[0]
    expected = f"{path}: expected one whole number a pixel"
    if pages != 1:
        raise ValueError(f"{expected} in one image, got {pages} pages of {scene.pixels.shape[-3:-1]}")
    channels = scene.pixels.shape[-1]
    labels = scene.pixels.reshape(scene.pixels.shape[-3:])
    if scene.is_lossy:
        raise ValueError(f"{expected}, got a JPEG, which does not keep numbers: save label images as TIFF or PNG")
    if channels > 1 and any((labels[..., 0] != labels[..., c]).any() for c in range(1, channels)):
        what = "colours" if scene.is_colour else f"{channels} channels"
        raise ValueError(f"{expected}, got {what}: save the numbers of the cells as a grey image of 16 bits")
    labels = labels[..., 0]
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    elif labels.dtype.kind == "f":
        labels = _whole_numbers(labels, expected)
    elif labels.dtype.kind not in "iu":
        raise ValueError(f"{expected}, got {labels.dtype} {labels.shape}")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"{path}: expected labels from 0, got {labels.min()}")
    return np.ascontiguousarray(labels, labels.dtype.newbyteorder("="))


def _whole_numbers(labels: np.ndarray, expected: str) -> np.ndarray:
    """Float numbers (H, W) as integers."""
    if not np.isfinite(labels).all() or (labels != np.rint(labels)).any() or np.abs(labels).max() >= 2**53:
        raise ValueError(f"{expected}, got {labels.dtype} with values that are no whole numbers")
    return labels.astype(np.int64 if labels.min() < 0 or labels.max() >= 2**32 else np.uint32)

"""Label images: a whole number a pixel, 0 background, 1..N the cells."""

from pathlib import Path

import cv2
import numpy as np
import tifffile

from .files import replacing

_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, classic and BigTIFF
_LARGE = 4096 * 4096  # pixels; larger images are written in tiles, which Fiji's own reader lacks (Bio-Formats has it)


def write_label_image(path: str | Path, labels: np.ndarray) -> None:
    """Write a label image as TIFF, compressed by zlib: whole or not at all, the same bytes for the same labels.

    Args:
        path: the file; an existing one is replaced.
        labels: (H,W) integers, or a memory-mapped array of them, which is written piece by piece.
    """
    options = {"tile": (512, 512), "bigtiff": True} if labels.size > _LARGE else {}
    with replacing(path) as unfinished:
        tifffile.imwrite(
            unfinished, labels, photometric="minisblack", compression="zlib", metadata=None, software=False, **options
        )


def read_label_image(path: str | Path) -> np.ndarray:
    """Read a label image from TIFF or PNG.

    Returns:
        (H,W) integers, of the type that is in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no image, corrupt, not of whole numbers, negative, or with channels or several pages. The message
            names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        if data.startswith(_TIFF_SIGNATURES):
            labels = tifffile.imread(path)
        else:
            labels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    # Whatever a decoder makes of broken bytes, the user needs the file.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a label image: {error}") from error
    if labels is None:
        raise ValueError(f"{path}: cannot be read as a label image: it is neither TIFF nor PNG, or corrupt")
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.size == 0:
        raise ValueError(f"{path}: expected one whole number a pixel, got {labels.dtype} {labels.shape}")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"{path}: expected labels from 0, got {labels.min()}")
    return labels

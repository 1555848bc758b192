"""Label images: a whole number a pixel, 0 background, 1..N the cells."""

import io
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import MAX_PIXELS, check_size, check_tiff, no_limit_of_pillow

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
        ValueError: no image, corrupt, too large, not of whole numbers, negative, or with channels or several pages. The
            message names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        if data.startswith(_TIFF_SIGNATURES):
            with tifffile.TiffFile(path, _multifile=False) as tiff:
                series = tiff.series[0]
                check_size(series.keyframe.imagelength, series.keyframe.imagewidth, len(series.pages))
                check_tiff(tiff, [series], MAX_PIXELS)
                labels = series.asarray()
        else:
            with no_limit_of_pillow(), Image.open(io.BytesIO(data), formats=("PNG",)) as header:
                check_size(header.height, header.width)
            labels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if labels is None or labels.size == 0:
            raise ValueError("it is neither TIFF nor PNG, or corrupt")
    # Whatever a decoder makes of broken bytes, the user needs the file.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a label image: {error}") from error
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected one whole number a pixel, got {labels.dtype} {labels.shape}")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise ValueError(f"{path}: expected labels from 0, got {labels.min()}")
    return labels

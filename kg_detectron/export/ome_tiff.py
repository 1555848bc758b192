"""Cells as label pyramids in OME-TIFF, for images of any size: BigTIFF, tiled, the coarser levels as SubIFDs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from kg_detectron.cells import label_dtype
from kg_detectron.cells.label_plane import LabelImage
from kg_detectron.export.label_images import TILE, label_stack, label_tiles, ome_options, pyramid_sizes
from kg_detectron.io.atomic import replacing

if TYPE_CHECKING:
    from kg_detectron.export.result import Result


def write(path: Path, result: "Result") -> None:
    """Write the label image of one image, see `write_pyramid`."""
    write_pyramid(path, [result.label_image], result.masks.size, "YX", result.pixel_size)


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the label images of all planes of a stack as one file with its axes, in the order of the results."""
    stack = label_stack(results, path.parent)
    write_pyramid(path, stack.pages, stack.shape, stack.axes, results[0].pixel_size)


def write_pyramid(
    path: Path,
    pages: Sequence[LabelImage],
    shape: Sequence[int],
    axes: str,
    pixel_size: float | None,
    z_spacing: float | None = None,
) -> None:
    """Write label images as one OME-TIFF, compressed by zlib: whole or not at all, the same bytes for the same labels.

    Every level has each second pixel of the one before along y and x, so ids stay ids. Tiles of 512 x 512 pixels are
    written one after the other, which bounds the memory.

    Args:
        path: the file; an existing one is replaced.
        pages: (H, W) integers each, as many as the axes before Y and X have places.
        shape: of all axes.
        axes: a letter for each, Y and X last.
        pixel_size, z_spacing: micrometres, along y and x, and between two planes along z.
    """
    dtype = np.dtype(label_dtype(max(int(page.max(initial=0)) for page in pages)))
    sizes = pyramid_sizes((shape[-2], shape[-1]))
    common: dict[str, Any] = {"dtype": dtype, "photometric": "minisblack", "compression": "zlib", "software": False}
    if pixel_size is not None:
        common["resolutionunit"] = "CENTIMETER"
    with replacing(path) as unfinished, tifffile.TiffWriter(unfinished, bigtiff=True, ome=True) as file:
        for level, size in enumerate(sizes):
            options = common.copy()
            if pixel_size is not None:
                options["resolution"] = (1e4 / (pixel_size * 2**level),) * 2
            if level == 0:
                of_ome = ome_options(path.name, axes, pixel_size, z_spacing)
                options |= {"subifds": len(sizes) - 1, "metadata": of_ome["metadata"]}
            else:
                options |= {"subfiletype": tifffile.FILETYPE.REDUCEDIMAGE}
            tiles = label_tiles(pages, dtype, 2**level)
            file.write(tiles, shape=(*shape[:-2], *size), tile=(TILE, TILE), **options)

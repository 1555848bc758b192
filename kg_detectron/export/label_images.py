"""Cells as label images in TIFF, readable by ImageJ, napari, QuPath and OME readers."""

import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from kg_detectron.cells.label_plane import LabelImage, LabelPlane
from kg_detectron.io.atomic import replacing

if TYPE_CHECKING:
    from kg_detectron.export.result import Result

TILE = 512  # side of the tiles of large label images, pixels

_SMALLEST = 256  # pixels of the longer side, from which no coarser level of a pyramid is made
_STRIPED = 2**31  # bytes up to which an image is written in strips. ImageJ reads no tiles, and no strips beyond.
_STRIP = 2**22  # bytes of a strip, before compression, of images that are written piece by piece
_CLASSIC = 2**32 - 2**26  # bytes that a TIFF holds whose offsets have 32 bits
_MAPPED = 2**28  # bytes from which the labels of a stack are kept in a file
_NAMESPACE = uuid.UUID("a8a7d1ce-3a2b-5f6a-8a53-5a4ac3a16c2f")


def write(path: Path, result: "Result") -> None:
    """Write the label image of one image, see `write_labels`."""
    write_labels(path, result.label_image, result.pixel_size)


def write_labels(path: str | Path, labels: LabelImage, pixel_size: float | None = None) -> None:
    """Write a label image, compressed by zlib: whole or not at all, the same bytes for the same labels.

    Below 2 GB it is written in strips, which ImageJ opens; above, in tiles of a BigTIFF. A pixel size stands in the
    resolution tags, where ImageJ reads it, and in OME-XML.

    Args:
        path: the file; an existing one is replaced.
        labels: (H, W) integers. Those of 2 GB and more are written tile by tile.
        pixel_size: micrometres.
    """
    options: dict[str, Any] = {}
    data: Any = labels
    if labels.nbytes >= _STRIPED:
        data = label_tiles([labels], labels.dtype)
        options = {"shape": labels.shape, "dtype": labels.dtype, "tile": (TILE, TILE), "bigtiff": True}
    elif isinstance(labels, LabelPlane):
        # Encoded here, for tifffile takes strips piece by piece only like this.
        rows = max(1, _STRIP // (labels.shape[1] * labels.dtype.itemsize))
        strips = (labels[y : y + rows] for y in range(0, labels.shape[0], rows))
        data = (zlib.compress(strip.astype(labels.dtype.newbyteorder("<")).tobytes()) for strip in strips)
        options = {"shape": labels.shape, "dtype": labels.dtype, "rowsperstrip": rows, "byteorder": "<"}
    if pixel_size is None:
        options["metadata"] = None
    else:
        options |= ome_options(Path(path).name, "YX", pixel_size)
    with replacing(path) as unfinished:
        tifffile.imwrite(unfinished, data, photometric="minisblack", compression="zlib", software=False, **options)


def label_tiles(pages: Iterable[LabelImage], dtype: np.dtype, step: int = 1) -> Iterator[np.ndarray]:
    """The tiles (TILE, TILE) of label images (H, W), page by page and row by row, as tifffile writes them.

    Args:
        pages: the images.
        dtype: of the tiles, which are 0 beyond the image.
        step: each such pixel is taken, along both axes.
    """
    for page in pages:
        height, width = page.shape
        for y in range(0, height, TILE * step):
            for x in range(0, width, TILE * step):
                part = page[y : y + TILE * step : step, x : x + TILE * step : step]
                tile = np.zeros((TILE, TILE), dtype)
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile


def pyramid_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The (h, w) of the levels of a pyramid for an image of a size (H, W): each half of the one before, rounded up."""
    sizes = [size]
    while max(sizes[-1]) > _SMALLEST:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


class LabelStack:
    """The label images of a stack, collected page by page and written as one TIFF with the axes of the stack.

    Args:
        shape: of the axes of planes, and the size of a page: (T, Z, H, W) for axes "TZYX".
        axes: their letters, Y and X last.
        scratch: a folder for a temporary file, which takes the labels of a large stack.
    """

    def __init__(self, shape: Sequence[int], axes: str, scratch: Path) -> None:
        if len(shape) != len(axes) or not axes.endswith("YX"):
            raise ValueError(f"axes: expected a letter for each of {tuple(shape)}, Y and X last, got {axes!r}")
        self.shape, self.axes = tuple(shape), axes
        height, width = self.shape[-2:]
        pages = int(np.prod(self.shape[:-2]))
        if pages * height * width * 4 < _MAPPED:
            self._planes = np.zeros((pages, height, width), np.uint32)
        else:
            with tempfile.TemporaryFile(dir=scratch) as file:
                self._planes = np.memmap(file, np.uint32, shape=(pages, height, width))
        self.pages: list[LabelImage] = list(self._planes)

    def add(self, page: int, labels: LabelImage) -> None:
        """Take the labels (H, W) of a page, counted from 0."""
        if isinstance(labels, LabelPlane):
            self.pages[page] = labels
        else:
            self._planes[page] = labels

    def write(self, path: Path, pixel_size: float | None = None, z_spacing: float | None = None) -> None:
        """Write the stack, compressed by zlib: whole or not at all.

        Stacks along Z, T or both are ImageJ hyperstacks as long as ImageJ can read them: ids up to 65,535, less than
        4 GB. Others are OME-TIFFs.

        Args:
            path: the file; an existing one is replaced.
            pixel_size, z_spacing: micrometres, along y and x, and between two planes along z.
        """
        highest = max(int(page.max(initial=0)) for page in self.pages)
        dtype = np.dtype(np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32)
        size = int(np.prod(self.shape)) * dtype.itemsize
        page_size = int(np.prod(self.shape[-2:])) * dtype.itemsize
        options: dict[str, Any]
        if dtype == np.uint16 and size < _CLASSIC and page_size < _STRIPED and self.axes in ("ZYX", "TYX", "TZYX"):
            metadata: dict[str, Any] = {"axes": self.axes, "min": 0.0, "max": float(max(highest, 1))}
            options = {"imagej": True, "metadata": metadata}
            if pixel_size is not None:
                metadata["unit"] = "um"
                metadata |= {"spacing": z_spacing} if z_spacing is not None else {}
                options["resolution"] = (1 / pixel_size, 1 / pixel_size)
        else:
            options = ome_options(path.name, self.axes, pixel_size, z_spacing) | {"bigtiff": size >= _CLASSIC}
            if page_size >= _STRIPED:
                options["tile"] = (TILE, TILE)
        data = label_tiles(self.pages, dtype) if "tile" in options else self._pages_as(dtype)
        with replacing(path) as unfinished:
            tifffile.imwrite(
                unfinished,
                data,
                shape=self.shape,
                dtype=dtype,
                photometric="minisblack",
                compression="zlib",
                software=False,
                **options,
            )

    def _pages_as(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        return (page[:, :].astype(dtype) for page in self.pages)


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the label images of all planes of a stack as one TIFF, in the order of the results.

    Raises:
        ValueError: planes of different sizes.
    """
    label_stack(results, path.parent).write(path, results[0].pixel_size)


def label_stack(results: Sequence["Result"], scratch: Path) -> LabelStack:
    """The label images of all planes of a stack, in the order of the results.

    Raises:
        ValueError: planes of different sizes.
    """
    sizes = {result.masks.size for result in results}
    if len(sizes) != 1:
        raise ValueError(f"planes of {len(sizes)} sizes make no stack")
    shape, axes = stack_shape([result.position for result in results], sizes.pop())
    stack = LabelStack(shape, axes, results[0].scratch or scratch)
    for page, result in enumerate(results):
        stack.add(page, result.label_image)
    return stack


def stack_shape(positions: Sequence[Mapping[str, int]], size: tuple[int, int]) -> tuple[tuple[int, ...], str]:
    """The shape and axes of a stack by the positions of its planes, each of `size` (H, W).

    An axis that is neither T nor Z, which readers do not know, is called Z or T. One axis Z has a stack whose planes
    fill no grid, or one with more axes.
    """
    axes = "".join(positions[0])
    shape = tuple(1 + max(position.get(axis, 0) for position in positions) for axis in axes)
    for letter in axes:
        if letter not in "TZ":
            axes = axes.replace(letter, next((free for free in "ZT" if free not in axes), letter))
    if int(np.prod(shape)) != len(positions) or not set(axes) <= set("TZ"):
        axes, shape = "Z", (len(positions),)
    return (*shape, *size), f"{axes}YX"


def ome_options(name: str, axes: str, pixel_size: float | None, z_spacing: float | None = None) -> dict[str, Any]:
    """Options of tifffile for an OME-TIFF whose bytes depend on nothing but its name and content."""
    metadata: dict[str, Any] = {"axes": axes, "UUID": str(uuid.uuid5(_NAMESPACE, name))}
    options: dict[str, Any] = {"ome": True, "metadata": metadata}
    for axis, size in zip("XYZ", (pixel_size, pixel_size, z_spacing), strict=True):
        if size is not None:
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm"}
    if pixel_size is not None:
        options |= {"resolution": (1e4 / pixel_size, 1e4 / pixel_size), "resolutionunit": "CENTIMETER"}
    return options

"""Cells as ImageJ regions of interest, a zip file that Fiji's ROI Manager opens."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from roifile import ROI_TYPE, ImagejRoi

from kg_detectron.io.atomic import replacing

if TYPE_CHECKING:
    from kg_detectron.export.result import Result

_MAX_SIDE = 60535  # the largest coordinate of the format, whose 16 bits begin at -5000
_MOVE_TO, _LINE_TO, _CLOSE = 0, 1, 4  # of a path of ImageJ's composite region
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's first date: the same bytes whenever they are written


def write(path: Path, result: "Result") -> None:
    """Write one region a cell, named by its id 1..R: a new file, whole or not at all.

    A cell without holes is a traced polygon through the corners of its pixels, one with holes a composite region, which
    keeps them. Its colour is that of the overlay. In a stack it carries its position, so that ImageJ shows and measures
    it on its own slice.

    Raises:
        ValueError: for a cell beyond 60,535 pixels from the image's origin, which the format cannot hold.
    """
    _write(path, [result], names="{id}")


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the regions of all planes of a stack to one zip, named ``page-id``."""
    _write(path, results, names="{page:04d}-{id}")


def _write(path: Path, results: Sequence["Result"], names: str) -> None:
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for result in results:
            for id, (rings, colour) in enumerate(zip(result.outlines, result.colours, strict=True), start=1):
                name = names.format(page=result.page, id=id)
                roi = _roi(name, rings)
                roi.stroke_color = bytes((255, *colour.tolist()))
                _set_position(roi, result)
                entry = zipfile.ZipInfo(f"{name}.roi", date_time=_EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, roi.tobytes())


def _set_position(roi: ImagejRoi, result: "Result") -> None:
    """ImageJ counts from 1; 0 is no position. In a stack of one axis the position is the slice."""
    if not result.page:
        return
    roi.z_position, roi.t_position = (result.position.get(axis, -1) + 1 for axis in "ZT")
    if len(result.position) < 2:
        roi.position = result.page


def _roi(name: str, rings: Sequence[np.ndarray]) -> ImagejRoi:
    if max(ring.max() for ring in rings) > _MAX_SIDE:
        raise ValueError(f"cell {name}: an ImageJ region ends at {_MAX_SIDE} pixels, this one at {rings[0].max()}")
    roi = ImagejRoi.frompoints(rings[0].astype(np.int32), name=name)
    roi.roitype = ROI_TYPE.TRACED
    roi.right, roi.bottom = rings[0].max(axis=0).tolist()  # corners, not pixels: the box ends at the last one
    if len(rings) > 1:
        path: list[float] = []
        for ring in rings:
            path += (_MOVE_TO, *ring[0])
            for point in ring[1:]:
                path += (_LINE_TO, *point)
            path.append(_CLOSE)
        roi.roitype = ROI_TYPE.RECT
        roi.integer_coordinates, roi.n_coordinates = None, 0
        roi.multi_coordinates = np.array(path, np.float32)
        roi.shape_roi_size = len(path)
    return roi

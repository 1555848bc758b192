"""Cells as ImageJ regions of interest, a zip file that Fiji's ROI Manager opens."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from roifile import ROI_TYPE, ImagejRoi

from kg_detectron.io.atomic import replacing

_MAX_SIDE = 60535  # the largest coordinate of the format, whose 16 bits begin at -5000
_MOVE_TO, _LINE_TO, _CLOSE = 0, 1, 4  # of a path of ImageJ's composite region
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's first date: the same bytes whenever they are written


def write_rois(path: str | Path, outlines: Sequence[Sequence[np.ndarray]]) -> None:
    """Write one region a cell, named by its id 1..N: a new file, whole or not at all.

    A cell without holes is a traced polygon through the corners of its pixels, one with holes a composite region, which
    keeps them.

    Args:
        path: the file; an existing one is replaced, never appended to.
        outlines: of each cell its rings (K,2), the outer one first (`outline.outlines`).
    Raises:
        ValueError: for a cell beyond 60,535 pixels from the image's origin, which the format cannot hold.
    """
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for id, rings in enumerate(outlines, start=1):
            name = zipfile.ZipInfo(f"{id}.roi", date_time=_EPOCH)
            name.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(name, _roi(str(id), rings).tobytes())


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

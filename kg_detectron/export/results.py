"""All files of one result, with the same ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kg_detectron.cells import Cells
from kg_detectron.export.kinds import EXPORTERS, KINDS, result_files
from kg_detectron.export.result import Result

__all__ = ["KINDS", "Result", "result_files", "save_results", "write_results"]


def save_results(
    cells: Cells,
    image: np.ndarray,
    folder: str | Path,
    stem: str,
    kinds: Sequence[str] = ("labels", "overlay", "csv"),
    *,
    pixel_size: float | None = None,
    source: str = "",
    channels: np.ndarray | None = None,
    channel_names: Sequence[str] = (),
    page: int = 0,
    position: Mapping[str, int] | None = None,
    category_names: Sequence[str] = ("cell",),
    category_colours: Sequence[tuple[int, int, int]] = (),
) -> dict[str, Path]:
    """Write the cells of one image in several formats. A cell has the same id in all, 1..R in the order given.

    Each file appears whole or not at all, replaces an older one, and has the same bytes for the same input.

    - ``labels``, ``<stem>_labels.tif``: label image, uint16 up to 65,535 cells and uint32 above, with the pixel size
      for ImageJ and OME readers.
    - ``overlay``, ``<stem>_overlay.png``: the outlines over the image.
    - ``coco``, ``<stem>_coco.json``: a COCO dataset of one image; bbox is the network's box, segmentation the mask.
    - ``geojson``, ``<stem>.geojson``: polygons for QuPath, with class, measurements and plane.
    - ``roi``, ``<stem>_rois.zip``: regions for ImageJ's ROI Manager, with colour and position.
    - ``csv``, ``<stem>_cells.csv``: measurements (`measurements.measure`), and the class where there are several.
    - ``classes``, ``<stem>_classes.csv``: the class of each cell of the label image.
    - ``ome-tiff``, ``<stem>_labels.ome.tif``, and ``zarr``, ``<stem>_labels.ome.zarr``: the label image as a pyramid.

    Args:
        cells: as `separate_cells` returns them: no pixel in two cells, each cell one piece. For ``coco`` and ``csv``
            they may overlap.
        image: (H, W), (H, W, 3) BGR or (H, W, C), of the masks' size, at its own depth.
        folder: made where absent.
        stem: what the files' names begin with.
        kinds: some of `EXPORTERS`.
        pixel_size: micrometres a pixel.
        source: the image's file name, by default `stem`.
        channels: (H, W, C), the channels to measure; by default those of `image`.
        channel_names: of `channels`, for the columns of the measurements.
        page: number of the image in a stack, from 1; 0 where it is none.
        position: of the image in its stack, by the letter of the axis, from 0, such as ``{"T": 4}``.
        category_names: of the labels 1, 2, ..., such as ``model.classes.names``.
        category_colours: of the same, such as ``model.classes.shown_colours()``.

    Returns:
        The files by kind.

    Raises:
        ValueError: for an unknown kind, a pixel size that is not above 0, an image of another size, and cells that
            overlap or are in pieces.
    """
    result_files(Path(folder), stem, kinds)
    result = Result(
        cells,
        image,
        source or stem,
        pixel_size,
        channels,
        tuple(channel_names),
        page,
        position or {},
        tuple(category_names),
        tuple(category_colours),
    )
    return write_results(result, folder, stem, kinds)


def write_results(result: Result, folder: str | Path, stem: str, kinds: Sequence[str]) -> dict[str, Path]:
    """`save_results` of a result that is put together already."""
    paths = result_files(Path(folder), stem, kinds)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        EXPORTERS[kind].write(path, result)
    return paths

"""Microscopes' own formats, by the readers of the package bioio where they are installed."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from kg_detectron.io.limits import check_size
from kg_detectron.io.ome_zarr import EXTRA as EXTRA_OF_ZARR
from kg_detectron.io.ome_zarr import ZARR, is_zarr_installed
from kg_detectron.io.scene import Decoded, Scene, pick_scene

# Endings, and the packages whose readers open them. OME-Zarr has a reader of ours, in `ome_zarr`.
READERS = {".czi": "bioio_czi", ".nd2": "bioio_nd2", ".lif": "bioio_lif"}
EXTRA = 'pip install "kg_detectron[formats]"'

# Endings of formats that nothing here reads, and what a user can do.
_UNREAD = {
    **dict.fromkeys((".oir", ".oib", ".oif", ".vsi"), "an Olympus file"),
    **dict.fromkeys((".ims",), "an Imaris file"),
    ".n5": "an N5 folder",
    **dict.fromkeys((".dcm", ".dicom"), "a DICOM file"),
    **dict.fromkeys((".dv", ".r3d"), "a DeltaVision file"),
    **dict.fromkeys((".lsm5", ".zvi"), "an old Zeiss file"),
    **dict.fromkeys((".xlif", ".lof"), "a part of a Leica project"),
}


def is_installed(ending: str) -> bool:
    """Whether the reader of a microscope's format, or of OME-Zarr, is installed; False for all other endings."""
    if ending.lower() == ZARR:
        return is_zarr_installed()
    name = READERS.get(ending.lower())
    return name is not None and all(importlib.util.find_spec(part) is not None for part in ("bioio", name))


def advice(ending: str) -> str | None:
    """How a file of an ending that cannot be read can be read after all, as a sentence without end; None if unknown."""
    ending = ending.lower()
    if ending in READERS and not is_installed(ending):
        return f"{ending} files need a reader that is not installed: {EXTRA}"
    if ending == ZARR and not is_installed(ending):
        return f"{ending} folders need a reader that is not installed: {EXTRA_OF_ZARR}"
    if ending in _UNREAD:
        return f"{_UNREAD[ending]} cannot be read: save it as OME-TIFF, in Fiji by File > Save As > OME-TIFF"
    return None


def decode_microscope(path: Path, scene: int | str | None, max_pixels: int) -> Decoded:
    """Read a microscope's file.

    Args:
        path: the file, whose ending is one of `READERS`.
        scene: number from 1, or name; None takes all.
        max_pixels: limit of height x width x planes.

    Raises:
        ImageChoiceError: there is no such scene.
        ValueError: the reader is not installed.
        Exception: whatever the reader makes of broken bytes.
    """
    ending = path.suffix.lower()
    if not is_installed(ending):
        raise ValueError(advice(ending))
    reader = importlib.import_module(READERS[ending]).Reader
    image = importlib.import_module("bioio").BioImage(path, reader=reader)
    names = [str(name) for name in image.scenes]
    chosen = range(len(names)) if scene is None else [pick_scene(names, scene)]
    scenes = []
    for index in chosen:
        image.set_scene(image.scenes[index])
        scenes.append(_scene(image, names[index], max_pixels))
    return Decoded(scenes, is_one_of_several=len(names) > 1)


def _scene(image: Any, name: str, max_pixels: int) -> Scene:
    dims = image.dims
    is_colour = "S" in dims.order
    check_size(dims.Y, dims.X, dims.T * dims.Z, max_pixels)
    order = "TZYXCS" if is_colour else "TZYXC"
    pixels = np.asarray(image.get_image_data(order))
    if is_colour:  # the samples of the first channel
        pixels = pixels[..., 0, :3]
    sizes = image.physical_pixel_sizes
    size = float(sizes.X) if sizes.X and sizes.Y and abs(sizes.X - sizes.Y) <= 0.01 * sizes.X else None
    names = tuple(str(channel) for channel in image.channel_names or ())
    return Scene(
        pixels,
        "TZ",
        is_colour,
        str(dims.order),
        tuple(dims.shape),
        name,
        names if not is_colour and len(names) == pixels.shape[-1] else None,
        size,
        "bioio" if size else None,
        z_spacing=float(sizes.Z) if sizes.Z else None,
    )

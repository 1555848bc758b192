"""Cells as label images in OME-Zarr, as multiscale pyramids: NGFF 0.4, and 0.5 in images of that version."""

import importlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kg_detectron.cells.label_plane import LabelImage
from kg_detectron.export.label_images import pyramid_sizes, stack_shape
from kg_detectron.io.atomic import replacing
from kg_detectron.io.ome_zarr import EXTRA, Axis, axes_of, is_zarr_installed, ngff_version

if TYPE_CHECKING:
    from kg_detectron.export.result import Result

_CHUNK = 1024  # pixels a side
_BLOCK = 4096  # pixels a side that are worked on at a time, which bounds the memory; a multiple of the chunk
_TYPES = {"T": "time"}  # of axes; others are of space
_LABELS = "labels"  # the group of an image that lists its label images


def write(path: Path, result: "Result") -> None:
    """Write the label image of one image: a store of its own, whole or not at all."""
    write_label_group(path, [result.label_image], result.masks.size, "YX", result.pixel_size)


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the label images of all planes of a stack as one store with its axes, in the order of the results."""
    shape, axes = stack_shape([result.position for result in results], results[0].masks.size)
    write_label_group(path, (result.label_image for result in results), shape, axes, results[0].pixel_size)


def write_into(
    image: Path,
    name: str,
    pages: Iterable[LabelImage],
    shape: Sequence[int],
    axes: str,
    pixel_size: float | None,
) -> Path:
    """Write a label image into the group ``labels`` of an OME-Zarr image, in its version, and list it there.

    Args:
        image: folder of the image.
        name: of the label image; an older one of that name is replaced.
        pages, shape, axes, pixel_size: see `write_label_group`. What the image says of its own axes counts for more
            than the pixel size, so that the labels lie on it.

    Returns:
        The folder of the label image.
    """
    version = ngff_version(image)
    zarr, zarr_format = _zarr(), 3 if version == "0.5" else 2
    labels = image / _LABELS
    group = zarr.open_group(str(labels), mode="a", zarr_format=zarr_format)
    of_image = axes_of(image)
    placed = {axis: of_image[axis] for axis in axes if axis in of_image}
    write_label_group(labels / name, pages, shape, axes, pixel_size, version=version, source="../../", placed=placed)
    listed = dict(group.attrs)
    about = listed.setdefault("ome", {"version": version}) if version == "0.5" else listed
    about["labels"] = sorted({*about.get("labels", ()), name})
    group.attrs.update(listed)
    return labels / name


def write_label_group(
    path: Path,
    pages: Iterable[LabelImage],
    shape: Sequence[int],
    axes: str,
    pixel_size: float | None,
    z_spacing: float | None = None,
    *,
    version: str = "0.4",
    source: str | None = None,
    placed: Mapping[str, Axis] | None = None,
) -> None:
    """Write label images as one multiscale group: whole or not at all.

    Every level has each second pixel of the one before along y and x, so ids stay ids.

    Args:
        path: folder of the group; an existing one is replaced.
        pages: (H, W) integers each, as many as the axes before Y and X have places.
        shape: of all axes.
        axes: a letter for each, Y and X last.
        pixel_size, z_spacing: micrometres, along y and x, and between two planes along z.
        version: of NGFF, "0.4" (Zarr 2) or "0.5" (Zarr 3).
        source: path from the group to the image that it labels.
        placed: axes of that image, by their letters: their units, and where it lies along them.

    Raises:
        ValueError: the package zarr is not installed.
    """
    zarr = _zarr()
    with replacing(path) as unfinished:
        shutil.rmtree(unfinished, ignore_errors=True)
        zarr_format = 3 if version == "0.5" else 2
        group = zarr.create_group(str(unfinished), zarr_format=zarr_format, overwrite=True)
        levels = [
            group.create_array(
                str(number),
                shape=(*shape[:-2], *side),
                chunks=(*(1 for _ in shape[:-2]), min(_CHUNK, side[0]), min(_CHUNK, side[1])),
                dtype="uint32",
                chunk_key_encoding={"name": "default" if zarr_format == 3 else "v2", "separator": "/"},
                dimension_names=tuple(axes.lower()) if zarr_format == 3 else None,
                fill_value=0,
            )
            for number, side in enumerate(pyramid_sizes((shape[-2], shape[-1])))
        ]
        for place, page in zip(np.ndindex(*shape[:-2]), pages, strict=True):
            for number, level in enumerate(levels):
                step = 2**number
                height, width = level.shape[-2:]
                for y in range(0, height, _BLOCK):
                    for x in range(0, width, _BLOCK):
                        bottom, right = min(y + _BLOCK, height), min(x + _BLOCK, width)
                        rows, columns = (
                            slice(a * step, (b - 1) * step + 1, step) for a, b in ((y, bottom), (x, right))
                        )
                        where = (*place, slice(y, bottom), slice(x, right))
                        level[where] = page[rows, columns]
        known = _axes(axes, pixel_size, z_spacing)
        for axis, of_image in (placed or {}).items():
            known[axis] = of_image._replace(about={"type": known[axis].about["type"], **of_image.about})
        group.attrs.update(_metadata(list(known.values()), len(levels), version, source))
        if path.is_dir():
            shutil.rmtree(path)


def _axes(axes: str, pixel_size: float | None, z_spacing: float | None) -> dict[str, Axis]:
    """Axes, Y, X and Z with the size of a pixel and the distance of planes in micrometres, by their letters."""
    known = {axis: Axis({"name": axis.lower(), "type": _TYPES.get(axis, "space")}, 1.0, 0.0) for axis in axes}
    for axis, size in zip("YXZ", (pixel_size, pixel_size, z_spacing), strict=True):
        if axis in known and size is not None:
            known[axis] = Axis({**known[axis].about, "unit": "micrometer"}, size, 0.0)
    return known


def _metadata(axes: Sequence[Axis], levels: int, version: str, source: str | None) -> dict[str, Any]:
    named = [axis.about for axis in axes]
    translation = [{"type": "translation", "translation": [axis.translation for axis in axes]}]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [a.scale for a in axes[:-2]] + [a.scale * 2**level for a in axes[-2:]]},
                *(translation if any(axis.translation for axis in axes) else ()),
            ],
        }
        for level in range(levels)
    ]
    of_version = {"version": version} if version == "0.4" else {}
    label: dict[str, Any] = dict(of_version)
    if source is not None:
        label["source"] = {"image": source}
    content: dict[str, Any] = {"multiscales": [{**of_version, "name": "cells", "axes": named, "datasets": datasets}]}
    content |= {"image-label": label}
    return content if version == "0.4" else {"ome": {"version": version, **content}}


def _zarr() -> Any:
    if not is_zarr_installed():
        raise ValueError(f"OME-Zarr needs a package that is not installed: {EXTRA}")
    return importlib.import_module("zarr")

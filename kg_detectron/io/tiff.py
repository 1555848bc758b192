"""Reading TIFF files of any kind: plain, ImageJ, OME, slides, microscopes' own. C: channels."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from kg_detectron.io.limits import check_size, check_tiff
from kg_detectron.io.metadata import SceneMetadata, tiff_metadata
from kg_detectron.io.scene import Decoded, ImageChoiceError, Scene, pick_scene, upright

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, classic and BigTIFF

_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_COLOURS = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.PALETTE)
_OTHER_COLOURS: dict[int, str] = {
    tifffile.PHOTOMETRIC.SEPARATED: "CMYK",
    tifffile.PHOTOMETRIC.CIELAB: "CIELAB",
    tifffile.PHOTOMETRIC.ICCLAB: "ICCLAB",
    tifffile.PHOTOMETRIC.ITULAB: "ITULAB",
    tifffile.PHOTOMETRIC.LOGL: "LogL",
    tifffile.PHOTOMETRIC.LOGLUV: "LogLuv",
    tifffile.PHOTOMETRIC.CFA: "a colour filter array",
}
_LOSSY = {6, 7, 33003, 33004, 33005, 33007, 34892}  # JPEG, and JPEG 2000 of slides
_AS_RGB = {6, 7, 33007, 34892, 34712, 50001, 50002, 52546, 22610, 34934, 34933}  # decoded to RGB where it was YCbCr
_ASSOCIATED = re.compile(r"\b(label|macro|thumbnail|map|overview|preview|probability)\b", re.IGNORECASE)
_REDUCED, _MASK = 1, 4  # of the tag NewSubfileType
_SMALL = 1 / 8  # of the pixels of the largest scene, below which one without pyramid is no scene of a slide


def decode_tiff(
    source: Path | bytes,
    axes: str | None,
    scene: int | str | None,
    max_pixels: int,
    *,
    map_from: int,
    as_stored: bool = False,
) -> Decoded:
    """Read the scenes of a TIFF.

    Args:
        source: the file, or its content.
        axes: axis order of stacks, instead of the file's.
        scene: number from 1, or name; None takes all but labels, macro images and thumbnails.
        max_pixels: limit of height x width (of compressed stacks: x planes).
        map_from: bytes from which an uncompressed scene is mapped into memory instead of read.
        as_stored: numbers are kept: no palette is applied, and white that is 0 is not inverted.

    Raises:
        ImageChoiceError: the axes or the scene must be chosen.
        Exception: whatever a decoder makes of broken bytes.
    """
    # Of several files that belong together only the one that was named is read: the names of the others come from
    # its metadata, and may lead anywhere.
    with tifffile.TiffFile(source if isinstance(source, Path) else io.BytesIO(source), _multifile=False) as tiff:
        if b"<!ENTITY" in tiff.pages.first.description.encode(errors="replace"):
            raise ValueError("its metadata defines XML entities")
        if not tiff.series:
            raise ValueError("it has no page")
        levels = [max(series.levels, key=lambda level: level.size) for series in tiff.series]
        metadata = tiff_metadata(tiff)
        names = [about.name.strip() or str(number) for number, about in enumerate(metadata, 1)]
        notes: tuple[str, ...] = ()
        if scene is not None:
            chosen = [pick_scene(names, scene)]
        else:
            chosen, notes = _real_scenes(tiff, levels, names)
        check_tiff(tiff, [levels[index] for index in chosen], max_pixels)
        scenes = [
            _read_scene(tiff, levels[index], metadata[index], names[index], axes, max_pixels, map_from, as_stored)
            for index in chosen
        ]
        if tiff.is_ome and len(set(re.findall(r'FileName="([^"]+)"', tiff.ome_metadata or ""))) > 1:
            notes += ("it belongs to a set of several files, of which this one alone was read",)
    return Decoded(scenes, is_one_of_several=len(chosen) > 1 or scene is not None, notes=notes)


def _real_scenes(
    tiff: tifffile.TiffFile, levels: Sequence[tifffile.TiffPageSeries], names: Sequence[str]
) -> tuple[list[int], tuple[str, ...]]:
    """The indices of the scenes without the label, macro image and thumbnails of a slide, and what was left out."""
    is_pyramid = [series.is_pyramidal for series in tiff.series]
    sizes = [level.keyframe.imagelength * level.keyframe.imagewidth for level in levels]
    largest = max(sizes)
    left_out: dict[int, str] = {}
    for index, level in enumerate(levels):
        name = names[index]
        subfile = level.keyframe.subfiletype
        if _ASSOCIATED.search(name) and not (tiff.is_imagej or tiff.is_shaped):
            left_out[index] = f"{name}"
        elif subfile & _MASK:
            left_out[index] = "a transparency mask"
        elif subfile & _REDUCED and sizes[index] < largest:
            left_out[index] = "a thumbnail"
        elif any(is_pyramid) and not is_pyramid[index] and (not tiff.is_ome or sizes[index] < _SMALL * largest):
            left_out[index] = "it seems to be the label, macro image or thumbnail of the slide"
    chosen = [index for index in range(len(levels)) if index not in left_out]
    if not chosen:
        return list(range(len(levels))), ()
    notes = []
    for index, why in left_out.items():
        page = levels[index].keyframe
        notes.append(
            f"scene {index + 1} of {page.imagewidth} x {page.imagelength} pixels was left out ({why}); "
            f"--scene {index + 1} reads it"
        )
    return chosen, tuple(notes)


def _read_scene(
    tiff: tifffile.TiffFile,
    series: tifffile.TiffPageSeries,
    about: SceneMetadata,
    name: str,
    axes: str | None,
    max_pixels: int,
    map_from: int,
    as_stored: bool,
) -> Scene:
    page = series.keyframe
    if page.photometric in _OTHER_COLOURS and not as_stored:
        raise ValueError(f"its colours are {_OTHER_COLOURS[page.photometric]}, expected grey, RGB or a palette")
    order = _axis_order(series, axes)
    size = dict(zip(order, series.shape, strict=True))
    mapped = series.dataoffset is not None and not series.is_multifile
    planes = 1 if mapped else int(np.prod([n for axis, n in size.items() if axis not in "YXSC"]))
    check_size(size["Y"], size["X"], planes, max_pixels)

    on_disk = mapped and tiff.filehandle.is_file and series.nbytes >= map_from
    array = series.asarray(out="memmap" if on_disk else None)
    if array.size == 0 or array.shape != series.shape:
        raise ValueError(f"it is corrupt: it has {array.shape} values, its header says {series.shape}")
    notes = [about.note] if about.note else []
    if not as_stored:
        array, order, note = _levels(page, array, order, tiff.is_imagej)
        notes += [note] if note else []

    channel = order[-1] if order[-1] in "SC" else next((axis for axis in order if axis in "SC"), "")
    lead = "".join(axis for axis in order if axis not in ("Y", "X", channel))
    array = array.transpose([order.index(axis) for axis in (*lead, "Y", "X", *channel)])
    if not channel:
        array = array[..., None]
    alphas = sum(sample in _ALPHA for sample in page.extrasamples)
    if channel == "S" and 0 < alphas < array.shape[-1]:
        array = array[..., :-alphas]
    is_colour = channel == "S" and page.photometric in _COLOURS and array.shape[-1] >= 3
    if is_colour and page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression not in _AS_RGB:
        array = _ycbcr_to_rgb(array)
    orientation = page.tags.valueof(274, 1)
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    return Scene(
        upright(array, orientation, len(lead)),
        lead,
        is_colour,
        series.axes,
        series.shape,
        name,
        about.channel_names if not is_colour else None,
        about.pixel_size,
        about.source,
        orientation,
        page.compression in _LOSSY,
        tuple(notes),
        about.z_spacing,
    )


def _levels(page: tifffile.TiffPage, array: np.ndarray, order: str, is_imagej: bool) -> tuple[np.ndarray, str, str]:
    """Stored numbers -> levels and their axis order, with a note where something was assumed."""
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
        # The 16-bit table holds 8-bit colours, as v * 256 or v * 257.
        table = page.colormap >> 8
        if is_imagej and (np.diff(table.astype(int).sum(axis=0)) >= 0).all():
            return array, order, "its colours are a lookup table of ImageJ: its levels were read as grey"
        if "C" in order:
            return array, order, "its channels have lookup tables of colours: their levels were read as grey"
        return np.moveaxis(table[:, array], 0, -1).astype(np.uint8), order + "S", ""
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
        if array.dtype == bool:
            return ~array, order, ""
        white = 2**page.bitspersample - 1 if isinstance(page.bitspersample, int) else np.iinfo(array.dtype).max
        return (np.array(white, array.dtype) - array).astype(array.dtype, copy=False), order, ""
    return array, order, ""


def _ycbcr_to_rgb(array: np.ndarray) -> np.ndarray:
    """(..., 3) luma and chroma of JPEG's full range, 8 bits -> RGB."""
    if array.dtype != np.uint8:
        raise ValueError(f"its colours are YCbCr of type {array.dtype}, expected 8 bits")
    y, cb, cr = np.moveaxis(array[..., :3].astype(np.float32), -1, 0)
    cb, cr = cb - 128, cr - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    return np.rint(rgb).clip(0, 255).astype(np.uint8)


def _axis_order(series: tifffile.TiffPageSeries, axes: str | None) -> str:
    """The axis order of a series, a letter an axis: the file's, or the caller's for a stack."""
    declared, shape = series.axes, series.shape
    is_stack = any(axis not in "YXS" for axis in declared)
    if is_stack and axes is not None:
        if len(axes) != len(shape) or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
            raise ImageChoiceError(
                f"it has axes {declared} of {shape}, which --axes {axes} does not fit: "
                f"expected {len(shape)} letters, Y and X once",
                _axes_advice(shape),
                "--axes",
            )
        return axes
    # Axes of one value say nothing, and do not matter.
    long = "".join(axis for axis, length in zip(declared, shape, strict=True) if length > 1 or axis in "YX")
    if not {"Y", "X"} <= set(declared) or len(set(long)) != len(long) or "Q" in long:
        raise ImageChoiceError(
            f"it has {len(shape)} axes of lengths {shape}, an ambiguous order, for it does not say which is which",
            _axes_advice(shape),
            "--axes",
        )
    if {"C", "S"} <= set(long):
        raise ImageChoiceError(
            f"it has axes {declared} of {shape}: channels of {shape[declared.index('S')]} samples each",
            f"use --axes {declared.replace('C', next(letter for letter in 'ZTPA' if letter not in declared))} "
            "to take each channel as an image",
            "--axes",
        )
    return _distinct(declared, long)


def _distinct(declared: str, long: str) -> str:
    """The axes with letters of their own for those of one value, which may repeat others."""
    spare = iter(letter for letter in "ABDEFGHJKLMNOPRUVW" if letter not in declared)
    used: set[str] = set()
    order = ""
    for axis in declared:
        repeats = axis in used or axis == "Q" or (axis in "SC" and axis not in long and {"S", "C"} <= set(declared))
        order += next(spare) if repeats else axis
        used.add(axis)
    return order


def _axes_advice(shape: tuple[int, ...]) -> str:
    """What to type for a stack of a shape whose axes are not known."""
    lead = len(shape) - 2
    if lead < 1:
        return "use --axes YX"
    planes = "PTZ"[-lead:] if lead <= 3 else "ABDEFGHJKPTZ"[-lead:]
    if shape[-1] <= 4 < shape[-2]:  # channels behind
        outer = planes[1:] if lead > 1 else ""
        return (
            f"use --axes {outer}YXC --channels 1 if the last {shape[-1]} are channels, "
            f"--axes {outer}YX{planes[0]} if they are planes, each an image of its own"
        )
    channels = f"{planes[:-1]}CYX"
    return (
        f"use --axes {planes}YX if the {shape[-3]} are planes, each an image of its own, "
        f"--axes {channels} --channels 1 if they are channels"
    )

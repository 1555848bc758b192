"""OME-Zarr of NGFF 0.4 and 0.5: images and plates, by the package zarr.

A Zarr array names the codecs that decode it, and some of those run code that lies in the data. So the metadata are
read as JSON first, and only arrays of numbers with codecs of a short list are opened.

H, W: height and width in pixels; C: channels.
"""

import importlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kg_detectron.io.lazy import LazyStack, PlaneSource
from kg_detectron.io.limits import check_size
from kg_detectron.io.metadata import SceneMetadata, micrometres, scene_metadata
from kg_detectron.io.relative_path import checked_relative_path
from kg_detectron.io.scene import Decoded, Scene

ZARR = ".zarr"
EXTRA = 'pip install "kg_detectron[zarr]"'

# Codecs that compute and do nothing else.
_CODECS = {"blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma", "shuffle", "delta", "bytes", "transpose", "crc32c"}
_CODECS |= {"adler32", "crc32", "bitround"}
_NUMBERS = re.compile(r"[<>|=]?[biuf]\d+|bool|u?int(8|16|32|64)|float(16|32|64)")
_SUFFIX = re.compile(r"(\.ome)?\.zarr(?=/|$)", re.IGNORECASE)
_COLOURS = (("red", "green", "blue"), ("r", "g", "b"))
_MAP_FROM = 2**28  # bytes of an image from which its planes are read piece by piece


def is_ome_zarr(path: Path) -> bool:
    """Whether a folder is a group of Zarr: a store ``.zarr``, or a group in one."""
    return any((path / name).is_file() for name in (".zattrs", ".zgroup", "zarr.json"))


def is_zarr_installed() -> bool:
    """Whether the package zarr, version 3, is there."""
    return importlib.util.find_spec("zarr") is not None and importlib.util.find_spec("zarr.codecs") is not None


def images_of(path: Path) -> list[Path]:
    """The images of a store: of a plate all fields of all wells, in the order of its metadata; else the store itself.

    A store whose metadata are broken counts as one image, which says so when it is read.
    """
    try:
        attributes = _attributes(path)
        if "plate" not in attributes:
            return [path]
        wells = [path / checked_relative_path(well["path"]) for well in attributes["plate"]["wells"]]
        fields = [
            well / checked_relative_path(field["path"])
            for well in wells
            for field in _attributes(well)["well"]["images"]
        ]
        return fields or [path]
    except (OSError, ValueError, KeyError, TypeError):
        return [path]


def name_of(relative: str) -> str:
    """What the results of an image are called: its path without ``.ome.zarr``."""
    return _SUFFIX.sub("", relative)


def ngff_version(path: Path) -> str:
    """The version of NGFF that a group is written in: "0.5" or "0.4", which counts for earlier ones too."""
    return "0.5" if (path / "zarr.json").is_file() else "0.4"


class Axis(NamedTuple):
    """An axis of an image of OME-Zarr, and where its largest level lies along it."""

    about: dict[str, str]  # name, type and unit, as far as they are known
    scale: float
    translation: float


def axes_of(path: Path) -> dict[str, Axis]:
    """The axes of a multiscale image, by their letters in capitals.

    Raises:
        ValueError: the folder has no metadata of OME-Zarr.
    """
    image = _attributes(path)["multiscales"][0]
    scale, translation = _placed(image)
    return {
        about["name"].upper(): Axis(about, float(a), float(b))
        for about, a, b in zip(map(_axis, image["axes"]), scale, translation, strict=True)
    }


def decode_ome_zarr(path: Path, max_pixels: int) -> Decoded:
    """Read an image; large ones are read when they are looked at.

    Args:
        path: folder of a multiscale image.
        max_pixels: limit of height x width x planes of an image that is read at once.

    Raises:
        ValueError: no multiscale image, types or codecs that are not known to be harmless, or zarr is not installed.
    """
    if not is_zarr_installed():
        raise ValueError(f"it is a Zarr folder, whose reader is not installed: {EXTRA}")
    attributes = _attributes(path)
    if "plate" in attributes or "well" in attributes:
        raise ValueError("it is a plate or well without any field")
    if not attributes.get("multiscales"):
        raise ValueError("it is no OME-Zarr image: its metadata have no entry multiscales")
    image = attributes["multiscales"][0]
    axes = "".join(_axis(axis)["name"] for axis in image["axes"]).lower()
    if not {"y", "x"} <= set(axes) or not set(axes) <= set("tczyx"):
        raise ValueError(f"its axes are {axes}, expected some of t, c, z, and y and x")
    levels = [_open_array(path / checked_relative_path(dataset["path"])) for dataset in image["datasets"]]
    shape = tuple(levels[0].shape)
    if len(shape) != len(axes):
        raise ValueError(f"it is corrupt: it has {len(shape)} axes, its metadata name {axes}")
    lead = "".join(axis for axis in axes if axis not in "cyx").upper()
    size = dict(zip(axes, shape, strict=True))
    planes = int(np.prod([size[axis.lower()] for axis in lead]))
    is_large = int(np.prod(shape)) * levels[0].dtype.itemsize >= _MAP_FROM
    if not is_large:
        check_size(size["y"], size["x"], planes, max_pixels)
    letters = [axis.lower() for axis in lead]
    pixels: Any = LazyStack(
        [size[axis] for axis in letters], lambda place: _Source(levels, axes, dict(zip(letters, place, strict=True)))
    )
    if not is_large:
        places = np.ndindex(pixels.shape[: len(lead)])
        pixels = np.stack([pixels[place][:, :] for place in places]).reshape(pixels.shape)
    about = _metadata(attributes, image, axes, size.get("c", 1))
    names = about.channel_names
    scene = Scene(
        pixels,
        lead,
        names is not None and tuple(name.casefold() for name in names) in _COLOURS,
        axes.upper(),
        shape,
        about.name or "1",
        names,
        about.pixel_size,
        about.source,
        notes=(about.note,) if about.note else (),
        z_spacing=about.z_spacing,
    )
    return Decoded([scene])


class _Source(PlaneSource):
    """A plane of a multiscale image.

    Args:
        levels: its arrays, of falling resolution.
        axes: their letters.
        place: indices along T and Z.
    """

    def __init__(self, levels: Sequence[Any], axes: str, place: dict[str, int]) -> None:
        y, x = axes.index("y"), axes.index("x")
        # Some stores are made coarser along Z as well: their coarse levels are of no use for one plane.
        fitting = [
            level
            for level in levels
            if all(level.shape[axes.index(axis)] == levels[0].shape[axes.index(axis)] for axis in place)
        ]
        self._arrays, self._axes, self._place = fitting, axes, place
        self.levels = [(level.shape[y], level.shape[x]) for level in fitting]
        self.shape = (*self.levels[0], levels[0].shape[axes.index("c")] if "c" in axes else 1)
        self.dtype = levels[0].dtype

    def read(self, level: int, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
        window = {"y": slice(y1, y2), "x": slice(x1, x2), "c": slice(None), **self._place}
        part = np.asarray(self._arrays[level][tuple(window[axis] for axis in self._axes)])
        left = [axis for axis in self._axes if axis not in self._place]
        part = part.transpose([left.index(axis) for axis in "yxc" if axis in left])
        return part if "c" in left else part[..., None]


def _attributes(path: Path) -> dict[str, Any]:
    """The OME metadata of a group, of both versions."""
    if (path / "zarr.json").is_file():
        attributes = _json(path / "zarr.json").get("attributes", {}).get("ome", {})
    elif (path / ".zattrs").is_file():
        attributes = _json(path / ".zattrs")
    else:
        raise ValueError("it has no metadata of OME-Zarr (.zattrs or zarr.json)")
    if not isinstance(attributes, dict):
        raise ValueError("its metadata are no JSON object")
    return attributes


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _open_array(path: Path) -> Any:
    """An array of Zarr, once its type and codecs are known to be harmless."""
    if (path / "zarr.json").is_file():
        metadata = _json(path / "zarr.json")
        dtype, codecs = metadata.get("data_type"), metadata.get("codecs")
    elif (path / ".zarray").is_file():
        metadata = _json(path / ".zarray")
        dtype, codecs = metadata.get("dtype"), [metadata.get("compressor"), *(metadata.get("filters") or ())]
    else:
        raise ValueError(f"it is corrupt: it has no array {path.name}")
    if not isinstance(dtype, str) or not _NUMBERS.fullmatch(dtype):
        raise ValueError(f"its values are of type {dtype}, expected numbers")
    _check_codecs(codecs)
    return importlib.import_module("zarr").open_array(str(path), mode="r")


def _check_codecs(codecs: Any) -> None:
    for codec in codecs or ():
        if codec is None:
            continue
        name = str(codec.get("name", codec.get("id"))).removeprefix("numcodecs.")
        if name == "sharding_indexed":
            inner = codec.get("configuration", {})
            _check_codecs([*inner.get("codecs", ()), *inner.get("index_codecs", ())])
        elif name not in _CODECS:
            raise ValueError(f"it is compressed by {name}, which is not known to be harmless")


def _metadata(attributes: dict[str, Any], image: dict[str, Any], axes: str, channels: int) -> SceneMetadata:
    """Names of the image and its channels, and micrometres of a pixel of the largest level."""
    named = (attributes.get("omero") or {}).get("channels") or ()
    names = [str(channel.get("label") or "") for channel in named]
    scale, _ = _placed(image)
    sides = []
    for letter in "xyz" if "z" in axes else "xy":
        unit = _axis(image["axes"][axes.index(letter)]).get("unit", "")
        sides.append(micrometres(float(scale[axes.index(letter)]), unit))
    return scene_metadata(str(image.get("name") or ""), names if len(names) == channels else [], sides, "OME-Zarr")


def _axis(axis: Any) -> dict[str, str]:
    """An axis as the metadata have it; before NGFF 0.4 it was a letter."""
    known = axis if isinstance(axis, dict) else {"name": axis}
    return {key: str(known[key]) for key in ("name", "type", "unit") if known.get(key)}


def _placed(image: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and translation of the largest level along each axis: its own, and then those of the whole image."""
    scale, translation = np.ones(len(image["axes"])), np.zeros(len(image["axes"]))
    for owner in (image["datasets"][0], image):
        for transformation in owner.get("coordinateTransformations") or ():
            if transformation.get("type") == "scale":
                factor = np.asarray(transformation["scale"], float)
                scale, translation = scale * factor, translation * factor
            elif transformation.get("type") == "translation":
                translation = translation + np.asarray(transformation["translation"], float)
    return scale, translation

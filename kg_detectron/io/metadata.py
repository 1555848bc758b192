"""What a TIFF says of its images: names of scenes and channels, and the size of a pixel in micrometres."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import tifffile

# Micrometres of the units of OME, OME-Zarr and ImageJ.
_MICROMETRES = {
    "m": 1e6,
    "dm": 1e5,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "nanometer": 1e-3,
    "picometer": 1e-6,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "angstrom": 1e-4,
    "nm": 1e-3,
    "pm": 1e-6,
    "å": 1e-4,
    "inch": 25400.0,
    "in": 25400.0,
}
_INCH, _CENTIMETRE = 2, 3  # of the tag ResolutionUnit
_SQUARE = 0.01  # sides of a pixel that differ by less, relatively, are taken for equal


@dataclass(frozen=True)
class SceneMetadata:
    """What a file says of one scene.

    Attributes:
        name: of the scene; empty where it has none.
        channel_names: one name a channel, or None.
        pixel_size: micrometres, or None where it is unknown.
        source: where the pixel size comes from, or None.
        note: a sentence on what is odd, or empty.
        z_spacing: micrometres between two planes along z, or None.
    """

    name: str = ""
    channel_names: tuple[str, ...] | None = None
    pixel_size: float | None = None
    source: str | None = None
    note: str = ""
    z_spacing: float | None = None


def tiff_metadata(tiff: tifffile.TiffFile) -> list[SceneMetadata]:
    """What a TIFF says of its scenes, one item a series of `tiff.series`."""
    readers = (_ome, _imagej, _lsm, _metamorph)
    whole = next((found for reader in readers if (found := reader(tiff)) is not None), None)
    images = whole or []
    scenes = []
    for index, series in enumerate(tiff.series):
        if len(images) == len(tiff.series):
            scene = images[index]
        else:  # images of other files that belong to it are missing here
            scene = next((image for image in images if image.name == series.name), SceneMetadata(series.name))
        if scene.pixel_size is None:
            scene = _with_resolution(scene, series.keyframe)
        scenes.append(scene)
    return scenes


def _ome(tiff: tifffile.TiffFile) -> list[SceneMetadata] | None:
    if not tiff.is_ome or not tiff.ome_metadata:
        return None
    try:
        root = ElementTree.fromstring(tiff.ome_metadata)
    except ElementTree.ParseError:
        return None
    scenes = []
    for image in root.iterfind("{*}Image"):
        pixels = image.find("{*}Pixels")
        if pixels is None:
            continue
        names = [channel.get("Name") or channel.get("Fluor") or "" for channel in pixels.iterfind("{*}Channel")]
        sides = [
            micrometres(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            for axis in "XYZ"
        ]
        scenes.append(scene_metadata(image.get("Name") or "", names, sides, "OME"))
    return scenes


def _imagej(tiff: tifffile.TiffFile) -> list[SceneMetadata] | None:
    about = tiff.imagej_metadata if tiff.is_imagej else None
    if about is None:
        return None
    page = tiff.pages.first
    unit = str(about.get("unit", "")).replace("\\u00B5", "µ")
    lengths = [*(_inverse(page.tags.valueof(tag)) for tag in (282, 283)), about.get("spacing")]
    sides = [micrometres(length, unit) for length in lengths]
    count = about.get("channels", 1)
    labels = about.get("Labels") or []
    names = [str(label).strip() for label in labels[:count]] if 1 < count <= len(labels) else []
    return [scene_metadata("", names if len(set(names)) == count else [], sides, "ImageJ")]


def _lsm(tiff: tifffile.TiffFile) -> list[SceneMetadata] | None:
    about = tiff.lsm_metadata if tiff.is_lsm else None
    if about is None:
        return None
    names = (about.get("ChannelColors") or {}).get("ColorNames") or []
    sides = [micrometres(about.get(f"VoxelSize{axis}"), "m") for axis in "XYZ"]
    scene = scene_metadata(about.get("Name", ""), list(names), sides, "LSM")
    return [scene, *[SceneMetadata(series.name) for series in tiff.series[1:]]]


def _metamorph(tiff: tifffile.TiffFile) -> list[SceneMetadata] | None:
    about = tiff.stk_metadata if tiff.is_stk else None
    if about is None:
        return None
    unit = str(about.get("CalibrationUnits", ""))
    sides = [micrometres(about.get(f"{axis}Calibration"), unit) for axis in "XY"]
    return [scene_metadata(str(about.get("Name", "")), [], sides, "MetaMorph")]


def scene_metadata(name: str, channels: Sequence[str], sides: Sequence[float | None], source: str) -> SceneMetadata:
    """What is known of a scene: its channels' names, micrometres of a pixel along x, y and, where it is known, z, and
    their source."""
    names = tuple(channel or str(number) for number, channel in enumerate(channels, 1)) or None
    if names is not None and not any(channels):
        names = None
    x, y, z = (*sides, None)[:3]
    if x is None or y is None:
        return SceneMetadata(name, names, x or y, source if x or y else None, z_spacing=z)
    if abs(x - y) > _SQUARE * max(x, y):
        note = f"its pixels are {x:g} x {y:g} micrometres, not square: no pixel size is taken from it"
        return SceneMetadata(name, names, note=note, z_spacing=z)
    return SceneMetadata(name, names, x, source, z_spacing=z)


def _with_resolution(scene: SceneMetadata, page: tifffile.TiffPage) -> SceneMetadata:
    """With the pixel size of Aperio's description or of the resolution tags, where they tell one."""
    match = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description) if page.is_svs else None
    size = micrometres(match[1], "µm") if match else None
    source = "Aperio MPP" if size else None
    if size is None and not page.parent.is_imagej:
        x, y = (_resolution_size(page, tag) for tag in (282, 283))
        if x is not None and y is not None and abs(x - y) <= _SQUARE * max(x, y):
            size, source = x, "TIFF resolution"
    return replace(scene, pixel_size=size, source=source) if size else scene


def _resolution_size(page: tifffile.TiffPage, tag: int) -> float | None:
    """Micrometres by a resolution tag, or None for what printers and screens have: 72, 96, 300 dpi."""
    unit = page.tags.valueof(296, _INCH)
    side = _inverse(page.tags.valueof(tag))
    if side is None or unit not in (_INCH, _CENTIMETRE):
        return None
    size = side * (25400 if unit == _INCH else 10000)
    per_inch = 25400 / size
    # Microscopes' pixels are smaller than 10 micrometres. Printers' and scanners' are 10 or more, up to 4800 dpi.
    is_round = abs(per_inch - round(per_inch)) < 1e-3 and round(per_inch) % 100 == 0 and per_inch <= 9600
    return size if 0.001 <= size < 10 and not (is_round and unit == _INCH) else None


def _inverse(value: Any) -> float | None:
    """A resolution, as a fraction or a number -> the length of a pixel."""
    try:
        numerator, denominator = value if isinstance(value, tuple) else (float(value), 1)
        return float(denominator) / float(numerator)
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def micrometres(value: Any, unit: str) -> float | None:
    """A length -> micrometres above 0, or None."""
    factor: Any = _MICROMETRES.get(unit.strip().strip("\0").lower())
    try:
        length = float(value) * factor
    except (TypeError, ValueError):
        return None
    return length if math.isfinite(length) and length > 0 else None

"""Whole slides, by OpenSlide or, where that is not installed, by tiffslide: read where somebody looks.

H, W: height and width of the slide in pixels.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from kg_detectron.io.lazy import LazyStack, PlaneSource
from kg_detectron.io.scene import Decoded, Scene

EXTRA = 'pip install "kg_detectron[slides]"'

# Endings of slides that only these packages read, and those that are TIFFs.
ONLY_SLIDES = (".mrxs", ".vms", ".vmu")
TIFF_SLIDES = (".svs", ".ndpi", ".scn", ".bif", ".tif", ".tiff")

_LARGE = 2**28  # bytes of pixels from which a TIFF is read as a slide
_PACKAGES = (("openslide", "OpenSlide", "openslide"), ("tiffslide", "TiffSlide", "tiffslide"))


def is_slide_package_installed() -> bool:
    """Whether OpenSlide or tiffslide is there."""
    return any(importlib.util.find_spec(module) is not None for module, _, _ in _PACKAGES)


def decode_slide(path: Path) -> Decoded | None:
    """Open a slide.

    Args:
        path: the file.

    Returns:
        One colour image; None for a TIFF that is no slide, or so small that it is better read at once.

    Raises:
        ValueError: a file of `ONLY_SLIDES` that cannot be read, or for which no package is installed.
    """
    is_only_slide = path.suffix.lower() in ONLY_SLIDES
    if not is_slide_package_installed():
        if is_only_slide:
            raise ValueError(f"it is a slide, whose reader is not installed: {EXTRA}")
        return None
    if not is_only_slide and path.stat().st_size < _LARGE // 100:  # no JPEG is so small for so many pixels
        return None
    slide, prefix = _opened(path)
    if slide is None:
        if is_only_slide:
            raise ValueError("it is no slide that OpenSlide knows, or a part of it is missing")
        return None
    source = _SlideSource(slide)
    if not is_only_slide and int(np.prod(source.shape)) < _LARGE:
        slide.close()
        return None
    size = _pixel_size(slide, prefix)
    scene = Scene(
        LazyStack((), lambda place: source),  # type: ignore[arg-type]  # sliced like an array
        "",
        True,
        "YXS",
        source.shape,
        pixel_size=size,
        source="slide" if size else None,
        is_lossy=True,
    )
    return Decoded([scene])


def _opened(path: Path) -> tuple[Any, str]:
    """The slide and the prefix of its properties; None for what no package takes for a slide."""
    for module, name, prefix in _PACKAGES:
        if importlib.util.find_spec(module) is None:
            continue
        reader = getattr(importlib.import_module(module), name)
        if reader.detect_format(str(path)) is not None:
            return reader(str(path)), prefix
    return None, ""


class _SlideSource(PlaneSource):
    """The pixels of a slide, red first; what was not scanned is white."""

    dtype = np.dtype(np.uint8)

    def __init__(self, slide: Any) -> None:
        self._slide = slide
        self.levels = [(height, width) for width, height in slide.level_dimensions]
        self.shape = (*self.levels[0], 3)

    def read(self, level: int, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
        factors = [whole / part for whole, part in zip(self.shape, self.levels[level], strict=False)]
        corner = round(x1 * factors[1]), round(y1 * factors[0])
        region = np.asarray(self._slide.read_region(corner, level, (x2 - x1, y2 - y1)))
        if region.shape[2] == 3:
            return region
        alpha = region[..., 3:].astype(np.uint16)
        return ((region[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _pixel_size(slide: Any, prefix: str) -> float | None:
    try:
        x, y = (float(slide.properties[f"{prefix}.mpp-{axis}"]) for axis in "xy")
    except (KeyError, TypeError, ValueError):
        return None
    return x if 0 < x < float("inf") and abs(x - y) <= 0.01 * x else None

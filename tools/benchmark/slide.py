"""Prediction of a synthetic slide with tissue in a part of it: time, and the largest memory of the process."""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.model_file import DEFAULT_MODEL
from kg_detectron.inference.run_settings import Settings
from kg_detectron.synthetic import nuclei_image

TILE = 512  # side of the slide's tiles, pixels; each is glass or tissue
_CELLS = 80  # nuclei in a tile of tissue
_DRAWN = 16  # different tiles of tissue


def write_slide(path: Path, size: int, tissue: float) -> int:
    """Write a slide (size, size, 3) as a tiled TIFF with three levels, JPEG, tissue in one square of it.

    Returns:
        The number of tiles of tissue.
    """
    rng = np.random.default_rng(0)
    glass = np.repeat(rng.integers(236, 246, (TILE, TILE, 1), dtype=np.uint8), 3, axis=2)
    drawn = []
    for _ in range(_DRAWN):
        nuclei, _ = nuclei_image(rng, TILE, TILE, _CELLS)
        drawn.append(([225, 170, 205] - nuclei[..., :1] * [0.5, 0.45, 0.3]).clip(0, 255).astype(np.uint8))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(3):
            step = 4**level
            side = -(-size // step)
            tiles = -(-side // TILE)
            edge = round(tiles * tissue**0.5)

            def level_tiles(step: int = step, tiles: int = tiles, edge: int = edge) -> Iterator[np.ndarray]:
                for row in range(tiles):
                    for column in range(tiles):
                        is_tissue = row < edge and column < edge
                        tile = drawn[(row * tiles + column) % _DRAWN] if is_tissue else glass
                        # Coarser levels: as many copies side by side as they hold.
                        yield np.tile(tile[::step, ::step], (step, step, 1)) if step > 1 else tile

            file.write(
                level_tiles(),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                subfiletype=int(level > 0),
                resolution=(40000, 40000),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return round(-(-size // TILE) * tissue**0.5) ** 2


def benchmark_slide(arguments: argparse.Namespace, device: str) -> None:
    """The command a user gives, on a slide made for it."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        slide = Path(folder) / "slide.tif"
        tiles = write_slide(slide, arguments.size, arguments.tissue)
        print(f"{arguments.size} x {arguments.size}, {tiles} tiles of tissue, {slide.stat().st_size / 2**20:.0f} MiB")
        settings = Settings(save=tuple(arguments.save), scale=1.0, tile=arguments.tile)
        start = time.perf_counter()
        summary = predict_files(
            [slide], arguments.model, Path(folder) / "cells", settings, device=device, say=print, complain=print
        )
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{summary}; {seconds:.0f} s, peak memory {peak:.2f} GiB")


def add_command(commands: Any) -> None:
    """Add ``slide`` to the commands of tools/benchmark.py."""
    command = commands.add_parser("slide", help="prediction of a whole slide", description=__doc__)
    command.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="model file, or name of a kept model (%(default)s)"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="only this one; every device at hand otherwise")
    command.add_argument("--size", type=int, default=20000, help="side of the slide, pixels (%(default)s)")
    command.add_argument("--tissue", type=float, default=0.1, help="share of it that is tissue (%(default)s)")
    command.add_argument("--tile", type=int, default=2048, help="pixels (%(default)s)")
    command.add_argument("--save", nargs="+", default=["geojson"], help="kinds of results (geojson)")
    command.add_argument("--scratch", type=Path, help="folder for the slide and the results (the system's for such)")
    command.set_defaults(benchmark=benchmark_slide)

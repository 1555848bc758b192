"""Prediction of a synthetic slide with tissue in a part of it: time, and the largest memory of the process."""

import argparse
import importlib
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from kg_detectron.cells.label_plane import LabelPlane
from kg_detectron.cells.separation import separate_cells
from kg_detectron.export.kinds import EXPORTERS
from kg_detectron.inference import load_model, predict
from kg_detectron.inference.area import area_of, regions_of
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.model_file import DEFAULT_MODEL
from kg_detectron.inference.run_settings import Settings
from kg_detectron.inference.tiling import GRID
from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import open_image
from kg_detectron.synthetic import nuclei_image

TILE = 512  # side of the slide's tiles, pixels; each is glass or tissue
_CELLS = 80  # nuclei in a tile of tissue
_DRAWN = 16  # different tiles of tissue


def write_slide(path: Path, size: int, tissue: float) -> None:
    """Write a slide (size, size, 3) as a tiled TIFF with three levels, JPEG, tissue in one square of it."""
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


def benchmark_slide(arguments: argparse.Namespace, device: str) -> None:
    """The command a user gives, on a slide made for it."""
    with ExitStack() as stack:
        folder = arguments.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.scratch)))
        folder.mkdir(parents=True, exist_ok=True)
        slide = folder / f"slide_{arguments.size}_{arguments.tissue:g}.tif"
        if not slide.exists():
            with replacing(slide) as unfinished:
                write_slide(unfinished, arguments.size, arguments.tissue)
        print(f"{arguments.size} x {arguments.size}, {arguments.tissue:.1%} tissue, {slide.stat().st_size >> 20} MiB")
        start, used = time.perf_counter(), time.process_time()
        settings = Settings(save=tuple(arguments.save), scale=1.0, tile=arguments.tile)
        summary = predict_files(
            [slide], arguments.model, folder / "cells", settings, device=device, say=print, complain=print
        )
        seconds, used = time.perf_counter() - start, time.process_time() - used
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{summary}; {seconds:.0f} s, {used:.0f} s of CPU time, peak memory {peak:.2f} GiB", flush=True)
        if arguments.crop:
            labels = folder / "cells" / (slide.stem + EXPORTERS["ome-tiff"].ending)
            print(compare_crop(arguments, slide, labels, device))


def compare_crop(arguments: argparse.Namespace, slide: Path, labels: Path, device: str) -> str:
    """The cells around a corner of four tiles, predicted in one larger tile, and those of the slide.

    Compared is the inner half of a square region, for cells across its border are in the slide alone.

    Args:
        labels: the slide's, as a pyramid in OME-TIFF.
    """
    side = arguments.crop
    start = max(0, (arguments.tile - side // 2) // GRID * GRID)
    model = load_model(arguments.model, device)
    pixels = open_image(slide).pages[0].pixels
    area = area_of(pixels, regions_of([f"{start},{start},{side},{side}"]), tissue=False)
    cells = predict(model, pixels, scale=1.0, tile=-(-(start + side) // GRID) * GRID, area=area)
    inner = slice(start + side // 4, start + side - side // 4)
    whole = LabelPlane(separate_cells(cells.above(model.threshold)).masks)[inner, inner]
    with tifffile.TiffFile(labels) as file:
        tiled = importlib.import_module("zarr").open_array(file.series[0].aszarr(level=0), mode="r")[inner, inner]
    first, second = _by_first_pixels(whole), _by_first_pixels(tiled)
    counts = [len(np.unique(part[part > 0])) for part in (first, second)]
    differing = np.count_nonzero(first != second)
    found = f"{counts[0]} cells in one tile, {counts[1]} in four, {differing} pixels differ"
    return f"{side // 2} x {side // 2} pixels: {found}"


def _by_first_pixels(labels: np.ndarray) -> np.ndarray:
    """Labels whose ids are the places of their first pixels, from 1, so that equal cells have equal ids."""
    ids, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return np.where(ids == 0, 0, first + 1)[numbers].reshape(labels.shape)


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
    command.add_argument(
        "--save", nargs="+", default=["geojson", "ome-tiff"], help="kinds of results (geojson ome-tiff)"
    )
    command.add_argument(
        "--crop",
        type=int,
        default=0,
        help="compare such a square, pixels, with one tile; needs ome-tiff and zarr (none)",
    )
    command.add_argument("--folder", type=Path, help="keep slide and results here, and go on after Ctrl-C (do not)")
    command.add_argument("--scratch", type=Path, help="folder for the slide and the results (the system's for such)")
    command.set_defaults(benchmark=benchmark_slide)

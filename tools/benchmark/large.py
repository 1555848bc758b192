"""Prediction of an image that is larger than memory should be, tile by tile, and the memory that it takes."""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kg_detectron.inference import load_model, predict
from kg_detectron.inference.model_file import DEFAULT_MODEL
from kg_detectron.synthetic import nuclei_image

PATCH = 256  # side of the pieces of a large image, pixels


def large_image(path: Path, size: int, cells: int) -> tuple[np.ndarray, int]:
    """An image (size,size,3) uint8 in a file, mapped into memory: dark noise, and patches with about so many nuclei.

    Returns:
        The image and the number of nuclei in it.
    """
    rng = np.random.default_rng(0)
    image = np.memmap(path, np.uint8, "w+", shape=(size, size, 3))
    noise = rng.integers(6, 14, (PATCH, size, 1), dtype=np.uint8)
    for y in range(0, size, PATCH):
        image[y : y + PATCH] = noise[: size - y]
    drawn, columns = 0, size // PATCH
    for place in rng.permutation(columns**2).tolist():
        if drawn >= cells:
            break
        patch, masks = nuclei_image(rng, PATCH, PATCH, min(25, cells - drawn))
        y, x = place // columns * PATCH, place % columns * PATCH
        image[y : y + PATCH, x : x + PATCH] = patch
        drawn += len(masks)
    return image, drawn


def benchmark_large(arguments: argparse.Namespace, device: str) -> None:
    """Prediction in tiles: time, cells, and the largest memory of the whole process, mapped files included."""
    model = load_model(arguments.model, device)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        image, drawn = large_image(Path(folder) / "image", arguments.size, arguments.cells)
        start = time.perf_counter()
        with tqdm(unit="step") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            tiles = {"tile": arguments.tile, "overlap": arguments.overlap}
            found = predict(model, image, scale=1, **tiles, progress=show)  # at its own pixels
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.size}x{arguments.size}, tile {arguments.tile}, overlap {arguments.overlap}: {drawn} nuclei drawn, "
        f"{len(found)} cells found in {seconds:.0f} s, peak memory {peak:.2f} GiB"
    )


def add_command(commands: Any) -> None:
    """Add ``large`` to the commands of tools/benchmark.py."""
    command = commands.add_parser("large", help="prediction in tiles", description=__doc__)
    command.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="model file, or name of a kept model (%(default)s)"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="only this one; every device at hand otherwise")
    command.add_argument("--size", type=int, default=20000, help="side of the image, pixels (%(default)s)")
    command.add_argument("--cells", type=int, default=5000, help="about so many in the image (%(default)s)")
    command.add_argument("--tile", type=int, default=1024, help="pixels (%(default)s)")
    command.add_argument("--overlap", type=int, default=256, help="pixels (%(default)s)")
    command.add_argument("--scratch", type=Path, help="folder for the image, 3 bytes a pixel (the system's for such)")
    command.set_defaults(benchmark=benchmark_large)

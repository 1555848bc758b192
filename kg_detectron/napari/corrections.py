"""Corrected labels of the viewer as a data set, and the training that adapts a model to it."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from kg_detectron.io.atomic import replacing
from kg_detectron.io.labels import write_label_image
from kg_detectron.napari.planes import Place
from kg_detectron.training.run import MODEL_FILE

IMAGES, MASKS = "images", "masks"


def save_corrections(folder: str | Path, name: str, planes: Sequence[tuple[Place, np.ndarray, np.ndarray]]) -> int:
    """Write planes and their labels as ``images/NAME.tif`` and ``masks/NAME.tif``, which training reads.

    Planes without any label are left out: nobody has looked at them. Files of the same name are replaced.

    Args:
        folder: of the data set, made where absent.
        name: of the layer.
        planes: place, pixels (H, W) or (H, W, 3) BGR, and labels (H, W) of each.

    Returns:
        How many planes were written.

    Raises:
        ValueError: no plane has a label, or labels and pixels differ in size.
        OSError: a file cannot be written.
    """
    if not any(labels.any() for _, _, labels in planes):
        raise ValueError("labels: expected at least one cell, got an empty layer")
    stem = re.sub(r"[^\w.-]+", "_", name) or "image"
    count = 0
    for place, pixels, labels in planes:
        if labels.shape != pixels.shape[:2]:
            raise ValueError(f"labels: expected {pixels.shape[:2]}, the size of the image, got {labels.shape}")
        if not labels.any():
            continue
        file_name = "_".join([stem, *(f"{index:04d}" for index in place)]) + ".tif"
        with replacing(Path(folder) / IMAGES / file_name) as unfinished:
            if pixels.ndim == 3:
                tifffile.imwrite(unfinished, pixels[..., ::-1], photometric="rgb")
            else:
                tifffile.imwrite(unfinished, pixels, photometric="minisblack")
        write_label_image(Path(folder) / MASKS / file_name, labels.astype(np.uint32))
        count += 1
    return count


def corrected_images(folder: str | Path) -> int:
    """How many images a data set of corrections has."""
    return len(list((Path(folder) / MASKS).glob("*.tif")))


def next_run(folder: str | Path) -> Path:
    """A new folder for a training: ``run1``, ``run2``, ... in the data set."""
    number = 1
    while (Path(folder) / f"run{number}").exists():
        number += 1
    return Path(folder) / f"run{number}"


def model_of(run: Path) -> Path:
    """The model file of a training that has ended."""
    return run / MODEL_FILE


def training_command(folder: str | Path, model: str, run: Path, minutes: float) -> list[str]:
    """The program and arguments that adapt a model to the corrections, in a process of its own."""
    start = "import sys; from kg_detectron.cli import main; sys.exit(main())"
    images, masks = (str(Path(folder) / kind) for kind in (IMAGES, MASKS))
    options = ["-m", model, "-o", str(run), "--minutes", f"{minutes:g}"]
    return [sys.executable, "-c", start, "train", images, masks, *options]


def training_progress(text: str) -> float | None:
    """The latest percentage in the output of the training, or None where there is none yet."""
    found = re.findall(r"training: +(\d+(?:\.\d+)?) %", text)
    return float(found[-1]) if found else None

"""The fastest way to run a model on this machine that finds the same cells."""

import statistics
import time

import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.inference.predictor import predict
from kg_detectron.metrics import MatchingMetrics
from kg_detectron.modeling import InstanceNet
from kg_detectron.synthetic import nuclei_image

# The precision to try on each type of device.
_HALF = {"cpu": "bfloat16", "cuda": "float16"}
# Cells of the two precisions match from this intersection over union on, and this F1 makes them the same.
_SAME_CELL, _SAME_CELLS = 0.75, 0.95
# A precision must be faster than float32 by this factor.
_FASTER = 1.1
_REPEATS = 3
_SIZE, _CELLS = 256, 25


def make_fast(model: InstanceNet) -> str:
    """Let a model run in 16 bits, in place, if that is faster here and finds the same cells in a drawn image.

    Only the convolutions run in 16 bits. Processors without instructions for them are slower so; then, and where the
    cells differ, the model stays as it is. It takes about a second.

    Args:
        model: in evaluation mode.

    Returns:
        A sentence about what was chosen, and why.
    """
    half = _HALF.get(model.place.device.type)
    if half is None:
        return f"float32: no faster way is known for {model.place.device.type}"
    image, _ = nuclei_image(np.random.default_rng(0), _SIZE, _SIZE, _CELLS)
    before = model.precision
    seconds, cells = _run(model, image)
    model.precision = half
    try:
        fast_seconds, fast_cells = _run(model, image)
    except RuntimeError as error:  # a library without such kernels
        model.precision = before
        return f"{before}: {half} does not run here ({str(error).splitlines()[0]})"
    gain, same = seconds / fast_seconds, _agreement(cells, fast_cells)
    if gain < _FASTER or same < _SAME_CELLS:
        model.precision = before
        return f"{before}: {half} is {gain:.2g} times as fast here, and its cells have F1 {same:.2g} with the others"
    return f"{half}: {gain:.2g} times as fast here, the same cells in a drawn image (F1 {same:.2g})"


def _run(model: InstanceNet, image: np.ndarray) -> tuple[float, Cells]:
    """The median seconds of a prediction, and its cells from the threshold on."""
    taken = []
    for _ in range(1 + _REPEATS):  # the first prepares kernels and memory
        start = time.perf_counter()
        cells = predict(model, image, scale=1.0, min_score=model.threshold)
        if model.place.device.type == "cuda":
            torch.cuda.synchronize(model.place.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]), cells


def _agreement(cells: Cells, others: Cells) -> float:
    """F1 of two sets of cells; 1 where both are empty."""
    if not len(cells) and not len(others):
        return 1.0
    metrics = MatchingMetrics((_SAME_CELL,))
    metrics.update(cells.masks.rle(), others.masks.rle())
    return metrics.compute()[str(_SAME_CELL)]["f1"]

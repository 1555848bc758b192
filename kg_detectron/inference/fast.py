"""The fastest way to run a model on this machine that finds the same cells."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.inference.dense_part import run_by_onnxruntime
from kg_detectron.inference.predictor import predict
from kg_detectron.metrics import MatchingMetrics
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.synthetic import nuclei_image

# The precision to try on each type of device.
_HALF = {"cpu": "bfloat16", "cuda": "float16"}
# Cells of two ways match from this intersection over union on, and this F1 makes them the same.
_SAME_CELL, _SAME_CELLS = 0.75, 0.95
# A way must be faster by this factor.
_FASTER = 1.1
_REPEATS = 3
_SIZE, _CELLS = 256, 25


def make_fast(model: InstanceNet) -> str:
    """Let a model run in the fastest way that finds the same cells in a drawn image here, in place.

    Tried are convolutions in 16 bits, which are slower on processors without instructions for them, and on the CPU,
    where it is installed, onnxruntime for the dense part of a keypoint graph (`run_by_onnxruntime`). Where nothing is
    faster, or the cells differ, the model stays as it is. It takes some seconds.

    Args:
        model: in evaluation mode.

    Returns:
        A sentence about what was chosen, and why.
    """
    image, _ = nuclei_image(np.random.default_rng(0), _SIZE, _SIZE, _CELLS)
    vars(model).pop("maps", None)  # of a call before
    before, ways = model.precision, _ways(model)
    if not ways:
        return f"{before}: no faster way is known for {model.place.device.type}"
    seconds, cells = _run(model, image)
    best, chosen, said = _FASTER, None, []
    for name, use in ways.items():
        try:
            use()
            fast_seconds, fast_cells = _run(model, image)
        except Exception as error:  # other libraries: one without such kernels, or without this way
            said.append(f"{name} does not run here ({(str(error).splitlines() or [''])[0]})")
            continue
        finally:
            model.precision = before
            others = vars(model).pop("maps", None)
        gain, same = seconds / fast_seconds, _agreement(cells, fast_cells)
        if gain < best or same < _SAME_CELLS:
            said.append(f"{name} is {gain:.2g} times as fast here, and its cells have F1 {same:.2g} with the others")
        else:
            best, chosen = gain, (name, others, gain, same)
    if chosen is None:
        return f"{before}: {'; '.join(said)}"
    name, others, gain, same = chosen
    if others is None:
        model.precision, way = name, ""
    else:
        vars(model)["maps"], way = others, f"{name}, "
    return f"{model.precision}: {way}{gain:.2g} times as fast here, the same cells in a drawn image (F1 {same:.2g})"


def _ways(model: InstanceNet) -> dict[str, Callable[[], None]]:
    """What may be faster on the model's device, by name: functions that change the model."""
    device = model.place.device.type
    ways: dict[str, Callable[[], None]] = {}
    if half := _HALF.get(device):
        ways[half] = lambda: setattr(model, "precision", half)
    if device == "cpu" and isinstance(model, KeypointGraphNet) and importlib.util.find_spec("onnxruntime"):
        ways["onnxruntime"] = lambda: run_by_onnxruntime(model)
    return ways


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

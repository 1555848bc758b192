"""Model files: weights with the description of their network, loadable without Detectron2 and without running code."""

import os
import pickle
from pathlib import Path

import torch

from ..modeling import KeypointGraphNet

# The entry of a checkpoint, Detectron2's included, that holds the arguments of `KeypointGraphNet`.
DESCRIPTION_KEY = "kg_detectron"

# Where the parts are found in Detectron2's model, and in ours.
_PREFIXES = {
    "backbone.": "backbone.",
    "proposal_generator.branch.": "keypoint_branch.",
    "roi_heads.mask_head.": "mask_head.",
}


def save_model(model: KeypointGraphNet, path: str | Path) -> None:
    """Write weights and description; the file appears whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    torch.save({"model": model.state_dict(), DESCRIPTION_KEY: {"model": model.arguments}}, part)
    os.replace(part, path)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    precision: str = "float32",
    channels_last: bool = False,
    compiled: bool = False,
) -> KeypointGraphNet:
    """Load a model for prediction, from `save_model` or from a checkpoint that `tools/train_net.py` wrote.

    Args:
        path: the file; it is read as data only (``weights_only``).
        device: where the model goes.
        precision, channels_last, compiled: how it runs, see `KeypointGraphNet.accelerate`.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is no checkpoint, that describes no keypoint-graph network, or whose weights do not
            fit its description; for another precision.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {"model", DESCRIPTION_KEY} <= checkpoint.keys():
        raise ValueError(f"{path} does not describe a keypoint-graph network (no entry {DESCRIPTION_KEY!r})")
    try:
        model = KeypointGraphNet(**checkpoint[DESCRIPTION_KEY]["model"])
        model.load_state_dict(_own_names(checkpoint["model"]))
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights do not fit the description: {error}") from error
    return model.eval().to(device).accelerate(precision, channels_last, compiled)


def _own_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not any(name.startswith("roi_heads.") for name in state):
        return state
    return {
        own + name.removeprefix(theirs): value
        for name, value in state.items()
        for theirs, own in _PREFIXES.items()
        if name.startswith(theirs)
    }

"""Model files: weights with the description of their network, loadable without Detectron2 and without running code."""

import json
from pathlib import Path

import safetensors.torch
import torch

from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import MAX_PIXELS
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.modeling import KeypointGraphNet

# The entry of a checkpoint, Detectron2's included, that holds the arguments of `KeypointGraphNet`.
DESCRIPTION_KEY = "kg_detectron"

# Where the parts are found in Detectron2's model, and in ours.
_PREFIXES = {
    "backbone.": "backbone.",
    "proposal_generator.branch.": "keypoint_branch.",
    "roi_heads.mask_head.": "mask_head.",
}


# The ending of files in the format of safetensors; the description stands in their metadata, as JSON.
SAFETENSORS = ".safetensors"


def save_model(model: KeypointGraphNet, path: str | Path, *, half: bool = False) -> None:
    """Write weights and description; the file appears whole or not at all.

    Args:
        path: a name that ends in ``.safetensors`` makes it one of those, any other a file of `torch.save` that loads
            with ``weights_only``.
        half: write floating-point weights in 16 bits. They come back as 32 bits, rounded.

    Raises:
        OSError: the file cannot be written.
        ValueError: a weight that 16 bits cannot hold.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        lost = [name for name, value in state.items() if not value.isfinite().all()]
        if lost:
            raise ValueError(f"half: {lost[0]} has values that 16 bits cannot hold")
    description = {"model": model.arguments}
    with replacing(path) as unfinished:
        if Path(path).suffix == SAFETENSORS:
            # Not by save_file, whose files nobody but their owner may read.
            unfinished.write_bytes(safetensors.torch.save(state, {DESCRIPTION_KEY: json.dumps(description)}))
        else:
            torch.save({"model": state, DESCRIPTION_KEY: description}, unfinished)


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
        path: the file; it is read as data only (``.safetensors``, or else ``weights_only``).
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
    checkpoint = _read_safetensors(path) if Path(path).suffix == SAFETENSORS else read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not {"model", DESCRIPTION_KEY} <= checkpoint.keys():
        raise ValueError(f"{path} does not describe a keypoint-graph network (no entry {DESCRIPTION_KEY!r})")
    try:
        model = _described(checkpoint[DESCRIPTION_KEY]["model"], _own_names(checkpoint["model"]))
    # Whatever a network makes of nonsense in its description, the user needs the file.
    except Exception as error:
        raise ValueError(f"{path}: the weights do not fit the description: {error}") from error
    return model.eval().to(device).accelerate(precision, channels_last, compiled)


def _read_safetensors(path: str | Path) -> dict:
    """The content of a ``.safetensors`` file as `read_checkpoint` gives that of the others."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get(DESCRIPTION_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}
        return {"model": weights} | ({DESCRIPTION_KEY: json.loads(description)} if description else {})
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def _described(arguments: dict, weights: dict[str, torch.Tensor]) -> KeypointGraphNet:
    """The network of a description that came with its weights."""
    if "weights" in arguments:
        raise ValueError("it names weights to download")
    with torch.device("meta"):  # as a check: a description can claim any size, and here it takes no memory
        KeypointGraphNet(**arguments).load_state_dict(weights, assign=True)
    model = KeypointGraphNet(**arguments)
    model.load_state_dict(weights)
    Normalisation(model.normalisation, model.percentiles)  # as a check
    height, width = model.input_size
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"input_size is {height} x {width} pixels, more than the limit of {MAX_PIXELS}, or none")
    return model


def _own_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not any(name.startswith("roi_heads.") for name in state):
        return state
    return {
        own + name.removeprefix(theirs): value
        for name, value in state.items()
        for theirs, own in _PREFIXES.items()
        if name.startswith(theirs)
    }

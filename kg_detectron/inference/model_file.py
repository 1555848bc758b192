"""Model files: weights with the description of their network, loadable without Detectron2 and without running code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kg_detectron.inference.model_names import DEFAULT_MODEL, SAFETENSORS, model_path
from kg_detectron.inference.run_settings import unknown_device
from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import MAX_PIXELS
from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.io.setting import SettingError
from kg_detectron.modeling import InstanceNet, Scores, method_class
from kg_detectron.modeling.settings import from_plain

# The entry of a checkpoint, Detectron2's included, that describes the network: `InstanceNet.description`.
DESCRIPTION_KEY = "kg_detectron"

# In Detectron2's model the network is a module of this name.
HOST_PREFIX = "network."

# The weights of a run of a training, the better ones first.
WEIGHTS = ("model_best.pth", "model_final.pth")


def save_model(model: InstanceNet, path: str | Path, *, half: bool = False) -> None:
    """Write weights and description; the file appears whole or not at all.

    Args:
        model: any registered method.
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
    description = model.description()
    with replacing(path) as unfinished:
        if Path(path).suffix == SAFETENSORS:
            # Not by save_file, whose files nobody but their owner may read.
            unfinished.write_bytes(safetensors.torch.save(state, {DESCRIPTION_KEY: json.dumps(description)}))
        else:
            torch.save({"model": state, DESCRIPTION_KEY: description}, unfinished)


def load_model(
    path: str | Path = DEFAULT_MODEL,
    device: str | torch.device = "cpu",
    *,
    precision: str = "float32",
    channels_last: bool | None = None,
    compiled: bool = False,
) -> InstanceNet:
    """Load a model for prediction.

    Args:
        path: a model file, a checkpoint of a training, or the name of a kept model. Files are read as data only
            (``.safetensors``, or else ``weights_only``).
        device: where the model goes.
        precision: of the convolutions, see `InstanceNet.accelerate`.
        channels_last: keep the maps with the channels last, see there; by default on a CPU, where that is faster and
            takes less memory.
        compiled: let `torch.compile` compile the dense modules, see there.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is no checkpoint, that describes no network of a registered method, or whose weights do
            not fit its description; another precision.
        SettingError: a device that PyTorch does not know, or cannot use here.
    """
    path = model_path(path)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise unknown_device(device) from None
    description, weights = read_model(path)
    try:
        model = _described(description, weights)
    # Whatever a network makes of nonsense in its description, the user needs the file.
    except Exception as error:
        raise ValueError(f"{path}: the weights do not fit the description: {error}") from error
    if channels_last is None:
        channels_last = place.type == "cpu"
    try:
        model = model.eval().to(place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError("device", f"{device} cannot be used: {error}") from error
    return model.accelerate(precision, channels_last, compiled)


def read_model(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights of a model file or checkpoint, by the core's names.

    Raises:
        ValueError: the file cannot be read as a checkpoint, or describes no network.
    """
    checkpoint = _read_safetensors(path) if Path(path).suffix == SAFETENSORS else read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not {"model", DESCRIPTION_KEY} <= checkpoint.keys():
        raise ValueError(f"{path} does not describe a network of kg_detectron (no entry {DESCRIPTION_KEY!r})")
    description, weights = checkpoint[DESCRIPTION_KEY], core_names(checkpoint["model"])
    if isinstance(description, Mapping) and isinstance(description.get("model"), Mapping):
        return _from_format_1(description["model"], weights)
    return dict(description), weights


def core_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the core's names, of those that Detectron2's model has."""
    if not all(name.startswith(HOST_PREFIX) for name in weights):
        return dict(weights)
    return {name.removeprefix(HOST_PREFIX): value for name, value in weights.items()}


def export_run(run: str | Path, output: str | Path, *, half: bool = False) -> Path:
    """Write the model of a training run for prediction, without the optimiser and whatever else training needs.

    Args:
        run: folder of a run; its ``model_best.pth`` is taken, or else its ``model_final.pth``. Or a checkpoint file.
        output: the file, replaced where it exists; see `save_model`. Its folder is made where absent.
        half: write the weights in 16 bits.

    Returns:
        The checkpoint that was taken.

    Raises:
        FileNotFoundError: no such run, or none of these files in it.
        ValueError: a checkpoint that does not describe a network, `output` of another ending than ``.safetensors``,
            ``.pt`` and ``.pth``, or a weight that 16 bits cannot hold.
    """
    output = Path(output)
    if output.suffix not in (SAFETENSORS, ".pt", ".pth"):
        raise ValueError(f"output: expected a name that ends in .safetensors, .pt or .pth, got {output}")
    checkpoint = run_checkpoint(run)
    model = load_model(checkpoint)
    save_model(model, output, half=half)
    return checkpoint


def run_checkpoint(run: str | Path) -> Path:
    """The weights of a run: its ``model_best.pth``, or else its ``model_final.pth``. Files and kept models stay.

    Raises:
        FileNotFoundError: there is no such run, file or model, or none of these files in the run.
    """
    if not Path(run).is_dir():
        return model_path(run)
    found = next((Path(run, name) for name in WEIGHTS if Path(run, name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{run}: there is neither {' nor '.join(WEIGHTS)} in it")
    return found


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    """The content of a ``.safetensors`` file as `read_checkpoint` gives that of the others."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get(DESCRIPTION_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}
        return {"model": weights} | ({DESCRIPTION_KEY: json.loads(description)} if description else {})
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


class _NoValues(TorchFunctionMode):
    """Leaves out random initial values: to draw them on the meta device, PyTorch would import its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in ("normal_", "trunc_normal_", "kaiming_normal_"):
            return (args or tuple((kwargs or {}).values()))[0]
        return func(*args, **(kwargs or {}))


def _described(description: Mapping[str, Any], weights: dict[str, Tensor]) -> InstanceNet:
    """The network of a description that came with its weights."""
    method = method_class(description["method"])
    settings: Any = from_plain(method.Settings, description["settings"])
    height, width = settings.preprocessing.size
    if height * width > MAX_PIXELS:
        raise ValueError(f"size is {height} x {width} pixels, more than the limit of {MAX_PIXELS}")
    backbone = getattr(settings, "backbone", None)
    if getattr(backbone, "backbone_weights", ""):
        raise ValueError("it names weights to download")
    with torch.device("meta"), _NoValues():  # as a check: a description can claim any size, and here it takes no memory
        method.build(settings).load_state_dict(weights, assign=True)
    model = method.build(settings)
    model.load_state_dict(weights)
    model.scores = from_plain(Scores, description.get("scores", {}))
    return model


# Where files of version 0.1 have the arguments of their network: part, and name in it.
_FORMAT_1 = {
    "preprocessing": {"normalisation": "normalisation", "percentiles": "percentiles", "input_size": "size"}
    | {"pixel_mean": "pixel_mean", "pixel_std": "pixel_std"},
    "backbone": {"norm": "norm", "c0_channels": "c0_channels"},
    "trunk": {"branch": "trunk", "widths": "widths", "head_kernel": "trunk_kernel"},
    "heads": {"branch": "heads", "head_kernel": "head_kernel", "scales": "scales"},
    "targets": {name: name for name in ("radius", "min_side")}
    | {name: name for name in ("heatmap_weight", "single_offset_weight", "group_offset_weight")},
    "decoding": {name: name for name in ("smooth_sigma", "peak_threshold", "hops", "corner_and_centre")}
    | {"nms_threshold": "nms_threshold"},
    "segmentation": {"mask_weight": "mask_weight", "mask_margin": "mask_margin", "mask_threshold": "mask_threshold"}
    | {"pixels_in_flight": "chunk_pixels"},
    "ranking": {"blur_weight": "blur_weight", "overlap_sigma": "overlap_sigma"},
}
_FORMAT_1_NAMES = {
    "proposal_generator.branch.": "keypoint_branch.",
    "roi_heads.mask_head.": "segmentation.",
    "mask_head.": "segmentation.",
}


def _from_format_1(
    arguments: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and weights of a file of version 0.1, as they are written today."""
    settings: dict[str, dict[str, Any]] = {
        part: {new: arguments[old] for old, new in names.items() if old in arguments}
        for part, names in _FORMAT_1.items()
    }
    settings["backbone"]["backbone"] = f"resnet{arguments.get('depth', 50)}"
    settings["segmentation"]["cut_from"] = "s1" if arguments.get("segmentation") == "s1" else "features"
    # It was not kept; a margin was never used without.
    settings["segmentation"]["box_jitter"] = 0.2 if arguments.get("mask_margin") else 0.0
    renamed = {}
    for name, value in weights.items():
        for old, new in _FORMAT_1_NAMES.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        name = name.replace("keypoint_branch.steps.", "keypoint_branch.trunk.steps.")
        renamed[name.replace("segmentation.starts.", "segmentation.project.")] = value
    return {"method": "keypoint_graph", "settings": settings}, renamed

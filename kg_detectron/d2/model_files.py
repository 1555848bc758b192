"""Model files of the core where Detectron2 reads weights.

Detectron2's checkpointer reads no ``.safetensors``, and its models name the weights differently. So its `PathManager`
gives it a checkpoint with the same weights by Detectron2's names, which is written to its cache once, for

    ``model.safetensors``    a model file by its path,
    ``kg://NAME``            a kept model, or a model file by its path.

The description of the model travels in the checkpoint as the version metadata of its ``state_dict``, where our
meta-architectures find it: they load a model file completely or not at all.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import NativePathHandler, PathHandler, get_cache_dir
from torch import Tensor, nn

from kg_detectron.d2.config import drop_initial_weights
from kg_detectron.inference.model_file import DESCRIPTION_KEY, HOST_PREFIX, read_model
from kg_detectron.inference.model_names import SAFETENSORS, model_path
from kg_detectron.io.atomic import replacing
from kg_detectron.io.checksum import file_sha256
from kg_detectron.modeling import InstanceNet, Preprocessing, Scores, method_class
from kg_detectron.modeling.settings import config_keys, from_plain, parts

logger = logging.getLogger(__name__)

PREFIX = "kg://"
_FILE = "file"


class KeptModels(PathHandler):
    """``kg://NAME`` and ``kg:///path/of/a/model.safetensors``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return _checkpoint(model_path(path.removeprefix(PREFIX)), force)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering)


class ModelFiles(NativePathHandler):
    """Local paths, as Detectron2 handles them, but for model files of the core.

    The empty prefix is that of every path without another handler. Files of other projects stay what they are.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [""]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        file = Path(path)
        if file.suffix == SAFETENSORS and file.is_file() and _is_described(file):
            return _checkpoint(file, force)
        return super()._get_local_path(path, force, **kwargs)


for _handler in (KeptModels(), ModelFiles()):
    PathManager.register_handler(_handler, allow_override=True)


def _is_described(file: Path) -> bool:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return DESCRIPTION_KEY in (opened.metadata() or {})
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a model file: {error}") from error


def _checkpoint(file: Path, force: bool) -> str:
    """The checkpoint of a model file; written where it is not in the cache."""
    cache = Path(get_cache_dir(), "kg_detectron")
    checkpoint = cache / f"{file.stem}-{file_sha256(file)[:16]}.pth"
    if force or not checkpoint.is_file():
        description, weights = read_model(file)
        state = OrderedDict((HOST_PREFIX + name, value) for name, value in weights.items())
        state._metadata = {"": {DESCRIPTION_KEY: description | {_FILE: file.name}}}  # type: ignore[attr-defined]
        with replacing(checkpoint) as unfinished:
            torch.save({"model": state}, unfinished)
    return str(checkpoint)


def names_model_file(weights: str) -> bool:
    """Whether ``MODEL.WEIGHTS`` names a model file of the core."""
    return weights.startswith(PREFIX) or weights.endswith(SAFETENSORS)


def model_file_of(state_dict: Mapping[str, Tensor]) -> str | None:
    """The name of the model file that weights come from; None where they come from something else."""
    metadata = getattr(state_dict, "_metadata", {}).get("", {})
    return metadata.get(DESCRIPTION_KEY, {}).get(_FILE)


def without_needless_weights(cfg: CfgNode) -> CfgNode:
    """The config without initial weights of parts, where ``MODEL.WEIGHTS`` has all: nothing need be downloaded."""
    if names_model_file(cfg.MODEL.WEIGHTS):
        cfg = cfg.clone()
        drop_initial_weights(cfg)
    return cfg


def require_all_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Refuse weights that a model to predict with, or one that is loaded from a model file, lacks.

    Detectron2 only warns, and leaves random values in their place.

    Args:
        model: the module that is being loaded; in training mode it may be loaded partly from a checkpoint.
        state_dict, prefix, metadata: see `torch.nn.Module._load_from_state_dict`.

    Raises:
        ValueError: weights are missing or have another shape, or a model file has more.
    """
    file = metadata.get(DESCRIPTION_KEY, {}).get(_FILE)
    if model.training and not file:
        return
    expected = {prefix + name for name in model.state_dict()}
    lost = sorted(expected - state_dict.keys())
    unknown = sorted(name for name in state_dict.keys() - expected if name.startswith(prefix)) if file else []
    for names, fault in ((lost, "are missing or have another shape"), (unknown, "are not in the model of the config")):
        if names:
            raise ValueError(
                f"{file or 'MODEL.WEIGHTS'} does not fit the model of the config: {len(names)} weights {fault}, such "
                f"as {names[0]}"
            )


def take_description(network: InstanceNet, metadata: Mapping[str, Any]) -> None:
    """Give a network to predict with what its model file knows beside the weights (in place).

    The calibration of the scores is the file's, where the config has none. What an image becomes before the network
    sees it must be the same. Other settings, such as thresholds, are the config's; what differs is logged.

    Raises:
        ValueError: the config prepares images in another way than the model was trained for.
    """
    description = metadata.get(DESCRIPTION_KEY)
    if not description:
        return
    trained: Any = from_plain(method_class(description["method"]).Settings, description["settings"])
    for name, part in parts(type(trained)):
        for key, field in config_keys(part):
            if field.metadata.get("initial"):
                continue
            theirs, ours = (getattr(getattr(source, name), field.name) for source in (trained, network.settings))
            if theirs == ours:
                continue
            if part is Preprocessing:
                raise ValueError(
                    f"{key}: the config has {ours}, but {description[_FILE]} was trained with {theirs}; its own "
                    "config is kg_detectron.model_zoo.get_config(FILE, trained=True)"
                )
            logger.warning("%s: %s, as the config says; %s has %s", key, ours, description[_FILE], theirs)
    if network.scores == Scores():
        network.scores = from_plain(Scores, description.get("scores", {}))

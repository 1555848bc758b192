"""Configs and trained models by name, as in ``detectron2.model_zoo``.

    from kg_detectron.d2 import model_zoo

    cfg = model_zoo.get_config("nuclei", trained=True)
    instances = DefaultPredictor(cfg)(image)["instances"]

A name is that of a kept model (``nuclei``, see ``kg-detectron models``) or of a file of the folder ``configs``
(``kg_lite_dsb2018``), which a checkout of the repository has.
"""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, get_cache_dir
from torch import nn

from kg_detectron.d2.config import add_kg_config, drop_initial_weights, merge_config, put_settings
from kg_detectron.inference.model_file import HOST_PREFIX, read_model
from kg_detectron.inference.model_names import kept_models, model_path
from kg_detectron.io.atomic import replacing
from kg_detectron.io.checksum import file_sha256
from kg_detectron.modeling import Scores, method_class
from kg_detectron.modeling.settings import from_plain

PREFIX = "kg://"
_CONFIGS = Path(__file__).parents[2] / "configs"


class KeptModels(PathHandler):
    """``kg://NAME`` and ``kg:///path/of/a/model.safetensors`` as files that Detectron2's own checkpointer loads.

    Detectron2 reads no ``.safetensors``, and names the weights differently: a checkpoint with the same weights by
    Detectron2's names is written to its cache once.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        file = model_path(path.removeprefix(PREFIX))
        cache = Path(get_cache_dir(), "kg_detectron")
        checkpoint = cache / f"{file.stem}-{file_sha256(file)[:16]}.pth"
        if force or not checkpoint.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            _, weights = read_model(file)
            with replacing(checkpoint) as unfinished:
                torch.save({"model": {HOST_PREFIX + name: value for name, value in weights.items()}}, unfinished)
        return str(checkpoint)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(KeptModels(), allow_override=True)


def names() -> list[str]:
    """The names that `get_config` takes: kept models first, then the configs that are here."""
    return [*kept_models(), *sorted(path.stem for path in _CONFIGS.glob("*.yaml"))]


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of a name.

    Args:
        name: a kept model, or a config, with or without ``.yaml``.
        trained: with the weights and the calibration of the scores. Only kept models have them; without, a config names
            its initial weights, and a kept model begins from random ones.

    Returns:
        The config, not frozen.

    Raises:
        ValueError: there is no such name, or ``trained`` of a config, for which no weights are kept.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    name = name.removesuffix(".yaml")
    if name in kept_models():
        description, _ = read_model(kept_models()[name])
        cfg.MODEL.META_ARCHITECTURE = "CellInstanceSegmentation"
        cfg.MODEL.CELLS.METHOD = description["method"]
        put_settings(cfg, from_plain(method_class(description["method"]).Settings, description["settings"]))
        if trained:
            put_settings(cfg, from_plain(Scores, description.get("scores", {})))
            cfg.MODEL.WEIGHTS = PREFIX + name
    elif (_CONFIGS / f"{name}.yaml").is_file():
        if trained:
            raise ValueError(f"{name}: no weights of it are kept; trained are {', '.join(kept_models())}")
        merge_config(cfg, str(_CONFIGS / f"{name}.yaml"))
    else:
        raise ValueError(f"there is no config {name!r}; there are {', '.join(names())}")
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """The model of a name, on a device (the GPU by default, where there is one), in training mode, as Detectron2's.

    Args:
        name: see `get_config`.
        trained: with its weights; otherwise with the initial ones that its config names.

    Raises:
        ValueError: see `get_config`.
    """
    cfg = get_config(name, trained)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if trained:
        drop_initial_weights(cfg)
    model = build_model(cfg)
    if trained:
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model

"""Configs and trained models by name, as in ``detectron2.model_zoo``.

    from kg_detectron import model_zoo

    cfg = model_zoo.get_config("nuclei", trained=True)
    instances = DefaultPredictor(cfg)(image)["instances"]

A name is that of a kept model (``nuclei``, see ``kg-detectron models``), the path of a model file
(``run/model.safetensors``), or the name of a file of the folder ``configs`` (``kg_lite_dsb2018``).
"""

from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from kg_detectron.d2.config import add_kg_config, drop_initial_weights, merge_config, put_settings
from kg_detectron.d2.model_files import PREFIX
from kg_detectron.inference.model_file import read_model
from kg_detectron.inference.model_names import SAFETENSORS, kept_models, model_path
from kg_detectron.modeling import Scores, method_class
from kg_detectron.modeling.settings import from_plain

_PACKAGED = Path(__file__).parents[1] / "configs"  # in a wheel
_CONFIGS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """The names that `get_config` takes: kept models first, then the configs that are here."""
    return [*kept_models(), *sorted(path.stem for path in _CONFIGS.glob("*.yaml"))]


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of a name.

    Args:
        name: a kept model, the path of a model file, or a config, with or without ``.yaml``.
        trained: with the weights and the calibration of the scores, which configs do not have. Without, a config names
            its initial weights, and a model begins from random ones.

    Returns:
        The config, not frozen.

    Raises:
        FileNotFoundError: there is no such model file.
        ValueError: there is no such name, or ``trained`` of a config, for which no weights are kept.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    name = name.removesuffix(".yaml")
    if name in kept_models() or name.endswith(SAFETENSORS):
        description, _ = read_model(model_path(name))
        cfg.MODEL.META_ARCHITECTURE = "CellInstanceSegmentation"
        cfg.MODEL.CELLS.METHOD = description["method"]
        put_settings(cfg, from_plain(method_class(description["method"]).Settings, description["settings"]))
        if trained:
            put_settings(cfg, from_plain(Scores, description.get("scores", {})))
            cfg.MODEL.WEIGHTS = PREFIX + name if name in kept_models() else name
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

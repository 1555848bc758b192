"""Keypoint-graph cell instance segmentation. Importing this package never imports Detectron2.

>>> import kg_detectron
>>> model = kg_detectron.load_model("nuclei")
>>> cells = kg_detectron.predict(model, kg_detectron.read_image("image.tif"))
"""

from typing import TYPE_CHECKING, Any

from kg_detectron._version import __version__

if TYPE_CHECKING:
    from kg_detectron.cells import Cells
    from kg_detectron.export.results import save_results
    from kg_detectron.inference import kept_models, load_model, predict
    from kg_detectron.io.images import read_image
    from kg_detectron.metrics.scoring import evaluate

__all__ = [
    "Cells",
    "__version__",
    "evaluate",
    "kept_models",
    "load_model",
    "predict",
    "read_image",
    "save_results",
]

_MODULES = {
    "Cells": "cells",
    "evaluate": "metrics.scoring",
    "kept_models": "inference",
    "load_model": "inference",
    "model_zoo": "d2",  # needs Detectron2, so not in __all__
    "predict": "inference",
    "read_image": "io.images",
    "save_results": "export.results",
}


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first asked for: PyTorch takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

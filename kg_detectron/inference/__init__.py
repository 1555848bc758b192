"""Trained models on images, with the core alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kg_detectron.inference.fast import make_fast
    from kg_detectron.inference.model_file import export_run, load_model, save_model
    from kg_detectron.inference.model_names import kept_models
    from kg_detectron.inference.predictor import predict

__all__ = ["export_run", "kept_models", "load_model", "make_fast", "predict", "save_model"]

_MODULES = {
    "export_run": "model_file",
    "kept_models": "model_names",
    "load_model": "model_file",
    "make_fast": "fast",
    "predict": "predictor",
    "save_model": "model_file",
}


def __getattr__(name: str) -> Any:
    """The functions, imported when they are first asked for: PyTorch takes seconds, the check of settings does not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kg_detectron.inference.{_MODULES[name]}"), name)

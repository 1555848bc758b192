"""Keypoint-graph cell instance segmentation. Importing this package never imports Detectron2."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_model", "predict"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first asked for: PyTorch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kg_detectron import inference

    return getattr(inference, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Non-maximum suppression: torchvision's operator, with a fake of our own.

Torchvision's fake tells `torch.export` that two boxes at least remain, and an exported program stops where fewer do.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor


def _load_operators() -> None:
    """Load torchvision's compiled operators, without torchvision itself, which takes seconds to import."""
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" not in sys.modules and spec is not None and spec.origin:
        for library in Path(spec.origin).parent.glob("_C.*"):
            if library.suffix in (".so", ".pyd"):
                torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401


_load_operators()


# Not `torch.library.custom_op`, whose first call imports the compiler of PyTorch.
torch.library.define("kg_detectron::nms", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
torch.library.impl("kg_detectron::nms", "default", torch.ops.torchvision.nms)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Drop every box that overlaps a better one by more than the threshold.

    Args:
        boxes: (R,4) xyxy.
        scores: (R,).
        threshold: intersection over union.

    Returns:
        int64, the indices of those that remain, by falling score.
    """
    return torch.ops.kg_detectron.nms(boxes, scores, threshold)


@torch.library.register_fake("kg_detectron::nms")
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)

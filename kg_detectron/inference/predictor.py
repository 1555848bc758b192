"""Prediction for one image."""

import numpy as np
import torch
from torch import Tensor

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.resize import resize_image
from kg_detectron.modeling import KeypointGraphNet


@torch.no_grad()
def predict(model: KeypointGraphNet, image: np.ndarray) -> dict[str, Tensor | MaskCrops]:
    """Find the cells of an image.

    Args:
        model: in evaluation mode.
        image: (H,W,3), BGR, of any type and levels that the model's normalisation takes, as `io.read_image` gives it:
            for the fixed one uint8, uint16, or float 0..1. It is resized to the model's training size.

    Returns:
        ``boxes`` (R,4) xyxy continuous, pixels of the image; ``scores`` (R,), falling; ``labels`` (R,), all 1;
        ``masks`` (`MaskCrops`) of the image's size.

    Raises:
        ValueError: for an image of another shape, type or range, or a model in training mode.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected shape (H,W,3), got {image.shape}")
    if model.training:
        raise ValueError("model: expected evaluation mode, call model.eval() first")
    size = image.shape[:2]
    normalised = Normalisation(model.normalisation, model.percentiles)(image)
    resized = resize_image(normalised, model.input_size)
    pixels = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).to(model.pixel_mean.device)
    result = model([pixels])[0]
    scale = [size[1] / model.input_size[1], size[0] / model.input_size[0]] * 2
    result["boxes"] = result["boxes"] * result["boxes"].new_tensor(scale)
    result["masks"] = result["masks"].resized(size)
    return result

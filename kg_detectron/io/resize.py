"""Resizing that keeps continuous coordinates exact: x becomes x * new width / old width, in images and labels alike."""

import cv2
import numpy as np


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H,W) or (H,W,C) to size (height, width), not keeping the aspect.

    An axis that shrinks takes the mean over the area, one that grows is interpolated bilinearly.
    """
    height, width = size
    # One step after the other: OpenCV averages areas only where no axis grows.
    shrunk = (min(width, image.shape[1]), min(height, image.shape[0]))
    image = cv2.resize(np.ascontiguousarray(image), shrunk, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label image (H,W) to size (height, width): the label at the nearest pixel centre."""
    return cv2.resize(np.ascontiguousarray(labels), (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)

"""Grey images that are stored as three equal channels.

H, W: height and width in pixels; C: channels.
"""

import numpy as np

from kg_detectron.io.lazy import is_mapped

_SAMPLED = 16  # channels are compared at first in each of so many rows and columns


def is_grey(image: np.ndarray) -> bool:
    """Whether all channels of an image (H, W, C) are equal."""
    if image.strides[2] == 0:
        return True
    first, sample = image[..., 0], image[::_SAMPLED, ::_SAMPLED]
    if not (sample == sample[..., :1]).all():
        return False
    return all(np.array_equal(image[..., c], first) for c in range(1, image.shape[2]))


def distinct_channels(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C); of a grey one in memory the first channel alone (H, W, 1)."""
    if image.strides[2] and is_mapped(image):
        return image
    return image[..., :1] if is_grey(image) else image

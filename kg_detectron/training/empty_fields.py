"""Windows without a cell: what a model makes of an empty field of view.

Percentile normalisation spreads the noise of an empty field over all grey levels, and the search for the scale enlarges
it. Training images have cells nearly everywhere, so without such windows a model takes enlarged noise for cells.
"""

import math

import cv2
import numpy as np

from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.resize import resize_image

# Octaves of magnification: the search for the scale enlarges up to four times.
_MAGNIFICATION = (-1.0, 2.25)
# Pixels; JPEG stores blocks of this side.
_JPEG_BLOCK = 8


def empty_field(side: int, generator: np.random.Generator) -> np.ndarray:
    """A random window of an empty field: noise as cameras and files have it, normalised by percentiles, at any scale.

    The noise is Gaussian or that of few photons, sometimes smooth, in lines or in the blocks of JPEG, with hot pixels
    and uneven light.

    Args:
        side: of the window, pixels of the network's input.
        generator: source of the randomness.

    Returns:
        (side, side, 3) float32 in 0..255.
    """
    scale = 2.0 ** generator.uniform(*_MAGNIFICATION)
    size = math.ceil(side / scale)
    field = _noise(size, 3 if generator.random() < 0.3 else 1, generator)
    if generator.random() < 0.2:
        hot = generator.random((size, size)) < 10.0 ** generator.uniform(-4.5, -2.5)
        field[hot] += field.std() * generator.uniform(5, 40)
    if generator.random() < 0.4:
        y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
        slopes = generator.normal(0, 1, 3)
        field += (field.std() * generator.uniform(0, 4) * (slopes @ np.stack((x, y, x**2 + y**2), axis=1)))[..., None]
    field = np.broadcast_to(Normalisation("percentile")(field), (size, size, 3))
    return resize_image(field, (side, side))


def _noise(size: int, channels: int, generator: np.random.Generator) -> np.ndarray:
    """(size, size, channels) float32."""
    shape = (size, size, channels)
    if generator.random() < 0.3:
        photons = generator.poisson(2.0 ** generator.uniform(-1, 7), shape)
        noise: np.ndarray = photons.astype(np.float32)
    else:
        noise = generator.standard_normal(shape, dtype=np.float32)
    kind = generator.random()
    if kind < 0.3:
        noise = cv2.GaussianBlur(noise, (0, 0), generator.uniform(0.3, 2)).reshape(shape)
    elif kind < 0.4:
        blocks = noise[::_JPEG_BLOCK, ::_JPEG_BLOCK]
        coarse = np.kron(blocks, np.ones((_JPEG_BLOCK, _JPEG_BLOCK, 1), np.float32))[:size, :size]
        noise = coarse + noise * np.float32(generator.uniform(0, 1))
    elif kind < 0.5:
        noise += (
            noise.std() * np.float32(generator.uniform(0.3, 2)) * generator.standard_normal((size, 1, 1), np.float32)
        )
    if generator.random() < 0.3:  # few levels
        noise = np.round(noise / noise.std() * generator.uniform(0.5, 4))
    return noise

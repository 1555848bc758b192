"""Random windows of labelled images at a random scale, and random changes of their colours.

Images are (H, W, 3) BGR in 0..255; labels are (H, W) uint16, 0 background. All randomness comes from a
`numpy.random.Generator` that the caller passes.
"""

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from scipy import ndimage

from kg_detectron.io.stains import DYES, density_of_first

# An image that is shrunk further than this is averaged over areas first, as in prediction.
_AREA_BELOW = 0.95


@dataclass(frozen=True)
class GeometrySettings:
    """How windows are cut.

    Attributes:
        window: side of the square window, pixels of the network's input.
        narrow, wide: the scale is multiplied by 2^u, u uniform within -narrow..narrow or -wide..wide.
        wide_share: probability of the wide range.
        rotation: probability of a rotation by any angle; otherwise it is a multiple of 90 degrees.
        stretch: the image is stretched along one direction by 2^u, u uniform within -stretch..stretch.
        stretch_share: probability of that.
        on_cell: probability that the window contains a random cell's centre, not only a random point.
        smallest_side: an image is not shrunk below this side by the jitter, pixels.
        reflection: probability that a window reflects the image and its labels beyond the edge of the image; otherwise
            the edge pixels continue, without labels, as in prediction.
        empty: probability that the window is an empty field of view instead, see `empty_field`.
    """

    NODE: ClassVar[str] = "INPUT.GEOMETRY"

    window: int = 256
    narrow: float = 0.35
    wide: float = 1.2
    wide_share: float = 0.45
    rotation: float = 0.4
    stretch: float = 0.3
    stretch_share: float = 0.25
    on_cell: float = 0.85
    smallest_side: int = 144
    reflection: float = 0.75
    empty: float = 0.04


# Images of bright cells on dark have a median grey level below, 0..1.
_DARK = 0.25


@dataclass(frozen=True)
class ColourSettings:
    """How colours and grey levels change: probabilities, and the sizes of the changes.

    Attributes:
        inversion: probability of the negative.
        grey: probability that a coloured image loses its colours.
        tint: probability that a grey image is mapped to the colours between two random ones.
        permutation: probability that the channels change places.
        stain: probability that the hue, the saturation and the channels' optical densities of a coloured image change.
        dyes: probability that the optical densities of its channels are mixed at random besides, as other dyes would.
        haematoxylin: probability that a coloured image is shown as a grey one of about its density of haematoxylin.
        section: probability that an image of bright cells is shown as a stained section.
        contrast, brightness, gamma: contrast times 2^u, plus grey levels, gamma 2^u; u uniform within +- the value.
        levels: probability of those three.
        illumination: probability of a linear ramp of brightness.
        blur: probability of a Gaussian blur, sigma up to 1.5 pixels.
        noise: probability of Gaussian noise, standard deviation up to 16 grey levels.
    """

    NODE: ClassVar[str] = "INPUT.COLOURS"

    inversion: float = 0.05
    grey: float = 0.1
    tint: float = 0.08
    permutation: float = 0.15
    stain: float = 0.6
    dyes: float = 0.5
    haematoxylin: float = 0.25
    section: float = 0.1
    contrast: float = 0.6
    brightness: float = 32.0
    gamma: float = 0.7
    levels: float = 0.7
    illumination: float = 0.1
    blur: float = 0.2
    noise: float = 0.25


def random_window(
    image: np.ndarray,
    labels: np.ndarray,
    natural_scale: float,
    centres: np.ndarray,
    settings: GeometrySettings,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a random window: scaled, rotated, mirrored, stretched. See `GeometrySettings` for what lies beyond the image.

    Args:
        image: (H, W, 3) uint8 or float32.
        labels: (H, W) uint16.
        natural_scale: pixels of the network's input for one of the image, before the jitter.
        centres: (M, 2) x, y of the cells, pixels.
        settings: see `GeometrySettings`.
        generator: source of the randomness.

    Returns:
        The window's image (w, w, 3) float32, its labels (w, w) int32, and for every number 0..n of these, the number of
        the cell in ``labels`` that it is a part or a reflection of, (n + 1,) int64.
    """
    height, width = labels.shape
    octaves = settings.wide if generator.random() < settings.wide_share else settings.narrow
    scale = natural_scale * 2.0 ** generator.uniform(-octaves, octaves)
    scale = max(scale, min(natural_scale, settings.smallest_side / min(height, width)))
    turn: float = np.pi / 2 * generator.integers(4)
    if generator.random() < settings.rotation:
        turn = generator.uniform(0, 2 * np.pi)
    stretch, direction = 1.0, generator.uniform(0, np.pi)
    if generator.random() < settings.stretch_share:
        stretch = 2.0 ** generator.uniform(-settings.stretch, settings.stretch)
    mirror = generator.random() < 0.5
    reflects = generator.random() < settings.reflection

    half = settings.window / 2 / scale
    point = None
    if len(centres) and generator.random() < settings.on_cell:
        point = centres[generator.integers(len(centres))]
    centre = [
        _window_centre(length, half, None if point is None else point[axis], generator)
        for axis, length in enumerate((width, height))
    ]

    # From window pixels, relative to the window's centre, to image pixels, relative to the chosen centre.
    axes = _rotation(direction) @ np.diag([stretch**-0.5, stretch**0.5]) @ _rotation(-direction)
    matrix = axes @ _rotation(turn) @ np.diag([-1.0 if mirror else 1.0, 1.0]) / scale
    border = cv2.BORDER_REFLECT if reflects else cv2.BORDER_CONSTANT
    labels = _warp(labels, matrix, np.array(centre), settings.window, cv2.INTER_NEAREST, border)
    labels, origin = _separated(labels) if reflects else (labels.astype(np.int32), np.arange(1 + int(labels.max())))
    if scale < _AREA_BELOW:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        factor = np.array([size[0] / width, size[1] / height])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        matrix, centre = factor[:, None] * matrix, np.array(centre) * factor
    border = cv2.BORDER_REFLECT if reflects else cv2.BORDER_REPLICATE
    image = _warp(image, matrix, np.array(centre), settings.window, cv2.INTER_LINEAR, border)
    return image.astype(np.float32), labels, origin


def _window_centre(length: int, half: float, point: float | None, generator: np.random.Generator) -> float:
    """Centre of a window on one axis of an image: inside the image where it fits, else around it."""
    low, high = sorted((half, length - half))
    if point is not None and low < high and length > 2 * half:
        low, high = max(low, min(high, point - half)), min(high, max(low, point + half))
    return float(generator.uniform(low, high))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _warp(
    array: np.ndarray, matrix: np.ndarray, centre: np.ndarray, side: int, interpolation: int, border: int
) -> np.ndarray:
    """Sample an array at matrix @ (p - side / 2) + centre for the pixel centres p of a window; continuous pixels."""
    shift = centre - matrix @ np.full(2, side / 2) + matrix @ np.full(2, 0.5) - 0.5
    affine = np.concatenate([matrix, shift[:, None]], axis=1)
    return cv2.warpAffine(array, affine, (side, side), flags=interpolation | cv2.WARP_INVERSE_MAP, borderMode=border)


def _separated(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A cell and its reflection become two cells, unless they touch. (w, w) uint16 -> int32, and their origin."""
    result = labels.astype(np.int32)
    count = int(labels.max(initial=0))
    origin = list(range(count + 1))
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is None:
            continue
        parts, components = cv2.connectedComponents((labels[place] == number).astype(np.uint8), connectivity=8)
        for part in range(2, parts):
            count += 1
            result[place][components == part] = count
            origin.append(number)
    return result, np.array(origin, np.int64)


def random_colours(image: np.ndarray, settings: ColourSettings, generator: np.random.Generator) -> np.ndarray:
    """Change colours and grey levels at random.

    Args:
        image: (h, w, 3) float32 BGR in 0..255.
        settings: see `ColourSettings`.
        generator: source of the randomness.

    Returns:
        (h, w, 3) float32 in 0..255, a new array.
    """

    def happens(probability: float) -> bool:
        return generator.random() < probability

    image = image / 255
    grey = image.mean(axis=2, keepdims=True)
    if np.abs(image - grey).mean() > 0.01:
        if happens(settings.stain):
            image = _stained(image, generator)
        if happens(settings.dyes):
            image = _with_other_dyes(image, generator)
        if happens(settings.haematoxylin):
            image = _haematoxylin(image, generator)
        elif happens(settings.grey):
            weights = generator.dirichlet((2, 2, 2)).astype(np.float32)
            image = np.repeat((image @ weights)[..., None], 3, axis=2)
        if happens(settings.permutation):
            image = image[..., generator.permutation(3)]
    elif np.median(grey) < _DARK and happens(settings.section):
        image = _section(grey[..., 0], generator)
        if happens(settings.haematoxylin):
            image = _haematoxylin(image, generator)
    elif happens(settings.tint):
        dark, bright = generator.uniform(0, 0.4, 3), generator.uniform(0.5, 1, 3)
        image = (dark + (bright - dark) * grey).astype(np.float32)
    if happens(settings.inversion):
        image = 1 - image
    if happens(settings.levels):
        image = np.clip(image, 0, 1) ** np.float32(2.0 ** generator.uniform(-settings.gamma, settings.gamma))
        pivot = image.mean() if happens(0.5) else 0.0
        contrast = 2.0 ** generator.uniform(-settings.contrast, settings.contrast)
        offset = generator.uniform(-settings.brightness, settings.brightness) / 255
        image = (image - pivot) * np.float32(contrast) + np.float32(pivot + offset)
    if happens(settings.illumination):
        rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) for side in image.shape[:2])
        slopes = generator.uniform(-0.4, 0.4, 2).astype(np.float32)
        image = image * (1 + slopes[0] * rows[:, None, None] + slopes[1] * columns[None, :, None])
    if happens(settings.blur):
        image = cv2.GaussianBlur(image, (0, 0), generator.uniform(0.3, 1.5))
    if happens(settings.noise):
        channels = 1 if happens(0.7) else 3
        noise: np.ndarray = generator.standard_normal((*image.shape[:2], channels), dtype=np.float32)
        if happens(0.3):
            noise = 2 * cv2.GaussianBlur(noise, (0, 0), generator.uniform(0.5, 1.2)).reshape(noise.shape)
        image = image + noise * np.float32(generator.uniform(0, 16) / 255)
    return np.clip(image * 255, 0, 255).astype(np.float32)


def _stained(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Other hue, saturation and optical densities, (h, w, 3) in 0..1."""
    hsv = cv2.cvtColor(np.ascontiguousarray(image, np.float32), cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0] + generator.uniform(-25, 25)) % 360
    hsv[..., 1] = np.clip(hsv[..., 1] * 2.0 ** generator.uniform(-0.8, 0.6), 0, 1)
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    densities = (2.0 ** generator.uniform(-0.4, 0.4, 3)).astype(np.float32)
    return np.clip(image, 1 / 255, 1) ** densities


def _with_other_dyes(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each channel's optical density a random mixture of all, (h, w, 3) in 0..1."""
    mixing = np.eye(3) + generator.normal(0, 0.35, (3, 3))
    densities = -np.log(np.clip(image, 1 / 255, 1)) @ mixing.astype(np.float32)
    return _stretched(np.exp(-np.maximum(densities, 0)), generator)


def _haematoxylin(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The first of the dyes that are about `DYES`, alone and grey, (h, w, 3) in 0..1."""
    density = density_of_first(DYES + generator.normal(0, 0.05, DYES.shape), image).astype(np.float32)
    low, high = np.percentile(density, (1, 99.8)).astype(np.float32)
    grey = 1 - np.clip((density - low) / np.maximum(high - low, 1e-3), 0, 1)
    return np.repeat(grey[..., None], 3, axis=2)


def _section(cells: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A section in transmitted light, (h, w, 3) BGR in 0..1: the cells (h, w) in one dye, tissue between in another.

    By the law of Beer and Lambert; the dyes vary around haematoxylin and eosin.
    """
    tissue = np.zeros_like(cells)
    for sigma in (1.0, 4.0, 16.0):
        noise = generator.standard_normal(cells.shape, dtype=np.float32)
        smooth = cv2.GaussianBlur(noise, (0, 0), sigma)
        tissue += np.float32(generator.uniform(0, 1)) * smooth / smooth.std()
    tissue = 1 / (1 + np.exp(-tissue - np.float32(generator.uniform(-1, 1))))
    dyes = np.abs(DYES[:2] + generator.normal(0, 0.12, (2, 3))).astype(np.float32)
    amounts = generator.uniform((0.5, 0.05), (2.0, 1.2)).astype(np.float32)
    density = np.stack((cells * amounts[0], tissue * amounts[1]), axis=2) @ dyes
    return _stretched(np.exp(-density), generator)


def _stretched(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As bright as percentile normalisation leaves images, and in part as dark."""
    low, high = np.percentile(image, (1, 99.8), axis=(0, 1)).astype(np.float32)
    low *= np.float32(generator.uniform(0, 1))
    return np.clip((image - low) / np.maximum(high - low, 1e-3), 0, 1)

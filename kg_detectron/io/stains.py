"""Dyes: how much of one is where in stained tissue, in transmitted light, and pictures of several in fluorescence.

H, W: height and width in pixels.
"""

from dataclasses import dataclass

import numpy as np

from kg_detectron.io.normalisation import Levels

# Optical densities of haematoxylin, eosin and diaminobenzidine in blue, green and red (Ruifrok and Johnston 2001).
DYES = np.array(((0.29, 0.70, 0.65), (0.11, 0.99, 0.07), (0.78, 0.57, 0.27)))

# The median grey level of a stained image is above, of 0..1, and its channels differ from grey by more, on average.
# Between those of 36 sections and smears (0.51, 0.025) and of other images (0.27 or colourless) that were looked at.
_BRIGHT, _COLOURED = 0.4, 0.01
# A picture of several dyes in fluorescence is darker; two of its channels have a range of at least this share of the
# largest, and correlate by less. Those of eight merged pictures correlated by 0.32 to 0.86.
_SHOWN, _ALIKE = 0.1, 0.9
_SAMPLE, _SAMPLE_OF_COLOURS = 2**21, 2**18  # pixels
_PERCENTILES = (1, 99.8)
_TOGETHER = 2**20  # pixels, which bounds the memory

SINGLE_COLOURS = (BLUE := "blue", "green", "red")  # by channel


@dataclass(frozen=True)
class HaematoxylinLevels:
    """A stained image as a grey one of its density of haematoxylin, dark on bright, pixel by pixel.

    Attributes:
        white: (3,) BGR, the levels of clear glass.
        low, high: the densities that become 255 and 0.
    """

    white: np.ndarray
    low: float
    high: float

    def __call__(self, part: np.ndarray) -> np.ndarray:
        """Any part (h, w, 3) of the image -> (h, w, 3) float32 of 0..255, grey."""
        grey = np.empty(part.shape[:2], np.float32)
        rows = max(1, _TOGETHER // max(1, part.shape[1]))
        for start in range(0, len(part), rows):
            density = haematoxylin_density(part[start : start + rows], self.white)
            grey[start : start + rows] = (255 * (self.high - density) / (self.high - self.low)).clip(0, 255)
        return np.repeat(grey[..., None], 3, axis=2)


def haematoxylin_levels(
    image: np.ndarray, white: np.ndarray, *, is_stained: bool | None = None
) -> HaematoxylinLevels | None:
    """How a stained image becomes one of its haematoxylin; None for any other image.

    Stained is an image that is bright and coloured: no fluorescence, no phase contrast, nothing grey.

    Args:
        image: (H, W, 3) BGR of any real type, may be a `numpy.memmap`.
        white: (3,) levels of clear glass.
        is_stained: whether it is known to be; None looks.
    """
    sample = _sample(image, _SAMPLE)
    if sample.strides[2] == 0 or not (np.asarray(white) > 0).all():
        return None
    share = np.nan_to_num(sample / white, nan=0.0).clip(0, 1)
    grey = share.mean(axis=2)
    if is_stained is None:
        is_stained = np.median(grey) > _BRIGHT and np.abs(share - grey[..., None]).mean() > _COLOURED
    if not is_stained:
        return None
    low, high = np.percentile(haematoxylin_density(sample, white), _PERCENTILES)
    return HaematoxylinLevels(white, float(low), float(high)) if high > low else None


def haematoxylin_density(image: np.ndarray, white: np.ndarray) -> np.ndarray:
    """The density of haematoxylin, (..., 3) -> (...) float32, at least 0, see `density_of_first`."""
    share = np.nan_to_num(np.asarray(image, np.float32) / white, nan=0.0)
    return np.maximum(density_of_first(DYES, share), 0).astype(np.float32)


def density_of_first(dyes: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The density of the first of three dyes, where these and nothing else take light away.

    By the law of Beer and Lambert, each channel's optical density is the sum of those of the dyes. At least 1/255 of
    the light comes through, which is what 8 bits tell apart.

    Args:
        dyes: (3, 3) optical densities, of each dye in each channel.
        share: (..., 3) of the light that comes through, 0..1.

    Returns:
        (...), below 0 where the dyes do not explain the colour.
    """
    return -np.log(share.clip(1 / 255, 1)) @ np.linalg.inv(dyes)[:, 0]


@dataclass(frozen=True)
class SingleColour:
    """One colour of a picture as a grey image.

    Attributes:
        name: of the colour.
        channel: 0 blue, 1 green, 2 red.
        levels: of this channel.
    """

    name: str
    channel: int
    levels: Levels

    def __call__(self, part: np.ndarray) -> np.ndarray:
        """Any part (h, w, 3) of the image -> (h, w, 3) float32 of 0..255, grey."""
        return np.repeat(self.levels(part[..., self.channel : self.channel + 1]), 3, axis=2)


def single_colour(name: str, levels: Levels) -> SingleColour:
    """One of `SINGLE_COLOURS` of a picture whose channels, BGR, have these levels."""
    channel = SINGLE_COLOURS.index(name)
    return SingleColour(name, channel, Levels(levels.low[[channel]], levels.high[[channel]]))


def colours_of_dyes(image: np.ndarray) -> list[str]:
    """Those of `SINGLE_COLOURS` that show something in a picture of one dye or several in fluorescence; none of other
    images.

    Such a picture is dark, and its channels do not all show the same. Those that show nothing have noise, which levels
    of their own would make as bright as the dye.

    Args:
        image: (H, W, 3) BGR of any real type, may be a `numpy.memmap`.
    """
    sample = _sample(image, _SAMPLE_OF_COLOURS)
    if (sample == sample[..., :1]).all():
        return []  # grey, before anything is sorted: a training looks at all its images
    values = np.nan_to_num(sample.reshape(-1, 3).astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = np.percentile(values, _PERCENTILES, axis=0)
    spans = high - low
    shown = [c for c in range(3) if spans[c] > 0 and spans[c] >= _SHOWN * spans.max()]
    if not shown or (len(shown) == 1 and np.count_nonzero(spans) == 1):
        return []  # no noise that could become bright
    share = ((values[:, shown] - low[shown]) / spans[shown]).clip(0, 1)
    is_alike = len(shown) > 1 and np.corrcoef(share, rowvar=False).min() >= _ALIKE
    return [] if is_alike or np.median(share.mean(axis=1)) > _BRIGHT else [SINGLE_COLOURS[c] for c in shown]


def _sample(image: np.ndarray, most: int) -> np.ndarray:
    """Every n-th pixel of an image in rows and columns, so that there are about so many at most."""
    step = int(np.ceil(np.sqrt(max(1.0, image.shape[0] * image.shape[1] / most))))
    return np.asarray(image[::step, ::step])

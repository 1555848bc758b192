"""What a first look of the model decides: the scale of an image, from its cells, the view of a stained one, and the
channel of one with several."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import cv2
import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.io.stains import BLUE, SingleColour
from kg_detectron.modeling.preprocessing import (
    BLOCK,
    COLOURS,
    HAEMATOXYLIN,
    NetworkImage,
    Preprocessing,
    Scale,
    View,
    block_side,
)

if TYPE_CHECKING:
    from kg_detectron.modeling.instance_net import InstanceNet

Name = TypeVar("Name", int, str)

# Scales that the first look may try, beginning with 1, as factors of the one of the training images, where these had
# one, or else of the image's own pixels. A model that was trained on cells of half to twice its diameter sees cells of
# any diameter that is not far off at one of them.
FIRST_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
# It goes on to the next smaller or larger scale while the estimate is within this factor of the end of those tried, or
# beyond it.
NEAR_END = math.sqrt(2)
# Side of the part of an image that is looked at, pixels of the network's input. In the first look it is smaller where
# the image is small: this share of the image's longer side, but not less than the smallest part.
PART = 384
SMALLEST_PART, SHARE = 192, 9 / 32
# A detection of the first pass counts less, the further its diameter in the network's input is from that of the
# training; octaves.
SPREAD = 0.75
# The second pass is repeated once where the diameter changes by more than this; octaves.
SETTLED = 0.25
# If less than this of the area covered by cells is left then, what was seen were fragments of cells: scales for cells
# so many times as large are looked at too, and the one with the largest area is taken.
LOST = 0.5
COARSER = (math.sqrt(2), 2.0)
# Cells that are needed for an estimate from the first scales, and to correct one.
ENOUGH = 3
# A finer scale is taken where the trust in its cells is so many times as high: these are the nuclei of the cells seen
# before. In images of whole cells and nuclei it was 2.0 to 2.3 times as high, in stained tissue and fluorescence 1.04
# times at most. In phase contrast it was up to 3.7 times as high, for grains in the cells; but their mean score was
# 0.71 at most, and that of nuclei 0.77 and more.
MORE_CELLS = 1.6
SURE = 0.73
# A scale FAR times as fine is taken without another look where a pixel of the image has so many times the trust: 3.4 to
# 4.7 times in smears whose cells were taken for nuclei, 2.1 times at most in other images.
FAR, FAR_MORE_CELLS = 4, 2.7
# A scale coarser than this share of the estimate is taken where the cells that it shows cover so many times the area,
# and this share of it at least, of an estimate that the model is not sure of: of few large cells the spots in them may
# be seen alone. In two such images it was 18 and 54 times as much; where the estimate was right, 2.7 times at most.
COARSE, COARSE_MORE_AREA, COARSE_LEAST = 0.6, 4.0, 0.013
# Where fewer cells of a stained image are expected, its scale is estimated from the haematoxylin alone too, and taken
# if so many times as many cells are expected in a pixel of the image: 32 times in the one image where it was so.
FEW, MANY_MORE = 10, 10
# Where most of the cells' area belongs to larger ones, as to a nucleus among pieces of others that the edge cuts, these
# are not enlarged beyond so many pixels of the network's input, for it sees few larger ones.
LARGE = 64.0
# Specks of less than so many pixels are no cells but single photons, unless the training images had such cells.
SMALLEST_CELL = 4.0
# Of a picture of several dyes, a colour that shows less than this share of the area of cells that another shows, as a
# marker of few of them does, is not taken: 0.11 at most for the nuclei in mitosis of one picture; DNA had 0.14 at
# least. Blue, the usual colour of DNA, may be so much less sure than another: in one picture it was, by 0.016.
FAIR_SHARE, BLUE_IS_USUAL = 0.12, 0.05
# Of the channels of an image the model takes the one that it is surer of by so much than of every other, as it was by
# 0.09 and more in seven images of four laboratories, or that shows so many times the area of those that it is about as
# sure of, as a stain of all nuclei does beside one of few. Two stains of nuclei are much alike.
CLEARLY, CLEARLY_MORE = 0.05, 2.0
# An image is not enlarged beyond so many pixels of the network's input, whatever the estimate: time and memory.
LARGEST = 2**24
# Training images are alike in the size of their cells where all but the extremes differ by this factor at most.
ALIKE = 2.0


def diameters(cells: Cells) -> np.ndarray:
    """(R,) diameters of the circles of the cells' areas, pixels: 2 sqrt(area / pi)."""
    areas = np.array([int(mask.sum()) for mask, _ in cells.masks.pixels()], dtype=float)
    return 2 * np.sqrt(areas / math.pi)


@torch.no_grad()
def estimate_scale(model: "InstanceNet", image: np.ndarray, levels: View) -> Scale:
    """The scale at which the cells of an image get the diameter that the model expects in a prediction.

    The model looks for cells in a part of the image of bounded size, the one with most contrast. First at as many
    scales as it takes: every cell that it takes for true votes for its diameter, with its score and the more, the
    closer it is to the trained diameter; the weighted median decides, unless a finer scale shows more cells in the
    same part. Then at the scale that follows, where the median weighted by the scores corrects it; what changes much is
    looked at again, and at coarser scales if cells are lost by it. Where the model finds no cell at the scale that
    follows, as in noise, the image keeps its pixels, or gets the scale of the training images.

    Where all training images had one scale (`Preprocessing.image_diameter`), the first look begins with it, and goes no
    further if the cells have about the trained diameter there: a model of few images may be good at their own scale
    and see cells in anything at others.

    Args:
        model: in evaluation mode.
        image: (H, W, 3), may be a `numpy.memmap`.
        levels: see `Preprocessing.views`.
    """
    trained, typical = model.preprocessing.diameter, model.preprocessing.image_diameter
    most = max(FIRST_SCALES[-1], trained / (typical or trained))
    smallest = trained / min(most, max(1.0, math.sqrt(LARGEST / math.prod(image.shape[:2]))))
    contrast = _contrast(image, levels)
    look = _settled(model, image, levels, contrast, smallest)
    if look is None:
        return no_cell(model.preprocessing)
    if typical is None and look.mean < SURE:
        look = _coarser(model, image, levels, contrast, look)
    diameter = look.corrected if look.found >= ENOUGH else look.diameter
    diameter = max(diameter, look.large * model.preprocessing.predicted_diameter / LARGE)
    seen_as = trained / max(diameter / model.preprocessing.enlargement, smallest)
    return Scale(BLOCK / block_side(seen_as), f"estimated from cells of about {diameter:.0f} pixels")


def _settled(
    model: "InstanceNet", image: np.ndarray, levels: View, contrast: np.ndarray, smallest: float
) -> "_Look | None":
    """The look at the scale that `estimate_scale` comes to by scales near 1; None where it shows no cell.

    Args:
        contrast: see `_contrast`.
        smallest: diameter, pixels of the image, down to which cells are enlarged.
    """
    trained, typical = model.preprocessing.diameter, model.preprocessing.image_diameter
    start = trained / (typical or trained)
    density: dict[float, float] = {}
    single: set[float] = set()
    first_part = round(min(max(SMALLEST_PART, SHARE * max(image.shape[:2])), PART))
    values, weights = [np.zeros(0)], [np.zeros(0)]
    diameter, best = None, None
    tried: list[float] = []
    while factors := _scales_to_try(tried, best, bool(typical)):
        tried += factors
        for factor in factors:
            seen = NetworkImage(image, levels, start * factor)
            if max(seen.shape[:2]) < BLOCK:
                continue
            part = _part(seen, contrast, first_part)
            found, trust = _votes(_cells(model, seen, part), trained)
            density[seen.scale[0]] = _density(trust, part, seen)
            if trust.sum() <= 1:
                single.add(seen.scale[0])
            values.append(found / seen.scale[0])
            # All parts have about the same size for the network, so each scale has as many votes as it fills its part
            # with cells. The diameter lets a cell outvote the fragments that a finer scale finds in it.
            weights.append(trust * found)
        diameter = weighted_median(np.concatenate(values), np.concatenate(weights))
        best = None if diameter is None else trained / diameter / start
        if best is not None and best > 1 and sum(map(len, values)) < ENOUGH:
            best = None  # a few small ones may be fragments of cells that too fine a scale does not show
    if diameter is None:
        return None
    diameter /= _finer(model, image, levels, contrast, first_part, trained / diameter, density, single)
    diameter = max(diameter, smallest)
    look = _look(model, image, levels, contrast, diameter)
    if not look.found:
        return None
    corrected = max(look.corrected, smallest)
    if look.found >= ENOUGH and abs(math.log2(corrected / look.diameter)) >= SETTLED:
        first, look = look, _look(model, image, levels, contrast, corrected)
        is_seen_again = look.found >= ENOUGH
        if look.coverage < LOST * first.coverage:
            coarser = [_look(model, image, levels, contrast, factor * diameter) for factor in COARSER]
            look = max(first, look, *coarser, key=lambda one: one.coverage)
        elif not is_seen_again:
            look = first
        if look is first and not is_seen_again:
            look = first._replace(corrected=first.diameter)
    return None if typical is None and look.corrected < SMALLEST_CELL else look


def _coarser(model: "InstanceNet", image: np.ndarray, levels: View, contrast: np.ndarray, look: "_Look") -> "_Look":
    """A look at a coarser scale that shows far more of the image covered by cells; ``look`` where there is none."""
    trained, least = model.preprocessing.diameter, COARSE_MORE_AREA * look.coverage
    coarse = [one for one in FIRST_SCALES if one <= COARSE * trained / look.diameter]
    looks = [
        _look(model, image, levels, contrast, trained / one) for one in coarse if one * max(image.shape[:2]) >= BLOCK
    ]
    best = max(looks, key=lambda one: one.coverage, default=look)
    if best.mean < SURE or best.coverage <= max(least, COARSE_LEAST):
        return look
    settled = _look(model, image, levels, contrast, best.large)
    return settled if settled.coverage > least else look


class _Look(NamedTuple):
    """What the model sees in a part of an image, at the scale of a diameter, pixels of the image."""

    diameter: float
    found: int  # cells
    corrected: float  # median diameter of these, by their scores
    large: float  # the diameter at which half of the cells' area is reached, by their scores
    coverage: float  # area of the cells, by the trust in them, for a pixel of the part
    mean: float = 1.0  # score of the cells, 0 where there are none


def _look(model: "InstanceNet", image: np.ndarray, levels: View, contrast: np.ndarray, diameter: float) -> _Look:
    trained = model.preprocessing.diameter
    seen = NetworkImage(image, levels, trained / diameter)
    part = _part(seen, contrast, PART)
    cells = _cells(model, seen, part)
    found, trust = _votes(cells, trained)
    scores, sizes = cells.scores.cpu().numpy(), found / seen.scale[0]
    corrected = weighted_median(sizes, scores) or diameter
    large = weighted_median(sizes, scores * found**2) or diameter
    coverage, mean = float((trust * found**2).sum()) / _pixels(part), float(scores.mean()) if len(cells) else 0.0
    return _Look(diameter, len(cells), corrected, large, coverage, mean)


def no_cell(preprocessing: Preprocessing) -> Scale:
    """The scale of an image in which no cell is found."""
    reason = "for the model found no cell to estimate a diameter from"
    if preprocessing.image_diameter is None:
        return Scale(1.0, f"own pixels, {reason}")
    scale = preprocessing.predicted_diameter / preprocessing.image_diameter
    return Scale(scale, f"scale of the training images, {reason}")


def common_diameter(diameters: Sequence[float]) -> float | None:
    """The median of the median diameters of training images, where these images are alike; None where they are not."""
    if not len(diameters):
        return None
    low, median, high = np.percentile(diameters, (5, 50, 95))
    return round(float(median), 1) if high <= ALIKE * low else None


@torch.no_grad()
def choose_view(
    model: "InstanceNet", image: np.ndarray, views: Mapping[str, View], scale: Scale | None
) -> tuple[str, Scale]:
    """The view of an image in which the model expects most cells, or is surest of them, and the scale.

    Of a stained image: the sum of the probabilities of cells is the number of true ones to be expected. It is compared
    in one part of the image of bounded size, the one with most contrast; of equal views the first is taken. Where few
    are expected, the scale is estimated in the second view too.

    Of a picture of several dyes the colours show different things, which may be many more, and smaller, than the cells.
    Of those views that show cells on not much less of their area than another, the one with the highest mean of the
    probabilities is taken; blue, the usual colour of DNA, also where it is a little less.

    Args:
        model: in evaluation mode.
        image: (H, W, 3), may be a `numpy.memmap`.
        views: see `Preprocessing.views`.
        scale: None estimates it: in the first view in which the model finds cells, or in every colour.
    """
    if len(views) > 1 and any(isinstance(levels, SingleColour) for levels in views.values()):
        shown = _enough(model, {name: (image, levels) for name, levels in views.items()}, scale)
        sure = {name: one.mean + (BLUE_IS_USUAL if name == BLUE and one.mean else 0) for name, one in shown.items()}
        surest = max(sure, key=sure.__getitem__)
        return surest, shown[surest].scale
    estimates: dict[str, Scale] = {}
    if scale is None:
        nothing = no_cell(model.preprocessing)
        for name, levels in views.items():
            estimates[name] = estimate_scale(model, image, levels)
            if estimates[name] != nothing:
                break
        scale = estimates[name]
    if len(views) == 1:
        return next(iter(views)), scale
    seen = {name: NetworkImage(image, levels, _as_trained(model, scale)) for name, levels in views.items()}
    first = next(iter(views))
    part = _part(seen[first], _contrast(image, views[first]), PART)
    scores = {name: _cells(model, shown, part).scores.cpu().numpy() for name, shown in seen.items()}
    most = max(scores, key=lambda name: scores[name].sum())
    if estimates and scores[most].sum() < FEW:  # as of glands, which have a colour, among nuclei
        stain = {HAEMATOXYLIN: (image, views[HAEMATOXYLIN])}
        alone = _enough(model, stain, estimates.get(HAEMATOXYLIN))[HAEMATOXYLIN]
        if alone.density > MANY_MORE * _density(scores[most], part, seen[most]):
            return HAEMATOXYLIN, alone.scale
    return most, scale


@torch.no_grad()
def choose_channel(
    model: "InstanceNet", channels: Mapping[int, np.ndarray], preprocessing: Preprocessing, scale: Scale | None
) -> int | None:
    """The channel of an image in which the model is clearly surest of the cells, by the rule for several dyes.

    Args:
        model: in evaluation mode.
        channels: (H, W, 3) each, grey, by number; may be read piece by piece.
        preprocessing: its levels.
        scale: None estimates it in each channel.

    Returns:
        A number, the first where no channel shows a cell; None where it is about as sure of another one.
    """
    grey = {number: (image, preprocessing.views(image, COLOURS)[COLOURS]) for number, image in channels.items()}
    shown = _enough(model, grey, scale)
    highest = max(one.mean for one in shown.values())
    sure = {number: one.share for number, one in shown.items() if one.mean > highest - CLEARLY}
    number = max(sure, key=sure.__getitem__)
    others = [share for other, share in sure.items() if other != number]
    return number if not highest or all(sure[number] >= CLEARLY_MORE * share for share in others) else None


class _Shown(NamedTuple):
    """What the model sees in the part of an image that is compared with others of the same place."""

    mean: float  # probability of its cells, 0 where there are none
    share: float  # sum of their probabilities and squared diameters, for a pixel
    density: float  # sum of their probabilities, for a pixel of the image
    scale: Scale


def _enough(
    model: "InstanceNet", images: Mapping[Name, tuple[np.ndarray, View]], scale: Scale | None
) -> dict[Name, _Shown]:
    """Of images of one place, and their levels, those with cells on not much less of their area than another."""
    shown = {}
    for name, (image, levels) in images.items():
        own = scale or estimate_scale(model, image, levels)
        seen = NetworkImage(image, levels, _as_trained(model, own))
        part = _part(seen, _contrast(image, levels), PART)
        cells = _cells(model, seen, part)
        scores = cells.scores.cpu().numpy()
        share = float((scores * diameters(cells) ** 2).sum()) / _pixels(part)
        mean, density = float(scores.mean()) if len(cells) else 0.0, _density(scores, part, seen)
        shown[name] = _Shown(mean, share, density, own)
    enough = FAIR_SHARE * max(one.share for one in shown.values())
    return {name: one for name, one in shown.items() if one.share >= enough}


def _as_trained(model: "InstanceNet", scale: Scale) -> float | tuple[int, int]:
    """The scale without the enlargement of predictions, for enlarged textures count for more."""
    return scale.value if isinstance(scale.value, tuple) else scale.value / model.preprocessing.enlargement


def _scales_to_try(tried: list[float], best: float | None, expected: bool) -> list[float]:
    """Which of `FIRST_SCALES` come next, by those tried and the estimate from them; none at the end.

    Args:
        tried: the scales so far.
        best: the estimate from them; None without enough cells.
        expected: whether the estimate is likely near 1.
    """
    if not tried:
        return [1.0]
    if best is None:
        return [scale for scale in FIRST_SCALES if scale not in tried]
    if expected and len(tried) == 1 and 1 / NEAR_END <= best <= NEAR_END:
        return []
    low, high = FIRST_SCALES.index(min(tried)), FIRST_SCALES.index(max(tried))
    if best < FIRST_SCALES[low] * NEAR_END and low > 0:
        return [FIRST_SCALES[low - 1]]
    if best > FIRST_SCALES[high] / NEAR_END and high + 1 < len(FIRST_SCALES):
        return [FIRST_SCALES[high + 1]]
    return []


def _finer(
    model: "InstanceNet",
    image: np.ndarray,
    levels: View,
    contrast: np.ndarray,
    side: int,
    scale: float,
    density: Mapping[float, float],
    single: Collection[float] = (),
) -> int:
    """How many times the scale shows more cells in the same part of the image: a power of two, 1 where none does.

    In a smear a model of nuclei may take whole cells for these, where they are seen no larger. It looks again only if
    a scale that was tried shows more cells, and there.

    Args:
        contrast: see `_contrast`.
        side: of the part, pixels of the network's input.
        scale: the estimate.
        density: trust in cells for a pixel of the image, by the scales that were tried.
        single: those of them with the trust of one cell at most: in the small part of the image that a fine scale
            shows, that is no sign of more.
    """
    near = min(density, key=lambda tried: abs(math.log(tried / scale)))
    finer = [tried for tried in density if tried > near and tried not in single]
    densest = max([near, *finer], key=density.__getitem__)
    if density[densest] <= MORE_CELLS * density[near]:
        return 1
    factor = 2 ** round(math.log2(densest / near))
    if factor >= FAR and density[densest] > FAR_MORE_CELLS * density[near]:
        return factor
    seen, coarse = (NetworkImage(image, levels, times * scale) for times in (factor, 1))
    part = _part(seen, contrast, side)
    trained = model.preprocessing.diameter
    fine = _cells(model, seen, part)
    if not len(fine) or float(fine.scores.mean()) < SURE:
        return 1
    _, trust = _votes(fine, trained)
    # The same part, with what the network has to see around it.
    around = 2 * BLOCK
    area, window = [], []
    for of_part, length in zip(part, coarse.shape, strict=False):
        first, last = (edge * coarse.scale[0] / seen.scale[0] for edge in (of_part.start, of_part.stop))
        start = max(0, int(first) - around) // BLOCK * BLOCK
        window.append(slice(start, min(length, math.ceil(last) + around)))
        area.append((first - start, last - start))
    cells = _cells(model, coarse, (window[0], window[1]))
    centres = ((cells.boxes[:, :2] + cells.boxes[:, 2:]) / 2).cpu().numpy()
    inside = np.ones(len(cells), bool)
    for place, (first, last) in zip(centres.T[::-1], area, strict=True):
        inside &= (first <= place) & (place < last)
    _, coarse_trust = _votes(cells, trained)
    return factor if trust.sum() > max(ENOUGH, MORE_CELLS * coarse_trust[inside].sum()) else 1


def _votes(cells: Cells, trained: float) -> tuple[np.ndarray, np.ndarray]:
    """The diameters (R,) of cells, and the trust in each: its score, and less the further it is from ``trained``."""
    found = diameters(cells)
    octaves = np.log2(np.maximum(found, 1) / trained)
    return found, cells.scores.cpu().numpy() * np.exp(-0.5 * (octaves / SPREAD) ** 2)


def _density(trust: np.ndarray, window: tuple[slice, slice], seen: NetworkImage) -> float:
    """The trust in the cells of a window for a pixel of the image."""
    return float(trust.sum()) / _pixels(window) * math.prod(seen.scale)


def _pixels(window: tuple[slice, slice]) -> int:
    return math.prod(side.stop - side.start for side in window)


def _cells(model: "InstanceNet", seen: NetworkImage, window: tuple[slice, slice]) -> Cells:
    """The cells of a window that the model takes for true, whatever their size, for that is what is looked for."""
    plain = model.scores.plain
    return model.detect_seen(seen, window, max(plain.threshold, 1e-6), plain)


def _contrast(image: np.ndarray, levels: View) -> np.ndarray:
    """(h, w) local contrast of a coarse sample of an image, 256 pixels a side at most."""
    step = max(1, -(-max(image.shape[:2]) // 256))
    sample = levels(np.asarray(image[::step, ::step])).mean(2)
    side = (max(3, sample.shape[1] // 16), max(3, sample.shape[0] // 16))
    return np.sqrt(np.maximum(cv2.blur(sample**2, side) - cv2.blur(sample, side) ** 2, 0))


def _part(seen: NetworkImage, contrast: np.ndarray, part: int) -> tuple[slice, slice]:
    """The window of `part` pixels a side at most with the highest contrast, from a multiple of `BLOCK` on."""
    sides = [min(part, side) for side in seen.shape[:2]]
    # The window in pixels of the sample, whose mean the blur puts at the window's middle.
    window = [max(1, round(a * n / side)) for a, n, side in zip(sides, contrast.shape, seen.shape, strict=False)]
    mean = cv2.blur(contrast.astype(np.float32), (window[1], window[0]), borderType=cv2.BORDER_CONSTANT)
    middle = np.unravel_index(int(mean.argmax()), mean.shape)
    starts = []
    for place, count, side, length in zip(middle, contrast.shape, seen.shape, sides, strict=False):
        start = round((place + 0.5) / count * side - length / 2)
        starts.append(min(max(0, start), side - length) // BLOCK * BLOCK)
    rows, columns = (slice(a, min(a + n, side)) for a, n, side in zip(starts, sides, seen.shape, strict=False))
    return rows, columns


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float | None:
    """The value (N,) at which half of the weights (N,) is reached; None where there is no weight."""
    if not weights.sum() > 0:
        return None
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])

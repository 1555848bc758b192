"""Synthetic microscopy with exact masks, for demonstrations, tests and first experiments without data.

Three kinds: :func:`nuclei_image`, ellipses of very different sizes that touch, as in fluorescence;
:func:`neural_image`, bodies with long thin branching processes that touch and cross, as in phase contrast; and
:func:`classes_image`, cells of three classes, which touch each other. The images
are dim or bright, sharp or blurred, noisy, unevenly lit, and littered with bright specks that are no cells.

H, W: height and width in pixels. All lengths are in pixels; x to the right, y down.
"""

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

# Of `classes_image`: bright and round, dark and small, elongated with processes.
CLASSES = ("round", "dark", "long")

_MIN_SIDE = 32  # of an image; a smaller one has no room for the processes of a cell
_MIN_RADIUS = 3.0
_TRIES = 20  # places, with ever smaller radii, before a cell is given up
_MIN_VISIBLE = 0.6  # least part of a cell that those before it may leave
_STEP = 1.5  # length of one step of a process
_SUBPIXEL = 4  # fractional bits of the coordinates given to OpenCV


@dataclass(frozen=True)
class _Cell:
    """One cell: its centre and radius, and its pixels in a window of the image."""

    x: float
    y: float
    radius: float
    left: int
    top: int
    pixels: np.ndarray  # (h, w) bool, with a margin of background except at the image's border

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.pixels.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def mask(self, height: int, width: int) -> np.ndarray:
        mask = np.zeros((height, width), bool)
        mask[self.window] = self.pixels
        return mask


def nuclei_image(rng: np.random.Generator, height: int, width: int, n: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw nuclei in fluorescence: bright and roughly elliptic on a dark ground.

    The radii of one image differ by a factor of about five; half of the nuclei are put against another one. Nuclei may
    be cut by the image's border. No pixel belongs to two nuclei, and every mask is one 4-connected component.

    Args:
        rng: source of all randomness; the same state gives the same image.
        height, width: size of the image, at least 32 pixels each.
        n: number of nuclei, 0 or more.

    Returns:
        image: (H, W, 3) uint8 BGR, its channels equal.
        masks: n arrays (H, W) bool; fewer where the image has no room for n.

    Raises:
        ValueError: a size or number out of range.
    """
    _check(height, width, n)
    cells = _place(rng, height, width, n, coverage=0.2, spread=0.45)
    signal: np.ndarray = np.zeros((height, width), np.float32)
    for cell in cells:
        thickness = _dome(cell.pixels, 0.7 * cell.radius)
        chromatin = 1 + rng.uniform(0.1, 0.3) * _clouds(rng, thickness.shape, max(1.5, cell.radius / 5))
        signal[cell.window] += rng.lognormal(0, 0.35) * thickness * chromatin
    _litter(rng, signal)

    signal = cv2.GaussianBlur(signal, (0, 0), rng.uniform(0.6, 1.4))
    haze = cv2.GaussianBlur(signal, (0, 0), 0.03 * (height + width))
    signal = signal + rng.uniform(0.05, 0.3) * haze
    # Evenly in the logarithm: as in real sets, most images use a small part of the range.
    gain = np.exp(rng.uniform(np.log(30), np.log(150)))
    image = rng.uniform(4, 20) + gain * signal * _illumination(rng, height, width, 0.4)
    image += np.sqrt(rng.uniform(0.5, 3) + rng.uniform(0.02, 0.2) * image) * _noise(rng, height, width)
    return _finish(image), [cell.mask(height, width) for cell in cells]


def neural_image(rng: np.random.Generator, height: int, width: int, n: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw neural cells in phase contrast: bodies with long thin branching processes, haloed on a grey ground.

    Bodies touch and never share a pixel; a process ends at another cell's body or at the image's border. Where
    processes cross, both cells own the pixels, so that every mask is one 8-connected component.

    Args:
        rng: source of all randomness; the same state gives the same image.
        height, width: size of the image, at least 32 pixels each.
        n: number of cells, 0 or more.

    Returns:
        image: (H, W, 3) uint8 BGR, its channels equal.
        masks: n arrays (H, W) bool; fewer where the image has no room for n bodies.

    Raises:
        ValueError: a size or number out of range.
    """
    _check(height, width, n)
    bodies = _place(rng, height, width, n, coverage=0.04, spread=0.25)
    owner = _owners(bodies, height, width)
    cells = [_grow_processes(rng, body, index + 1, owner) for index, body in enumerate(bodies)]

    optical: np.ndarray = np.zeros((height, width), np.float32)  # path length in matter
    for body, cell in zip(bodies, cells, strict=True):
        brightness = rng.lognormal(0, 0.2)
        optical[cell.window] += 0.35 * brightness * cell.pixels
        thickness = _dome(body.pixels, body.radius)
        granules = 1 + 0.2 * _clouds(rng, thickness.shape, 2)
        optical[body.window] += brightness * thickness * granules
    _litter(rng, optical)

    optical += 0.06 * _clouds(rng, (height, width), 12)
    optical = cv2.GaussianBlur(optical, (0, 0), rng.uniform(0.6, 1.2))
    # Phase contrast passes edges and suppresses what is flat: a dark halo around bright matter.
    halo = cv2.GaussianBlur(optical, (0, 0), rng.uniform(4, 8))
    contrast = rng.uniform(40, 110) * (optical - rng.uniform(0.5, 0.9) * halo)
    image = rng.uniform(80, 130) * _illumination(rng, height, width, 0.25) + contrast
    image += rng.uniform(2, 6) * _noise(rng, height, width)
    return _finish(image), [cell.mask(height, width) for cell in cells]


def classes_image(
    rng: np.random.Generator, height: int, width: int, n: int
) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Draw cells of the three `CLASSES` on a grey ground; half of them are put against another one, of any class.

    Bodies never share a pixel, and processes leave other bodies alone; where processes cross, both cells own the
    pixels. A class is not told by brightness alone, for images are dim or bright and cells vary, nor by size alone.

    Args:
        rng: source of all randomness; the same state gives the same image.
        height, width: size of the image, at least 32 pixels each.
        n: number of cells, 0 or more.

    Returns:
        image: (H, W, 3) uint8 BGR, its channels equal.
        masks: n arrays (H, W) bool; fewer where the image has no room for n bodies.
        classes: of each cell the index in `CLASSES`.

    Raises:
        ValueError: a size or number out of range.
    """
    _check(height, width, n)
    wanted = rng.integers(len(CLASSES), size=n)
    sizes = np.array([1.15, 0.7, 0.8])[wanted]
    bodies, numbers = _place_sized(rng, height, width, n, coverage=0.15, spread=0.18, sizes=sizes)
    classes = [int(wanted[number]) for number in numbers]
    owner = _owners(bodies, height, width)
    cells = [
        _grow_processes(rng, body, index + 1, owner, reach=(2.5, 5)) if CLASSES[kind] == "long" else body
        for index, (body, kind) in enumerate(zip(bodies, classes, strict=True))
    ]
    signal: np.ndarray = np.zeros((height, width), np.float32)
    for body, cell, kind in zip(bodies, cells, classes, strict=True):
        thickness = _dome(body.pixels, 0.7 * body.radius)
        texture = 1 + rng.uniform(0.1, 0.3) * _clouds(rng, thickness.shape, max(1.5, body.radius / 5))
        signal[cell.window] = np.where(cell.pixels & (kind == 2), 0.35, signal[cell.window])
        signal[body.window] += (1.0, -0.8, 0.25)[kind] * rng.lognormal(0, 0.15) * thickness * texture
    _litter(rng, signal)
    signal = cv2.GaussianBlur(signal, (0, 0), rng.uniform(0.6, 1.2))
    ground = rng.uniform(70, 110) * _illumination(rng, height, width, 0.2)
    image = ground + rng.uniform(40, 90) * signal
    image += rng.uniform(2, 6) * _noise(rng, height, width)
    return _finish(image), [cell.mask(height, width) for cell in cells], classes


def _check(height: int, width: int, n: int) -> None:
    if min(height, width) < _MIN_SIDE:
        raise ValueError(f"height and width must be at least {_MIN_SIDE} pixels, got {height} x {width}")
    if n < 0:
        raise ValueError(f"n must be 0 or more cells, got {n}")


def _owners(bodies: list[_Cell], height: int, width: int) -> np.ndarray:
    """(H, W) int32: 0, or 1 + the index of the body that owns the pixel."""
    owner = np.zeros((height, width), np.int32)
    for index, body in enumerate(bodies):
        owner[body.window][body.pixels] = index + 1
    return owner


def _place(rng: np.random.Generator, height: int, width: int, n: int, coverage: float, spread: float) -> list[_Cell]:
    """The cells of `_place_sized`, all of one size but for their spread."""
    return _place_sized(rng, height, width, n, coverage, spread, np.ones(n))[0]


def _place_sized(
    rng: np.random.Generator, height: int, width: int, n: int, coverage: float, spread: float, sizes: np.ndarray
) -> tuple[list[_Cell], list[int]]:
    """Put up to n elliptic cells down, each in what those before it left free; and which of the n each is.

    Args:
        coverage: part of the image that n cells of the typical radius cover.
        spread: standard deviation of the logarithm of the radius.
        sizes: (n,) factors of the radius of each.
    """
    largest = 0.15 * min(height, width)
    typical = rng.uniform(0.7, 1.2) * np.sqrt(coverage * height * width / (np.pi * max(n, 1)))
    typical = np.clip(typical, _MIN_RADIUS, 0.5 * largest)
    free = np.ones((height, width), bool)
    cells: list[_Cell] = []
    numbers: list[int] = []
    for number in range(n):
        radius = typical * rng.lognormal(0, spread) * sizes[number]
        for attempt in range(_TRIES):
            tried = np.clip(radius * 0.95**attempt, _MIN_RADIUS, largest)
            cell = _cell_at(rng, *_place_of_next(rng, height, width, tried, cells), tried, free)
            if cell is not None:
                free[cell.window] &= ~cell.pixels
                cells.append(cell)
                numbers.append(number)
                break
    return cells, numbers


def _place_of_next(
    rng: np.random.Generator, height: int, width: int, radius: float, cells: list[_Cell]
) -> tuple[float, float]:
    """A centre (x, y) in the image: anywhere, or, half of the time, where it touches a cell."""
    if cells and rng.random() < 0.5:
        other = cells[rng.integers(len(cells))]
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1) * (radius + other.radius)
        x, y = other.x + distance * np.cos(angle), other.y + distance * np.sin(angle)
        if 0 <= x < width and 0 <= y < height:
            return x, y
    return rng.uniform(0, width), rng.uniform(0, height)


def _cell_at(rng: np.random.Generator, x: float, y: float, radius: float, free: np.ndarray) -> _Cell | None:
    """An uneven ellipse at (x, y), cut to the free pixels (H, W) of the image; None where too few are free."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    flattening = rng.uniform(0.7, 1)
    uneven = 1 + sum(rng.normal(0, 0.12 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    u, v = uneven * radius / flattening * np.cos(angle), uneven * radius * flattening * np.sin(angle)
    turn = rng.uniform(0, np.pi)
    outline = np.stack([x + u * np.cos(turn) - v * np.sin(turn), y + u * np.sin(turn) + v * np.cos(turn)], axis=1)

    left, top, canvas = _canvas(outline, 2, *free.shape)
    cv2.fillPoly(canvas, [_fixed_point(outline - (left, top))], 1, shift=_SUBPIXEL)
    window = free[top : top + canvas.shape[0], left : left + canvas.shape[1]]
    pixels = _largest_component(canvas * window)
    if pixels.sum() < max(_MIN_VISIBLE * canvas.sum(), _MIN_RADIUS**2):
        return None
    return _Cell(x, y, radius, left, top, pixels)


def _grow_processes(
    rng: np.random.Generator, body: _Cell, label: int, owner: np.ndarray, reach: tuple[float, float] = (6, 14)
) -> _Cell:
    """The body with two to five processes that branch.

    Args:
        label: the body's in ``owner``.
        owner: (H, W) int32, the bodies' labels, 0 elsewhere. Processes leave other bodies alone.
        reach: shortest and longest length of a process, radii of the body.
    """
    longest = rng.uniform(*reach) * body.radius
    count = rng.integers(2, 6)
    first = rng.uniform(0, 2 * np.pi)
    # Processes still to grow: start, heading, length, width at the start, and how often they may branch.
    buds = [
        (
            np.array([body.x, body.y]),
            first + 2 * np.pi * i / count,
            rng.uniform(0.3, 1) * longest,
            0.35 * body.radius,
            2,
        )
        for i in range(count)
    ]
    processes = []
    while buds:
        start, heading, length, width, branches = buds.pop()
        path, headings = _walk(rng, start, heading, length, label, owner)
        processes.append((path, width))
        for at in rng.integers(len(headings), size=rng.binomial(branches, 0.6)):
            turn = (2 * rng.integers(2) - 1) * rng.uniform(0.4, 1.1)
            buds.append((path[at], headings[at] + turn, rng.uniform(0.2, 0.5) * length, 0.7 * width, branches - 1))

    corners = np.array([[body.left, body.top], [body.left + body.pixels.shape[1], body.top + body.pixels.shape[0]]])
    outline = np.concatenate([corners, *(path for path, _ in processes)])
    left, top, canvas = _canvas(outline, int(body.radius) + 2, *owner.shape)
    for path, width in processes:
        _draw_tapering(canvas, path - (left, top), width)
    cell = _Cell(body.x, body.y, body.radius, left, top, canvas > 0)
    window = owner[cell.window]
    cell.pixels[(window != 0) & (window != label)] = False
    cell.pixels[window == label] = True
    # What another body cut off is no part of the cell.
    _, components = cv2.connectedComponents(cell.pixels.astype(np.uint8), connectivity=8)
    cell.pixels[components != components[window == label][0]] = False
    return cell


def _walk(
    rng: np.random.Generator, start: np.ndarray, heading: float, length: float, label: int, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A winding path, at most to the image's border or another body: points (T, 2) x, y, and headings between them."""
    steps = max(1, round(length / _STEP))
    headings = heading + np.cumsum(rng.normal(0, 0.12, steps))
    path = np.empty((steps + 1, 2))
    path[0], path[1:, 0], path[1:, 1] = 0, np.cos(headings), np.sin(headings)
    path = start + _STEP * np.cumsum(path, axis=0)
    x, y = np.rint(path).astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < owner.shape[1]) & (y < owner.shape[0])
    there = owner[y * inside, x * inside]
    barred = ~inside | ((there != 0) & (there != label))
    barred[0] = False  # a centre may lie under a neighbour's body
    end = barred.argmax() if barred.any() else steps + 1
    return path[:end], headings[: max(end - 1, 1)]


def _draw_tapering(canvas: np.ndarray, path: np.ndarray, width: float) -> None:
    """Draw a path (T, 2) into ``canvas`` (h, w) uint8, from ``width`` at its start down to two pixels."""
    width = max(width, 2)
    widths = np.rint(width * (2 / width) ** (np.arange(len(path)) / len(path))).astype(int)
    points = _fixed_point(path)
    cuts = [0, *(np.flatnonzero(widths[1:] != widths[:-1]) + 1).tolist(), len(path)]
    for start, end in pairwise(cuts):
        # From one point before, so that pieces of different thickness meet.
        piece = points[max(start - 1, 0) : end]
        cv2.polylines(canvas, [piece], False, 1, int(widths[start]), cv2.LINE_8, _SUBPIXEL)


def _canvas(points: np.ndarray, margin: int, height: int, width: int) -> tuple[int, int, np.ndarray]:
    """The window of the image around ``points`` (T, 2): left, top, and zeros (h, w) uint8."""
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - margin, 0).tolist()
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + margin + 1, (width, height)).tolist()
    return left, top, np.zeros((bottom - top, right - left), np.uint8)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.rint(points * 2**_SUBPIXEL).astype(np.int32)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of ``mask`` (h, w) uint8, as bool; all False where the mask is empty."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the background
    return (components == areas.argmax()) & (mask > 0)


def _dome(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Thickness (h, w) float32 in 0..1 of a rounded body: rising from its edge inwards over ``radius``."""
    depth = cv2.distanceTransform(pixels.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
    return np.sqrt(np.minimum(depth / radius, 1))


def _clouds(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    """Smooth random texture of shape (height, width), float32 around 0, whose lumps are about ``size`` pixels."""
    height, width = shape
    coarse = rng.standard_normal((int(height / size) + 2, int(width / size) + 2), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.standard_normal((height, width), np.float32)


def _illumination(rng: np.random.Generator, height: int, width: int, strength: float) -> np.ndarray:
    """Uneven light (height, width) float32 around 1: a slope in any direction and a fall towards the corners."""
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle, slope, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, strength), rng.uniform(0, strength)
    return 1 + slope * (np.cos(angle) * x + np.sin(angle) * y) / 2 + fall * (1 / 3 - (x**2 + y**2) / 2)


def _litter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Strew bright specks over ``image`` (H, W) float32, in place: about six on 256 x 256 pixels."""
    height, width = image.shape
    for _ in range(rng.poisson(1e-4 * height * width)):
        centre = _fixed_point(rng.uniform(0, (width, height)))
        axes = _fixed_point(np.clip(rng.lognormal(0.2, 0.6), 0.5, 5) * np.array([1, rng.uniform(0.4, 1)]))
        brightness = rng.uniform(0.7, 2.5)
        cv2.ellipse(image, centre.tolist(), axes.tolist(), rng.uniform(0, 180), 0, 360, brightness, -1, shift=_SUBPIXEL)


def _finish(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 -> (H, W, 3) uint8."""
    return np.repeat(np.clip(np.rint(image), 0, 255).astype(np.uint8)[..., None], 3, axis=2)

"""Charts as numbers on a drawing of fixed size; the page's template writes them as SVG in its own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

# The drawing and its plotting area, in units of the SVG.
WIDTH, HEIGHT = 380, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 360, 12, 222


@dataclass(frozen=True)
class Axis:
    """A straight scale from `low` to `high`, with labelled ticks in its own numbers."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def place(self, value: ArrayLike, start: float, end: float) -> np.ndarray:
        """Values of the axis as places between start and end, rounded to what a screen shows."""
        share = (np.asarray(value, dtype=np.float64) - self.low) / (self.high - self.low)
        return np.round(start + share * (end - start), 1)


@dataclass(frozen=True)
class Line:
    """A series of a chart: `style` counts the colours, dashes and marks of the page; points are (x, y), drawn."""

    name: str
    style: int
    points: list[tuple[float, float]]
    marks: list[tuple[float, float]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in self.points) if self.points else ""


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: `kind` is a name for the style sheet."""

    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass
class Chart:
    """A chart: title, axes, a note below it, and what is drawn."""

    title: str
    x: Axis
    y: Axis
    note: str = ""
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    rule: float | None = None  # an upright line, drawn

    def add_line(self, name: str, style: int, x: ArrayLike, y: ArrayLike, marks: Sequence[int] = ()) -> None:
        """Add a line through the points (x, y), in numbers of the axes; `marks` are the points to mark, by index."""
        points = list(zip(self._x(x).tolist(), self._y(y).tolist(), strict=True))
        self.lines.append(Line(name, style, points, [points[i] for i in marks]))

    def add_bars(self, kind: str, left: ArrayLike, right: ArrayLike, base: ArrayLike, top: ArrayLike) -> None:
        """Add bars that reach from base to top, in numbers of the axes."""
        left, right, base, top = self._x(left), self._x(right), self._y(base), self._y(top)
        for x1, x2, y1, y2 in zip(left.tolist(), right.tolist(), base.tolist(), top.tolist(), strict=True):
            if y2 < y1:
                self.bars.append(Bar(kind, x1, y2, round(x2 - x1, 1), round(y1 - y2, 1)))

    def set_rule(self, x: float) -> None:
        self.rule = float(self._x(x))

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(float(self._x(value)), label) for value, label in self.x.ticks]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(float(self._y(value)), label) for value, label in self.y.ticks]

    def _x(self, value: ArrayLike) -> np.ndarray:
        return self.x.place(value, LEFT, RIGHT)

    def _y(self, value: ArrayLike) -> np.ndarray:
        return self.y.place(value, BOTTOM, TOP)


def unit_axis(label: str) -> Axis:
    """An axis from 0 to 1."""
    return Axis(label, 0.0, 1.0, [(tick / 5, f"{tick / 5:g}") for tick in range(6)])


def count_axis(label: str, high: float) -> Axis:
    """An axis from 0 that reaches `high`, with three to six ticks at round numbers."""
    high = max(float(high), 1e-9)
    step = 10.0 ** math.floor(math.log10(high))
    step *= next((factor for factor in (0.2, 0.5, 1.0, 2.0) if high / (step * factor) <= 5), 2.0)
    ticks = np.arange(0, math.ceil(high / step - 1e-9) + 1) * step
    return Axis(label, 0.0, float(ticks[-1]), [(float(tick), f"{tick:g}") for tick in ticks])

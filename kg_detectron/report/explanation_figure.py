"""The picture of an explanation: heatmaps, votes and peaks, groups, boxes at every scale (paper, figure 4)."""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from kg_detectron.export.overlay import stretched
from kg_detectron.graph import KEYPOINTS
from kg_detectron.inference.explanation import (
    BOX,
    FATES,
    NO_AREA,
    NO_COMBINATION,
    SUPPRESSED,
    TOO_FEW,
    ExplainedGroup,
    Explanation,
)

# The paper's red, blue, pink, green and yellow, in tones that the colour-blind tell apart; the signs differ as well.
_COLOURS = ("#d55e00", "#0072b2", "#cc79a7", "#009e73", "#f0e442")
_SIGNS = ("^", ">", "<", "v", "o")
_BOXES: dict[str, tuple[str, Any]] = {BOX: ("#56b4e9", "-"), SUPPRESSED: ("#f0e442", ":"), NO_AREA: ("#ff7f2a", "--")}
_CROSSES = {NO_COMBINATION: "+", TOO_FEW: "x"}
_REJECTED = "#c8c8c8"
_PANEL = 3.3  # inches
_MOST_NUMBERS = 150  # boxes, above which numbers would hide them


def draw_explanation(image: np.ndarray, explanation: Explanation, title: str = "") -> bytes:
    """Draw an explanation over its image.

    Args:
        image: (H,W,3) BGR of any type, the one that was explained.
        explanation: of it.
        title: above the picture.

    Returns:
        A PNG, the same bytes for the same input.
    """
    grey = stretched(image)[..., ::-1]
    height, width = grey.shape[:2]
    rows = len(explanation.scales)
    size = (4 * _PANEL, (rows + 1) * (_PANEL * min(height / width, 1.6) + 0.28) + 1.1)
    with matplotlib.rc_context({"font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 9}):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        grid = figure.subplots(rows + 1, 4)
        for axes in grid.flat:
            axes.imshow(grey, extent=(0, width, height, 0))
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        groups = explanation.groups
        kept = [group for group in groups if group.fate == BOX]
        grid[0, 0].set_title("input")
        grid[0, 1].set_title(f"result: {len(kept)} boxes")
        _draw_boxes(grid[0, 1], kept)
        for axes in grid[0, 2:]:
            axes.remove()
        # One range for all scales, so that a scale without keypoints looks it.
        highest = max([float(scale.votes.max()) for scale in explanation.scales] + [1e-6])
        for s, (scale, (maps, votes, links, boxes)) in enumerate(zip(explanation.scales, grid[1:], strict=True)):
            own = [group for group in groups if group.scale == s]
            name = f"s{scale.stride.bit_length()}"
            place = _extent(scale.heatmap, scale.stride, explanation)
            maps.imshow(_blend(scale.heatmap, 1.0), extent=place, interpolation="bilinear")
            maps.set_title(f"{name}: heatmaps")
            votes.imshow(_blend(scale.votes, highest), extent=place, interpolation="bilinear")
            _draw_points(votes, scale.peaks[:, 0], scale.peaks[:, 1:3])
            votes.set_title(f"{name}: votes, {len(scale.peaks)} peaks")
            _draw_links(links, own)
            links.set_title(f"{name}: group offsets of {len(own)} groups")
            _draw_boxes(boxes, own)
            given = sum(group.box is not None for group in own)
            boxes.set_title(f"{name}: {given} boxes, {sum(group.fate == BOX for group in own)} of them stay")
            for axes in (maps, votes, links, boxes):  # imshow has moved them
                axes.set(xlim=(0, width), ylim=(height, 0))
        figure.legend(handles=_legend(groups), loc="outside lower center", ncols=5, frameon=False)
        if title:
            figure.suptitle(title, fontsize=11)
        content = io.BytesIO()
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()


def _extent(maps: np.ndarray, stride: int, explanation: Explanation) -> tuple[float, float, float, float]:
    """Where the maps of a scale lie in the image; their border and padding stick out."""
    (_, height, width), (x, y), first = maps.shape, explanation.input_scale, -explanation.border
    return first, first + width * stride * x, first + height * stride * y, first


def _blend(maps: np.ndarray, highest: float) -> np.ndarray:
    """Five maps (5,h,w) as one picture (h,w,4) in the colours of the keypoints, clear where they are 0."""
    share = np.clip(maps / highest, 0, 1)
    colours = np.array([matplotlib.colors.to_rgb(colour) for colour in _COLOURS])
    mixed = np.einsum("khw,kc->hwc", share, colours) / np.maximum(share.sum(axis=0), 1e-6)[..., None]
    return np.dstack((mixed, 0.9 * np.sqrt(share.max(axis=0))))


def _draw_points(axes: Axes, keypoint: np.ndarray, places: np.ndarray) -> None:
    for k, (colour, sign) in enumerate(zip(_COLOURS, _SIGNS, strict=True)):
        of = keypoint == k
        x, y = places[of].T
        axes.scatter(x, y, s=11, c=colour, marker=sign, edgecolors="black", linewidths=0.4)


def _draw_links(axes: Axes, groups: list[ExplainedGroup]) -> None:
    """Arrows along the group offsets of the keypoints that opened groups, in the colour of their goal."""
    for kept in (False, True):
        own = [group for group in groups if (group.fate == BOX) == kept]
        lines = [
            (group.keypoints[group.opener, :2], point[:2])
            for group in own
            for k, point in enumerate(group.keypoints)
            if point[2] > 0 and k != group.opener
        ]
        style = "-" if kept else ":"
        colour = "white" if kept else _REJECTED
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.8, linestyles=style, alpha=0.8))
        for k in range(len(KEYPOINTS)):
            arrows = [(group.keypoints[group.opener, :2], group.expected[k]) for group in own if k != group.opener]
            if arrows:
                start, end = np.array(arrows).transpose(1, 0, 2)
                options: dict[str, Any] = {
                    "angles": "xy",
                    "scale_units": "xy",
                    "scale": 1,
                    "width": 0.0035,
                    "headwidth": 5,
                }
                axes.quiver(*start.T, *(end - start).T, color=_COLOURS[k], alpha=0.9 if kept else 0.45, **options)
        points = [(k, *point[:2]) for group in own for k, point in enumerate(group.keypoints) if point[2] > 0]
        if points:
            _draw_points(axes, np.array(points)[:, 0], np.array(points)[:, 1:])


def _draw_boxes(axes: Axes, groups: list[ExplainedGroup]) -> None:
    """Boxes by their fate, numbered where few: their own number, or that of the box which suppressed them."""
    numbered = sum(group.box is not None for group in groups) <= _MOST_NUMBERS
    for group in sorted(groups, key=lambda group: FATES.index(group.fate), reverse=True):
        if group.box is None:
            x, y = group.keypoints[group.opener, :2]
            axes.plot(x, y, _CROSSES[group.fate], color=_REJECTED, markersize=5, markeredgewidth=1.2)
            continue
        colour, style = _BOXES[group.fate]
        x1, y1, x2, y2 = group.box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linestyle=style, linewidth=1.2))
        if group.number is not None and numbered:
            high = group.fate == BOX
            align: dict[str, Any] = {"ha": "left", "va": "top"} if high else {"ha": "right", "va": "bottom"}
            at = (x1, y1) if high else (x2, y2)
            axes.text(*at, str(group.number + 1), color=colour, fontsize=6, clip_on=True, **align)


def _legend(groups: list[ExplainedGroup]) -> list[Line2D]:
    edge: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.4, "linestyle": ""}
    handles = [
        Line2D([], [], color=colour, marker=sign, label=name, **edge)
        for name, colour, sign in zip(KEYPOINTS, _COLOURS, _SIGNS, strict=True)
    ]
    for fate in FATES:
        count = sum(group.fate == fate for group in groups)
        colour, style = _BOXES.get(fate, (_REJECTED, ""))
        note = ", whose number is below it" if fate == SUPPRESSED else ""
        sign = _CROSSES.get(fate, "")
        handles.append(Line2D([], [], color=colour, linestyle=style, marker=sign, label=f"{fate}{note} ({count})"))
    return handles

"""The page: one HTML file with everything in it."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kg_detectron._version import __version__
from kg_detectron.export.overlay import stretched
from kg_detectron.io.atomic import replacing
from kg_detectron.io.images import read_image
from kg_detectron.io.resize import resize_image
from kg_detectron.io.setting import SettingError
from kg_detectron.report import charts
from kg_detectron.report.comparison import Comparison, JudgedImage
from kg_detectron.report.curves import ap_chart, precision_recall_chart, score_chart, stratum_chart
from kg_detectron.report.outcomes import INSIDE, Verdict
from kg_detectron.report.strata import GAP, strata
from kg_detectron.report.svg_outlines import TOLERANCE, outlines
from kg_detectron.report.tables import Table

DETAILS = 100  # images, the worst, that come with outlines unless the caller says otherwise
LONGEST_SIDE = 1024  # pixels, of the pictures of those images
_THUMBNAIL_SIDE = 192
_JPEG_QUALITY, _THUMBNAIL_QUALITY = 82, 70

# Name, label, key, whether it is on, and its sign in the legend, as page.js draws it on cells.
LAYERS = (
    {"name": "image", "label": "image", "key": "1", "on": True, "glyph": "M8 3h14v8h-14zM8 9l4-3 4 3 3-2 3 2"},
    {"name": "found", "label": "found", "key": "2", "on": True, "glyph": ""},
    {"name": "missed", "label": "missed", "key": "3", "on": True, "glyph": "M13 7a2 2 0 1 0 4 0a2 2 0 1 0-4 0"},
    {"name": "false", "label": "false", "key": "4", "on": True, "glyph": "M11 3l8 8M11 11l8-8"},
    {"name": "merged", "label": "merged", "key": "5", "on": True, "glyph": "M11 7h8M15 3v8"},
    {"name": "split", "label": "split", "key": "6", "on": True, "glyph": "M11 11l8-8"},
    {"name": "truth", "label": "ground truth over it", "key": "7", "on": False, "glyph": ""},
)


@dataclass(frozen=True)
class ExplainedPicture:
    """A picture of how the boxes of one image came about, as PNG, and what it shows in words."""

    name: str
    png: bytes
    text: str

    @property
    def source(self) -> str:
        return _data_url("image/png", self.png)


def write_page(
    path: str | Path,
    comparison: Comparison,
    files: Mapping[str, Path],
    *,
    title: str,
    tables: Sequence[Table] = (),
    classes: Sequence[str] = (),
    explanations: Sequence[ExplainedPicture] = (),
    details: int = DETAILS,
    progress: bool = False,
) -> None:
    """Write the page: whole or not at all, and the same bytes for the same content.

    Args:
        path: the HTML file; an existing one is replaced.
        comparison: of the models on the images.
        files: where `io.images.read_image` finds the images, by their names.
        title: of the page.
        tables: figures, shown first.
        classes: names of the classes that a reader can choose one of; none for cells of one class.
        explanations: shown after the curves.
        details: number of images, the worst by the mean of F1 over the models, that come with outlines. The others come
            with a thumbnail and their counts. This bounds the size of the file.
        progress: show a progress bar.

    Raises:
        ValueError: for a negative number of details, an image that cannot be read, or one of another size than its
            ground truth. The message names it.
        OSError: where a file cannot be read or written.
    """
    if details < 0:
        raise SettingError("details", f"expected at least 0, got {details}")
    models, iou = comparison.models, comparison.iou
    worst_first = sorted(comparison.images, key=lambda judged: (judged.f1, judged.truth.name))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kg_detectron.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    folder = Path(__file__).parent
    stream = environment.get_template("page.html.j2").stream(
        version=__version__,
        title=title,
        facts=_facts(comparison),
        lead=_lead(comparison, details),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        models=models,
        tables=tables,
        explanations=explanations,
        charts=_charts(comparison),
        layers=LAYERS,
        terms=_terms(iou, bool(classes)),
        classes=classes,
        cards=_cards(worst_first, files, models, classes, comparison.threshold, details, progress),
        cards_total=len(worst_first),
        width=charts.WIDTH,
        height=charts.HEIGHT,
        left=charts.LEFT,
        right=charts.RIGHT,
        top=charts.TOP,
        bottom=charts.BOTTOM,
    )
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(stream)


def _charts(comparison: Comparison) -> list[charts.Chart]:
    pooled, iou, threshold, scores = comparison.pooled, comparison.iou, comparison.threshold, comparison.scores
    kinds = strata([judged.truth for judged in comparison.images])
    found = [np.concatenate([~of.verdicts[m].missed for of in comparison.images]) for m in range(len(pooled))]
    made: list[charts.Chart | None] = [precision_recall_chart(pooled, threshold, iou, scores), ap_chart(pooled)]
    if len(kinds.diameter):
        made += [
            stratum_chart(title, label, values, comparison.models, found, iou, digits=digits)
            for title, label, values, digits in (
                ("size", "diameter of a disc of the cell's area, pixels", kinds.diameter, 1),
                ("elongation", "length / width of the cell", kinds.elongation, 2),
                ("crowding", f"outline with another cell within {GAP} pixels, %", kinds.crowding, 0),
            )
        ]
    made += [score_chart(of, threshold, iou, score) for of, score in zip(pooled, scores, strict=True)]
    return [chart for chart in made if chart is not None and (chart.lines or chart.bars)]


def _facts(comparison: Comparison) -> str:
    cells = sum(len(judged.truth.masks) for judged in comparison.images)
    return f"{len(comparison.images)} images, {cells} cells; " + ", ".join(comparison.models)


def _lead(comparison: Comparison, details: int) -> str:
    least = ", ".join(
        f"{name} {'all' if score is None else f'from score {score:.3g}'}"
        for name, score in zip(comparison.models, comparison.scores, strict=True)
    )
    rule = "by choice" if comparison.score_is_given else "where F1 over all images is highest"
    shown = f" Outlines are drawn for the worst {details} images." if details < len(comparison.images) else ""
    return (
        f"Worst first, by F1 at IoU {comparison.iou:g}, the mean over the models. Instances shown and counted: {least}"
        f" ({rule}).{shown} Click one to enlarge it."
    )


def _terms(iou: float, several_classes: bool) -> list[tuple[str, str]]:
    share = f"{INSIDE:.0%}"
    of_class = (
        "class",
        "With a class chosen, cells and instances of this class alone are shown and counted. An instance that found a"
        " cell of another class is false then; its cell, under its own class, is missed. An instance that found a cell"
        " of no known class is left out.",
    )
    return [
        (
            "found",
            f"An instance whose mask overlaps a cell by an IoU of at least {iou:g}. Instances come by falling score;"
            " each takes the cell that it overlaps best unless a better one has it.",
        ),
        ("missed", "A cell that no instance found."),
        ("false", "An instance that found no cell."),
        ("merged", f"An instance that holds two or more cells, each with at least {share} of the cell's area."),
        (
            "split",
            f"A cell in which two or more instances lie, each with at least {share} of the instance's area. Instances"
            " that cover each other by as much of the smaller one count once.",
        ),
        ("F1", "2 TP / (2 TP + FP + FN), of found instances, false instances and missed cells; 1 where there is none."),
        (
            "AP",
            "The area under the precision-recall curve made monotonous, instances of all images together (PASCAL VOC"
            " since 2010). Others give the name to TP / (TP + FP + FN).",
        ),
        *([of_class] if several_classes else []),
        (
            "pictures",
            f"At most {LONGEST_SIDE} pixels on the longer side, the contrast stretched for the eye. Outlines run along"
            f" the edges of the masks' pixels to within {TOLERANCE:g} pixels.",
        ),
    ]


# What an image is ordered and chosen by, summed over the models.
_KINDS = ("missed", "false", "merged", "split")


def _counts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the page shows of an image: the counts of each model, in the order of the table's columns, and over them."""
    f1 = [verdict.f1 for verdict in verdicts]
    rows = [
        {
            "f1": f"{verdict.f1:.3f}",
            "found": int(verdict.found.sum()),
            "missed": int(verdict.missed.sum()),
            "false": int((~verdict.found).sum()),
            "merged": int(verdict.merged.sum()),
            "split": int(verdict.split.sum()),
        }
        for verdict in verdicts
    ]
    return {
        "f1": f"{np.mean(f1):.6f}",
        "spread": f"{max(f1) - min(f1):.6f}",
        **{kind: sum(row[kind] for row in rows) for kind in _KINDS},
        "rows": rows,
    }


def _class_counts(judged: JudgedImage, classes: Sequence[str], threshold: int) -> list[dict[str, Any]]:
    """`_counts` for each class, with the numbers of its ``cells`` and of its ``instances``, summed over the models."""
    counts = []
    for name in classes:
        of_class = judged.of_class(name, threshold)
        numbers = {"cells": len(of_class[0].cells), "instances": sum(len(one.instances) for one in of_class)}
        counts.append(numbers | _counts([one.verdict for one in of_class]))
    return counts


def _cards(
    judged: Sequence[JudgedImage],
    files: Mapping[str, Path],
    models: Sequence[str],
    classes: Sequence[str],
    threshold: int,
    details: int,
    progress: bool,
) -> Iterator[Mapping]:
    """What the template needs of every image, one after the other, so that the page is never whole in memory."""
    for index, one in enumerate(tqdm(judged, desc="drawing", unit="image", disable=not progress)):
        truth = one.truth
        picture = _picture(files[truth.name], truth.size)
        thumbnail = _shrunk(picture, _THUMBNAIL_SIDE)
        counts = _counts(one.verdicts)
        yield {
            "index": index,
            "name": truth.name,
            "height": truth.size[0],
            "width": truth.size[1],
            "cells": len(truth.masks),
            **counts,
            "rows": [{"name": name, **row} for name, row in zip(models, counts["rows"], strict=True)],
            "by_class": json.dumps(_class_counts(one, classes, threshold)) if classes else "",
            "thumbnail": _data_url("image/jpeg", _jpeg(thumbnail, _THUMBNAIL_QUALITY)),
            "thumbnail_width": thumbnail.shape[1],
            "thumbnail_height": thumbnail.shape[0],
            "detail": _detail(one, picture, classes, threshold) if index < details else None,
        }


def _detail(one: JudgedImage, picture: np.ndarray, classes: Sequence[str], threshold: int) -> str:
    """The picture and the outlines as JSON, for page.js."""
    of_classes = [one.of_class(name, threshold) for name in classes]
    models = []
    for number, (prediction, matches, verdict) in enumerate(
        zip(one.predictions, one.matches, one.verdicts, strict=True)
    ):
        kept = len(verdict.found)
        models.append(
            {
                "cells": outlines(prediction.masks[:kept]),
                "scores": None if prediction.scores is None else [float(f"{s:.3g}") for s in prediction.scores[:kept]],
                "iou": matches.iou[:kept].round(2).tolist(),
                **_marks(np.arange(kept), np.arange(len(one.truth.masks)), verdict),
                "classes": [_marks(of[number].instances, of[number].cells, of[number].verdict) for of in of_classes],
            }
        )
    content = {
        "height": one.truth.size[0],
        "width": one.truth.size[1],
        "image": base64.b64encode(_jpeg(_shrunk(picture, LONGEST_SIDE), _JPEG_QUALITY)).decode("ascii"),
        "truth": outlines(one.truth.masks),
        "classes": [of[0].cells.tolist() for of in of_classes],
        "models": models,
    }
    # Numbers, outlines and base64 only: nothing in it can end the script element.
    return json.dumps(content, separators=(",", ":"))


def _marks(instances: NDArray[np.int64], cells: NDArray[np.int64], verdict: Verdict) -> dict[str, list[int]]:
    """The indices of instances and cells by what became of them."""
    return {
        "found": instances[verdict.found].tolist(),
        "false": instances[~verdict.found].tolist(),
        "missed": cells[verdict.missed].tolist(),
        "merged": instances[verdict.merged].tolist(),
        "split": cells[verdict.split].tolist(),
    }


def _picture(file: Path, size: tuple[int, int]) -> np.ndarray:
    """The image (H,W,3) uint8 to look at."""
    image = read_image(file)
    if image.shape[:2] != tuple(size):
        raise ValueError(f"{file}: it has {image.shape[:2]} pixels (height, width), its ground truth {tuple(size)}")
    return stretched(image)


def _shrunk(picture: np.ndarray, longest: int) -> np.ndarray:
    height, width = picture.shape[:2]
    factor = min(1.0, longest / max(height, width))
    return resize_image(picture, (max(1, round(height * factor)), max(1, round(width * factor))))


def _jpeg(picture: np.ndarray, quality: int) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"

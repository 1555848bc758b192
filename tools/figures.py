"""Make the paper's Figures 2, 3 and 4 from predictions and a trained model, and the curves of a training.

    python tools/figures.py comparison GT PRED [PRED ...] --images DIR -o figure2.png
    python tools/figures.py cells GT PRED_S1 PRED_BRANCH --images DIR -o figure3.png
    python tools/figures.py scales IMAGE -m MODEL -o figure4.png
    python tools/figures.py training RUN_DIR -o training.png

GT is a COCO JSON or a folder of label images; PRED is the same or COCO results, such as the ``predictions.json`` that
`compare.py` writes for every run. Models are named by what tells their paths apart, or by ``--names``. Instances are
drawn from the score on at which F1 over all images is highest, for each model.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from pycocotools import mask as coco_mask

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.export.overlay import draw_cells, stretched
from kg_detectron.io.atomic import replacing
from kg_detectron.io.cell_sets import ImageCells, read_cells, read_predictions
from kg_detectron.io.images import read_image
from kg_detectron.report import explain_image, model_names
from kg_detectron.report.build import find_images
from kg_detectron.report.comparison import Comparison, JudgedImage, compare

PANEL = 2.4  # inches
MARGIN = 0.5  # around a cell of Figure 3, as a share of its longer side


def comparison_figure(comparison: Comparison, files: dict[str, Path], names: Sequence[str]) -> Figure:
    """Figure 2: input, ground truth and the instances of each model, a row an image.

    A dotted circle marks the largest cell that some of the models found and others did not, where there is one.
    """
    by_name = {judged.truth.name: judged for judged in comparison.images}
    rows = [by_name[name] for name in names]
    figure, grid = _panels(len(rows), ["Input", "Ground truth", *comparison.models])
    for judged, panels in zip(rows, grid, strict=True):
        image = read_image(files[judged.truth.name])
        panels[0].imshow(stretched(image)[..., ::-1])
        shown = [judged.truth.masks, *_counted(judged)]
        for axes, masks in zip(panels[1:], shown, strict=True):
            cells = MaskCrops.from_rle(masks, judged.truth.size)
            axes.imshow(draw_cells(image, cells, mode="fill", opacity=0.6)[..., ::-1])
        _mark_difference(judged, panels)
    return figure


def even_choice(comparison: Comparison, count: int) -> list[str]:
    """Names of images with cells: those that stand at even distances in the order of F1, the mean over the models."""
    ranked = sorted((judged for judged in comparison.images if judged.truth.masks), key=lambda judged: judged.f1)
    places = (np.arange(min(count, len(ranked))) + 0.5) / min(count, len(ranked)) * len(ranked)
    return [ranked[int(place)].truth.name for place in places]


def cells_figure(comparison: Comparison, files: dict[str, Path], count: int) -> Figure:
    """Figure 3: single cells as two models segment them, those on which the masks differ most.

    Cells that both models found; half of the rows are those where the last model gains most IoU over the first, half
    those where it loses most, so that the choice favours neither.

    Raises:
        ValueError: for another number of models than two, or no cell that both found.
    """
    if len(comparison.models) != 2:
        raise ValueError(f"Figure 3 compares two models, got {len(comparison.models)}")
    both = []
    for judged in comparison.images:
        found = [dict(_found(judged, m, comparison.threshold)) for m in range(2)]
        for cell in sorted(found[0].keys() & found[1].keys()):
            instances = [judged.predictions[m].masks[found[m][cell]] for m in range(2)]
            first, last = coco_mask.iou(instances, [judged.truth.masks[cell]], [0])[:, 0]
            both.append((last - first, judged, cell, instances))
    if not both:
        raise ValueError("there is no cell that both models found")
    both.sort(key=lambda row: (-row[0], row[1].truth.name, row[2]))
    half = min(count, len(both)) // 2
    chosen = both[: min(count, len(both)) - half] + both[len(both) - half :]
    figure, grid = _panels(len(chosen), ["Input", "Ground truth", *comparison.models])
    for (_, judged, cell, instances), panels in zip(chosen, grid, strict=True):
        image = stretched(read_image(files[judged.truth.name]))
        x, y, width, height = coco_mask.toBbox(coco_mask.merge([judged.truth.masks[cell], *instances]))
        edge = MARGIN * max(width, height) / 2
        truth = judged.truth.masks[cell]
        for axes, mask in zip(panels, [None, truth, *instances], strict=True):
            axes.imshow(image[..., ::-1])
            if mask is not None:
                axes.contourf(coco_mask.decode(mask), levels=[0.5, 1], colors=["#e69f00"], alpha=0.45)
                axes.contour(coco_mask.decode(mask), levels=[0.5], colors=["#e69f00"], linewidths=1.4)
            axes.set(xlim=(x - edge, x + width + edge), ylim=(y + height + edge, y - edge))
        for axes, mask in zip(panels[2:], instances, strict=True):
            axes.set_xlabel(f"IoU {coco_mask.iou([mask], [truth], [0])[0, 0]:.2f}")
    return figure


def _found(judged: JudgedImage, m: int, threshold: int) -> list[tuple[int, int]]:
    """Cells and the counted instances of a model that found them."""
    counted = judged.matches[m].cell[threshold, : len(judged.verdicts[m].found)]
    return [(int(cell), i) for i, cell in enumerate(counted) if cell >= 0]


def _counted(judged: JudgedImage) -> list[list[dict]]:
    """The masks of every model from its score on."""
    pairs = zip(judged.predictions, judged.verdicts, strict=True)
    return [list(prediction.masks[: len(verdict.found)]) for prediction, verdict in pairs]


def _mark_difference(judged: JudgedImage, panels: Sequence[Axes]) -> None:
    missed = np.array([verdict.missed for verdict in judged.verdicts]).sum(axis=0)
    differs = np.flatnonzero((missed > 0) & (missed < len(judged.verdicts)))
    if len(differs):
        largest = max(differs, key=lambda cell: coco_mask.area(judged.truth.masks[cell]))
        x, y, width, height = coco_mask.toBbox(judged.truth.masks[largest])
        for axes in panels:
            place, radius = (x + width / 2 - 0.5, y + height / 2 - 0.5), 0.75 * max(width, height)
            axes.add_patch(Circle(place, radius, fill=False, color="white", linestyle=":", linewidth=1.6))


def _panels(rows: int, titles: Sequence[str]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PANEL * len(titles), PANEL * rows + 0.4), dpi=150, layout="constrained")
    grid = figure.subplots(rows, len(titles), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure, grid


def _compare(options: argparse.Namespace) -> tuple[Comparison, dict[str, Path]]:
    truths: list[ImageCells] = read_cells(options.ground_truth)
    names = options.names or model_names(options.predictions)
    if len(names) != len(options.predictions) or len(set(names)) < len(names):
        raise ValueError(f"expected {len(options.predictions)} different names of models, got {', '.join(names)}")
    found = {name: read_predictions(path, truths) for name, path in zip(names, options.predictions, strict=True)}
    files = find_images(options.images, truths)
    return compare(truths, found, iou=options.iou, progress=True), files


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})  # the same bytes for the same figure
    return content.getvalue()


def training_figure(metrics: Path) -> Figure:
    """Losses by name, those of validation dashed; learning rate; AP on validation, over the iterations of a run.

    Args:
        metrics: ``metrics.json`` of the run, one JSON object a line.

    Raises:
        FileNotFoundError, ValueError: no such file; a line that is not JSON; no losses in it.
    """
    curves: dict[str, dict[int, float]] = {}
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            iteration = record.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{metrics}, line {number}: expected a JSON object with an iteration: {error}") from error
        for name, value in record.items():
            curves.setdefault(name, {})[iteration] = value
    losses = sorted(name for name in curves if "loss" in name.rpartition("/")[2])
    if not losses:
        raise ValueError(f"{metrics}: it has no losses")
    rates, aps = ["lr"] if "lr" in curves else [], sorted(name for name in curves if name.startswith("paper/"))
    panels = {"loss": losses, "learning rate": rates, "AP and IOU on validation, %": aps}
    figure = Figure(figsize=(4 * PANEL, 1.6 * PANEL), dpi=150, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        base_names = [name.removeprefix("validation/") for name in names]
        for name, base in zip(names, base_names, strict=True):
            style = {"color": f"C{sorted(set(base_names)).index(base)}", "linestyle": "-" if name == base else "--"}
            points = sorted(curves[name].items())
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else "", **style)
        axes.set(title=title, xlabel="iteration", yscale="log" if title == "loss" else "linear")
        if names:
            axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, text in (("comparison", "Figure 2: instances of the models"), ("cells", "Figure 3: single cells")):
        command = commands.add_parser(name, help=text)
        command.add_argument("ground_truth", metavar="GT")
        command.add_argument("predictions", nargs="+", metavar="PRED")
        command.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
        command.add_argument("--names", nargs="+", metavar="NAME", help="of the models")
        command.add_argument("--iou", type=float, default=0.5, help="from which a cell is found (default: 0.5)")
        command.add_argument("--count", type=int, default=4, metavar="N", help="rows (default: 4)")
        if name == "comparison":
            command.add_argument(
                "--show", nargs="+", metavar="IMAGE", help="names without ending (default: at even ranks of F1)"
            )
    scales = commands.add_parser("scales", help="Figure 4: heatmaps and groups at every scale")
    scales.add_argument("image", metavar="IMAGE")
    scales.add_argument("-m", "--model", required=True, help="model file, or checkpoint of train_net.py")
    training = commands.add_parser("training", help="losses, learning rate and AP over the iterations")
    training.add_argument("run", metavar="RUN_DIR", type=Path, help="folder that train_net.py wrote")
    for command in commands.choices.values():
        command.add_argument("-o", "--output", required=True, type=Path, metavar="PNG")
    options = parser.parse_args(arguments)
    try:
        with matplotlib.rc_context({"font.size": 8, "font.family": "DejaVu Sans"}):
            content = _draw(options)
        with replacing(options.output) as unfinished:
            unfinished.write_bytes(content)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _draw(options: argparse.Namespace) -> bytes:
    if options.figure == "scales":
        return explain_image(options.model, options.image).png
    if options.figure == "training":
        return _png(training_figure(options.run / "metrics.json"))
    if options.count < 1:
        raise ValueError(f"--count: expected at least 1, got {options.count}")
    comparison, files = _compare(options)
    if options.figure == "cells":
        return _png(cells_figure(comparison, files, options.count))
    names = options.show or even_choice(comparison, options.count)
    unknown = sorted(set(names) - files.keys())
    if unknown:
        raise ValueError(f"--show: the ground truth has no image {', '.join(unknown)}")
    if not names:
        raise ValueError(f"{options.ground_truth}: no image has a cell")
    return _png(comparison_figure(comparison, files, names))


if __name__ == "__main__":
    main()

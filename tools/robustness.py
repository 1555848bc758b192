"""Measure how F1 changes where the same images come in other sizes: cut into strips, halves and quarters, or resized.

    python tools/robustness.py ANNOTATIONS IMAGES [-m MODEL] [--every N] [--scales 0.5 0.7 1.5 2] [--json FILE]

ANNOTATIONS is a COCO JSON, IMAGES the folder of its images. Every part is predicted with no option at all, its scale
being the model's estimate, and cells from the model's own threshold on count. A part of a cell at a cut is a cell, if
it has at least 9 pixels. It prints a table with one row for each way.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kg_detectron import load_model, predict
from kg_detectron.cells import MaskCrops
from kg_detectron.io.atomic import replacing
from kg_detectron.io.coco import load_coco
from kg_detectron.io.images import read_image
from kg_detectron.io.resize import resize_image, resize_labels
from kg_detectron.metrics import MatchingMetrics
from kg_detectron.training.dataset import labels_of_record

IOUS = (0.5, 0.7)
SMALLEST = 9  # pixels

Part = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) and labels (H, W)


def grid(rows: int, columns: int) -> Callable[[np.ndarray, np.ndarray], Iterator[Part]]:
    """Cuts an image into so many rows and columns of parts."""

    def parts(image: np.ndarray, labels: np.ndarray) -> Iterator[Part]:
        ys, xs = (
            np.linspace(0, labels.shape[axis], count + 1).astype(int) for axis, count in ((0, rows), (1, columns))
        )
        for y1, y2 in zip(ys[:-1], ys[1:], strict=True):
            for x1, x2 in zip(xs[:-1], xs[1:], strict=True):
                yield image[y1:y2, x1:x2], labels[y1:y2, x1:x2]

    return parts


def scaled(scale: float) -> Callable[[np.ndarray, np.ndarray], Iterator[Part]]:
    """Resizes an image by a factor."""

    def parts(image: np.ndarray, labels: np.ndarray) -> Iterator[Part]:
        size = tuple(max(1, round(side * scale)) for side in labels.shape)
        resized = resize_image(image.astype(np.float32), size)
        yield np.round(resized).astype(image.dtype), resize_labels(labels, size)

    return parts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="COCO JSON")
    parser.add_argument("images", metavar="IMAGES", help="folder of its images")
    parser.add_argument("-m", "--model", default="nuclei", help="kept model's name, or a model file; default: nuclei")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth image only; default: 1")
    parser.add_argument("--scales", type=float, nargs="*", default=[0.5, 0.7, 1.5, 2.0], metavar="S")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)

    ways = {"whole": grid(1, 1), "halves": grid(1, 2), "quarters": grid(2, 2), "strips": grid(4, 1)}
    ways |= {f"times {scale:g}": scaled(scale) for scale in options.scales}
    model = load_model(options.model)
    metrics = {name: MatchingMetrics(IOUS) for name in ways}
    for record in tqdm(load_coco(options.annotations, options.images).records[:: options.every], unit="image"):
        image, labels = read_image(record["file_name"]), labels_of_record(record)
        for name, way in ways.items():
            for part, truth in way(image, labels):
                cells = predict(model, np.ascontiguousarray(part))
                numbers, counts = np.unique(truth, return_counts=True)
                truth = np.where(np.isin(truth, numbers[counts >= SMALLEST]), truth, 0)
                found = MaskCrops.from_label_image(cells.above(model.threshold).masks.label_image())
                metrics[name].update(MaskCrops.from_label_image(truth).rle(), found.rle())

    figures = {name: metric.compute() for name, metric in metrics.items()}
    print("| images | " + " | ".join(f"F1@{iou}" for iou in IOUS) + " | precision | recall |")
    print("|---|" + "---:|" * (len(IOUS) + 2))
    for name, figure in figures.items():
        f1 = " | ".join(f"{figure[str(iou)]['f1']:.3f}" for iou in IOUS)
        print(f"| {name} | {f1} | {figure['0.5']['precision']:.3f} | {figure['0.5']['recall']:.3f} |")
    if options.json:
        with replacing(Path(options.json)) as unfinished:
            unfinished.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

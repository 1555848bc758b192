"""Measure what a few labelled images are worth, from a trained model, from ImageNet weights and from nothing.

    python tools/fine_tuning.py TRAIN.json IMAGES TEST.json IMAGES -o results/fine_tuning

Each run is one of ``kg-detectron train``: a fifth of the images drawn is split off to validate on. Its model then
predicts the test images with no option. Every finished run is one small JSON file in the output folder, and the table
is made of all that are there; called again, it trains what is missing and goes on with a run that was stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from kg_detectron import load_model
from kg_detectron.io.atomic import replacing
from kg_detectron.modeling import InstanceNet
from kg_detectron.training import run
from kg_detectron.training.dataset import LabelledImage, read_dataset
from kg_detectron.training.validation import validate

FIGURES = {"mask_ap_0.5": "mask AP@0.5", "mask_ap_0.7": "mask AP@0.7", "f1": "F1@0.5"}


def figures_of(model: InstanceNet, images: list[LabelledImage]) -> dict[str, float]:
    """AP, and F1 from the model's own threshold on, of images that are predicted with no option."""
    result = validate(model, images)
    boxes = None if result.boxes is None else torch.from_numpy(result.boxes)
    kept = (model.scores(torch.from_numpy(result.scores), boxes) >= model.threshold).numpy()
    f1 = 2 * result.right[kept].sum() / (kept.sum() + result.positives)
    return {f"mask_ap_{iou}": value for iou, value in result.mask_ap.items()} | {"f1": float(f1)}


def draw(images: list[LabelledImage], count: int, seed: int) -> list[LabelledImage]:
    """So many of the images, at random; a larger draw of one seed holds the smaller ones."""
    return [images[i] for i in np.random.RandomState(seed).permutation(len(images))[:count]]


def table(folder: Path) -> str:
    """The means and the spread of all runs whose figures are in a folder."""
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    for file in sorted(folder.glob("*.json")):
        one = json.loads(file.read_text(encoding="utf-8"))
        rows.setdefault((one["start"], one["images"]), []).append(one["figures"])
    lines = [
        "| from | images | runs | " + " | ".join(FIGURES.values()) + " |",
        "|---|---:|---:|" + "---:|" * len(FIGURES),
    ]
    for (start, count), runs in sorted(rows.items()):
        cells = []
        for name in FIGURES:
            values = [100 * one[name] for one in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {start} | {count} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", metavar="TRAIN.json", help="COCO JSON to draw from")
    parser.add_argument("images", metavar="IMAGES", help="folder of its images")
    parser.add_argument("test", metavar="TEST.json", help="COCO JSON to measure on")
    parser.add_argument("test_images", metavar="IMAGES", help="folder of its images")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="of the figures")
    parser.add_argument("--runs", type=Path, default=Path("output/fine_tuning"), metavar="FOLDER", help="of the runs")
    parser.add_argument("--starts", nargs="+", default=["nuclei", run.IMAGENET, run.NOTHING], metavar="MODEL")
    parser.add_argument("--counts", nargs="+", type=int, default=[5, 10, 20], metavar="N", help="0: as it is")
    parser.add_argument("--draws", nargs="+", type=int, default=[1, 2], metavar="SEED")
    parser.add_argument("--minutes", type=float, default=15, help="of each training; default: 15")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.draws:
        for count in options.counts:
            for start in options.starts:
                adapts = start not in (run.IMAGENET, run.NOTHING)
                name = f"{Path(start).stem}_{count}_draw{seed}"
                file = options.output / f"{name}.json"
                if file.exists() or not (count or adapts):
                    continue
                print(name, flush=True)
                model = run.starting_model(start)
                if count:
                    drawn = draw(read_dataset(options.train, options.images, model.preprocessing), count, seed)
                    training, validation = run.split_validation(drawn, seed=seed)
                    settings = run.TrainSettings(minutes=options.minutes, seed=seed)
                    folder = options.runs / name
                    if run.train(model, training, validation, folder, settings, adapts=adapts) is None:
                        return 130
                    model = load_model(folder / run.MODEL_FILE)
                test = read_dataset(options.test, options.test_images, model.preprocessing)
                content = {"start": Path(start).stem, "images": count, "draw": seed, "minutes": options.minutes}
                with replacing(file) as unfinished:
                    figures = figures_of(model, test)
                    unfinished.write_text(json.dumps(content | {"figures": figures}, indent=2), encoding="utf-8")
    print(table(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate finished runs on one dataset and write the paper's two tables, and what each model costs.

    python tools/compare.py output/kg output/mask_rcnn --dataset dsb2018_val --output output/comparison

A run is a folder that `train_net.py` wrote: ``config.yaml``, ``model_best.pth`` or ``model_final.pth``, and
``metrics.json``. The output folder gets ``comparison.md``, ``comparison.csv``, ``comparison.json`` and, for every run,
its predictions as COCO results in ``<run>/predictions.json``; with ``--report``, a page to look at in ``report.html``.

Classes of a run and categories of the dataset are the same where they have the same name, whatever their order. On a
dataset of one category all classes count as that one. COCO AP is the mean over the categories; the paper's figures know
no classes. `kg-detectron evaluate` gives the figures by class of ``predictions.json``.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

if importlib.util.find_spec("detectron2") is None:
    print(f"{Path(sys.argv[0]).name}: error: Detectron2 is not installed; `make setup` installs it", file=sys.stderr)
    sys.exit(2)

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.modeling import build_model
from detectron2.structures import BoxMode, Instances

import kg_detectron.d2  # noqa: F401  (registers the models and the datasets)
from kg_detectron.d2.classes import check_classes
from kg_detectron.d2.confidence import CONFIDENCE_FILE
from kg_detectron.d2.config import add_kg_config, drop_initial_weights, merge_config
from kg_detectron.d2.datasets import register_cells, register_files
from kg_detectron.d2.evaluators import CellEvaluators, build_evaluators, mask_rles
from kg_detectron.d2.mapper import CellMapper
from kg_detectron.inference.model_file import WEIGHTS
from kg_detectron.io.atomic import replacing
from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.metrics import RLE
from kg_detectron.report import report_dataset
from kg_detectron.training.dataset import class_counts

# The same for every run, whatever its own config says: one table, one ruler.
IOUS = (0.5, 0.7)
COCO_MAX_DETECTIONS = 10000

TABLES = {
    "Instance segmentation": ("mask_AP@0.5", "mask_AP@0.7", "IOU@0.5", "IOU@0.7"),
    "Detection": ("box_AP@0.5", "box_AP@0.7"),
    "COCO AP and cost": (
        "COCO_mask_AP",
        "COCO_box_AP",
        "parameters_M",
        "GMACs",
        "dense_GMACs",
        "seconds_per_image",
        "training_minutes",
    ),
}
HEADINGS = {  # of the columns in Markdown, with the digits after the point
    "mask_AP@0.5": ("AP@0.5", 2),
    "mask_AP@0.7": ("AP@0.7", 2),
    "IOU@0.5": ("IOU@0.5", 2),
    "IOU@0.7": ("IOU@0.7", 2),
    "box_AP@0.5": ("AP@0.5", 2),
    "box_AP@0.7": ("AP@0.7", 2),
    "COCO_mask_AP": ("COCO mask AP", 2),
    "COCO_box_AP": ("COCO box AP", 2),
    "parameters_M": ("parameters (M)", 2),
    "GMACs": ("GMACs", 2),
    "dense_GMACs": ("of which dense", 2),
    "seconds_per_image": ("s/image", 3),
    "training_minutes": ("training (min)", 1),
}
DEFINITIONS = {
    "AP@t": "area under the envelope of the precision-recall curve, detections of all images pooled; a detection whose"
    " best overlap is with a cell that is taken already is a false positive (%)",
    "IOU@t": "mean mask IoU of the true positives of mask AP@t (%)",
    "COCO AP": f"COCO's mean over IoU 0.50:0.95, at most {COCO_MAX_DETECTIONS} detections an image (%)",
    "parameters": "of the model, millions; buffers such as batch statistics are not counted",
    "GMACs": "multiply-adds of convolutions and matrix products for the dataset's first image at the network's input"
    " size, by torch.utils.flop_counter; dense: of the modules that work on whole maps, not cell by cell",
    "s/image": "median over the images, forward pass and masks to run lengths, file reading excluded, after a warm-up",
    "training": "minutes in training iterations, by metrics.json; evaluation and checkpoints excluded",
}


class CompareError(Exception):
    """Something about a run or the dataset that the user can mend."""


@dataclass(frozen=True)
class Run:
    """A finished training: a short unique name, and its files."""

    name: str
    config: Path
    weights: Path
    metrics: Path


def find_runs(folders: Sequence[str], weights: str | None = None) -> list[Run]:
    """The runs in `folders`, named by what tells the folders apart.

    Args:
        weights: file name in each folder; None takes the first of `WEIGHTS` that exists.
    Raises:
        CompareError: a folder given twice, or without config or weights.
    """
    paths = [Path(folder).resolve() for folder in folders]
    root = os.path.commonpath([path.parent for path in paths])
    runs: list[Run] = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        if any(run.name == name for run in runs):
            raise CompareError(f"run {path} is given twice")
        candidates = [path / file for file in ([weights] if weights else WEIGHTS)]
        found = next((file for file in candidates if file.is_file()), None)
        config = path / "config.yaml"
        if not config.is_file():
            raise CompareError(f"{config} is missing; is {path} the folder of a run?")
        if found is None:
            raise CompareError(f"no weights in {path}: {' and '.join(file.name for file in candidates)} missing")
        runs.append(Run(name=name, config=config, weights=found, metrics=path / "metrics.json"))
    return runs


def load_model(run: Run, device: str) -> tuple[CfgNode, nn.Module]:
    """The run's config and its trained model in evaluation mode.

    Raises:
        CompareError: a config that cannot be read, weights that cannot be read or do not fit the model to the last key.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    try:
        merge_config(cfg, str(run.config))
        cfg.MODEL.DEVICE = device
        drop_initial_weights(cfg)  # the run's own follow
        cfg.INPUT.MIN_SIZE_TEST = (
            0  # which runs of earlier versions have at Detectron2's default, and nothing here reads
        )
        cfg.TEST.PAPER_IOUS = list(IOUS)
        cfg.TEST.COCO_MAX_DETECTIONS = COCO_MAX_DETECTIONS
        check_classes(cfg)
        model = build_model(cfg).eval()
    except Exception as error:
        raise CompareError(f"cannot use {run.config}: {error}") from error
    # Detectron2's checkpointer only warns where weights do not fit, and the rest of the model stays random.
    try:
        model.load_state_dict(read_checkpoint(run.weights)["model"])
    except Exception as error:
        raise CompareError(f"cannot load {run.weights} into the model of {run.config}: {error}") from error
    return cfg, model


def load_records(dataset: str, limit: int | None = None) -> list[dict]:
    """Detectron2's records of the dataset, the first `limit`.

    Raises:
        CompareError: a name that is neither registered nor that of a COCO file, or files that are missing or faulty.
    """
    try:
        register_files([dataset])
        if dataset not in DatasetCatalog.list():
            cells = [
                name for name in DatasetCatalog.list() if MetadataCatalog.get(name).get("evaluator_type") == "cells"
            ]
            raise CompareError(f"unknown dataset {dataset!r}; there are {', '.join(sorted(cells)) or 'none of cells'}")
        return DatasetCatalog.get(dataset)[:limit]
    except (OSError, ValueError) as error:
        raise CompareError(f"cannot read dataset {dataset!r}: {error}") from error


def match_classes(run: str, names: Sequence[str], dataset: str) -> list[int]:
    """Let the dataset's metadata have all classes of a run; the result is the class in it of each class of the run.

    Args:
        run: its name.
        names: of its classes.
        dataset: a registered dataset, of which classes of the same names are the same.

    Raises:
        CompareError: the run does not know a category that has cells.
    """
    metadata = MetadataCatalog.get(dataset)
    categories = list(metadata.thing_classes)
    used = list(class_counts(metadata.json_file))
    if len(used) < 2:
        return [categories.index(used[0]) if used else 0] * len(names)
    unknown = [name for name in used if name not in names]
    if unknown:
        raise CompareError(
            f"run {run} knows the classes {', '.join(names)}, and dataset {dataset} has cells of {', '.join(unknown)}; "
            "kg-detectron convert --merge-categories makes one of all, on which all runs can be compared"
        )
    absent = [name for name in names if name not in categories]
    if absent:
        json_file, image_root = metadata.json_file, metadata.image_root
        DatasetCatalog.remove(dataset)
        MetadataCatalog.remove(dataset)
        register_cells(dataset, json_file, image_root, [*categories, *absent])
        DatasetCatalog.get(dataset)  # sets the metadata
    return [[*categories, *absent].index(name) for name in names]


def count_gmacs(model: nn.Module, image: Mapping[str, Any]) -> dict[str, float]:
    """``GMACs`` of one inference, and ``dense_GMACs``, those of the modules that work on whole maps."""
    network = getattr(model, "network", None)
    if network is None:  # of Detectron2's generalised R-CNN
        dense = [getattr(model, name, None) for name in ("backbone", "proposal_generator")]
    else:
        dense = network.dense_modules()
    names = {
        f"{type(model).__name__}.{name}" for name, module in model.named_modules() if any(module is m for m in dense)
    }
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model([image])
    counts = counter.get_flop_counts()
    of_dense = sum(sum(counts.get(name, {}).values()) for name in names)
    return {"GMACs": counter.get_total_flops() / 2e9, "dense_GMACs": of_dense / 2e9}


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: Iterable[list[dict]],
    evaluators: CellEvaluators,
    classes: Sequence[int],
    category_ids: Mapping[int, int],
) -> tuple[list[dict], list[float]]:
    """Run the model over batches of one image, feeding the evaluators.

    Args:
        classes: of the dataset's metadata, that of every class of the model, see `match_classes`.
        category_ids: the dataset's id of every class of its metadata.
    Returns:
        All detections as COCO results, and for each image the seconds from the network's input to encoded masks.
    """
    results, seconds = [], []
    for inputs in loader:
        start = time.perf_counter()
        instances = model(inputs)[0]["instances"].to("cpu")
        rles = mask_rles(instances.pred_masks)
        seconds.append(time.perf_counter() - start)
        instances.pred_classes = torch.tensor(classes)[instances.pred_classes]
        evaluators.process(inputs, [{"instances": instances}])
        results += coco_results(instances, rles, inputs[0]["image_id"], category_ids)
    return results, seconds


def coco_results(
    instances: Instances, rles: Sequence[RLE], image_id: int, category_ids: Mapping[int, int]
) -> list[dict]:
    """Detections of one image in COCO's result format: bbox (x, y, width, height) and compressed masks, JSON-ready."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    columns = boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist(), rles
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "segmentation": rle,
        }
        for box, score, label, rle in zip(*columns, strict=True)
    ]


def training_minutes(metrics: Path) -> float:
    """Minutes spent in training iterations: seconds an iteration x iterations, over the lines of ``metrics.json``.

    Of an iteration that was logged twice, in a resumed run, the last line counts. nan where the file tells nothing.
    """
    if not metrics.is_file():
        return math.nan
    seconds = {}
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a run that was killed may have left half a line
            record = json.loads(line)
            if "time" in record:
                seconds[record["iteration"]] = record["time"]
    iterations = sorted(seconds)
    steps = [now - before for before, now in zip([-1, *iterations], iterations, strict=False)]
    return sum(step * seconds[i] for step, i in zip(steps, iterations, strict=True)) / 60 if seconds else math.nan


def fit_minutes(folder: Path) -> float:
    """Minutes that the confidence head of a run in a folder took; 0 without one."""
    file = folder / CONFIDENCE_FILE
    return json.loads(file.read_text())["minutes"] if file.is_file() else 0.0


def evaluate_run(run: Run, dataset: str, records: list[dict], device: str, output: Path) -> dict[str, Any]:
    """The row of one run: its name and weights, and a number under every key of `HEADINGS` (AP and IoU in percent)."""
    cfg, model = load_model(run, device)
    # No workers: they would compete with the model for the processor that is being timed.
    loader = build_detection_test_loader(records, mapper=CellMapper(cfg, is_train=False), num_workers=0)
    first = loader.dataset[0]
    gmacs = count_gmacs(model, first)
    with torch.no_grad():
        model([first])  # warm-up

    classes = match_classes(run.name, cfg.MODEL.CELLS.CLASSES.NAMES, dataset)
    evaluators = build_evaluators(cfg, dataset)
    evaluators.reset()
    category_ids = {label: key for key, label in MetadataCatalog.get(dataset).thing_dataset_id_to_contiguous_id.items()}
    results, seconds = predict(model, tqdm(loader, desc=run.name, unit="image"), evaluators, classes, category_ids)
    folder = output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "predictions.json") as unfinished:
        unfinished.write_text(json.dumps(results))

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        figures = evaluators.evaluate(img_ids=[record["image_id"] for record in records])
    return {
        "run": run.name,
        "weights": run.weights.name,
        **figures["paper"],
        "COCO_mask_AP": figures["segm"]["AP"],
        "COCO_box_AP": figures["bbox"]["AP"],
        "parameters_M": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        **gmacs,
        "seconds_per_image": statistics.median(seconds),
        "training_minutes": training_minutes(run.metrics) + fit_minutes(run.metrics.parent),
    }


def markdown(rows: Sequence[Mapping[str, Any]], dataset: str, images: int, device: str) -> str:
    """The tables of `TABLES` with a heading, and the definitions below; undefined figures are n/a."""
    parts = [f"Dataset {dataset}, {images} images; timed on {device}."]
    for title, keys in TABLES.items():
        lines = [[row["run"], *(_number(row[key], HEADINGS[key][1]) for key in keys)] for row in rows]
        parts.append(markdown_table(title, ["model", *(HEADINGS[key][0] for key in keys)], lines))
    parts.append("\n".join(f"- {name}: {text}." for name, text in DEFINITIONS.items()))
    return "\n\n".join(parts) + "\n"


def markdown_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a heading; the first column is of names, the others of figures."""
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(cells) + " |" for cells in table)])


def save(output: Path, rows: Sequence[Mapping[str, Any]], dataset: str, images: int, device: str) -> str:
    """Write ``comparison.md``, ``.csv`` and ``.json`` (undefined figures: n/a, empty, null) and return the Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, dataset, images, device)
    with replacing(output / "comparison.md") as unfinished:
        unfinished.write_text(text)
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # nan is not JSON
    with replacing(output / "comparison.csv") as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "weights", *HEADINGS])
        writer.writeheader()
        writer.writerows(plain)
    report = {
        "dataset": dataset,
        "images": images,
        "coco_max_detections": COCO_MAX_DETECTIONS,
        "device": device,
        "definitions": DEFINITIONS,
        "runs": plain,
    }
    with replacing(output / "comparison.json") as unfinished:
        unfinished.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return text


def write_report(runs: Sequence[Run], dataset: str, output: Path) -> None:
    """Write ``report.html`` from the predictions that `evaluate_run` has written."""
    metadata = MetadataCatalog.get(dataset)
    predictions = {run.name: output / run.name / "predictions.json" for run in runs}
    report_dataset(
        metadata.json_file, predictions, metadata.image_root, output / "report.html", title=dataset, ious=IOUS
    )


def _number(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} with {torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--dataset", required=True, help="registered dataset, such as dsb2018_val, or COCO JSON")
    parser.add_argument("--output", required=True, type=Path, help="folder for the tables and the predictions")
    parser.add_argument("--weights", metavar="FILE", help=f"weights in each run (default: {', else '.join(WEIGHTS)})")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--report", action="store_true", help="write report.html too, which shows the images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    if options.report and options.limit is not None:
        parser.error("--report shows the whole dataset; it does not go with --limit")
    try:
        runs = find_runs(options.runs, options.weights)
        records = load_records(options.dataset, options.limit)
        rows = [evaluate_run(run, options.dataset, records, options.device, options.output) for run in runs]
    except CompareError as error:
        parser.error(str(error))
    print(save(options.output, rows, options.dataset, len(records), _device_name(options.device)))
    if options.report:
        write_report(runs, options.dataset, options.output)


if __name__ == "__main__":
    main()

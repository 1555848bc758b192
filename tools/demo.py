#!/usr/bin/env python
"""The main job on embedded data, in minutes on two CPU cores: `make demo`.

Makes a synthetic set, trains the small keypoint-graph model and the small Mask R-CNN on it, compares them, and writes
a picture and the table to demo/. Where Detectron2 is missing, the keypoint-graph model alone, as `kg-detectron train`
does it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.export.overlay import draw_cells
from kg_detectron.inference import load_model, predict
from kg_detectron.io.coco import CocoDataset, load_coco
from kg_detectron.io.images import read_image, write_png
from kg_detectron.io.resize import resize_image, resize_labels
from kg_detectron.modeling import (
    BackboneSettings,
    DecodingSettings,
    HeadSettings,
    KeypointGraphNet,
    KeypointGraphSettings,
    Preprocessing,
    RankingSettings,
    SegmentationSettings,
    TargetSettings,
    TrunkSettings,
)
from kg_detectron.training.augmentation import GeometrySettings
from kg_detectron.training.dataset import read_labelled_images
from kg_detectron.training.run import MODEL_FILE, TrainSettings, train

ROOT = Path(__file__).parents[1]
DEMO = Path("demo")
DATA = DEMO / "data"
RUNS = {"kg_r18_synthetic_plus_cpu": "keypoint graph", "mask_rcnn_fpn_r18_synthetic_cpu": "Mask R-CNN"}
ITERATIONS = 240
PICTURES = 3


def run(script: str, *arguments: object, log: Path, steps: int | None = None, title: str = "") -> None:
    """Run a script of tools/, its output in a log file, with a progress bar over its `iter: N` lines.

    Raises:
        SystemExit: where it fails; the end of its log is printed.
    """
    environment = os.environ | {"DETECTRON2_DATASETS": str(DATA), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "tools" / script), *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w") as file,
        tqdm(total=steps, desc=title, disable=steps is None) as progress,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as job,
    ):
        for line in job.stdout:
            file.write(line)
            if found := re.search(r"\biter: (\d+)\b.*?\btotal_loss: ([\d.]+)", line):
                progress.set_postfix(loss=found[2])
                progress.update(int(found[1]) + 1 - progress.n)
    if job.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
        sys.exit(f"tools/{script} failed; its whole output is in {log}")


def outlined(image: np.ndarray, masks: list[dict], caption: str) -> np.ndarray:
    """Three times the size, with the outline of each mask and a caption above."""
    size = 3 * image.shape[0], 3 * image.shape[1]
    labels = MaskCrops.from_rle(masks, image.shape[:2]).label_image()
    canvas = draw_cells(resize_image(image, size), resize_labels(labels, size), width=2)
    canvas = cv2.copyMakeBorder(canvas, 28, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    cv2.putText(canvas, caption, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def draw(dataset: CocoDataset, models: dict[str, dict[int, list[tuple[float, dict]]]], path: Path) -> None:
    """Images in rows; ground truth and each model in columns, of each model as many best cells as there are true ones.

    Args:
        dataset: the first `PICTURES` images of it are drawn.
        models: name -> image id -> (score, mask) of every detection.
        path: PNG file.
    """
    rows = []
    for record in dataset.records[:PICTURES]:
        image, truth = read_image(record["file_name"]), [a["segmentation"] for a in record["annotations"]]
        row = [outlined(image, [], "image"), outlined(image, truth, f"{len(truth)} cells")]
        for name, found in models.items():
            best = sorted(found.get(record["image_id"], []), key=lambda d: -d[0])[: len(truth)]
            row.append(outlined(image, [mask for _, mask in best], name))
        rows.append(np.hstack(row))
    write_png(path, np.vstack(rows))


def with_detectron2(dataset: CocoDataset) -> dict[str, dict[int, list[tuple[float, dict]]]]:
    """Train and compare both models; their detections by image."""
    models: dict[str, dict[int, list[tuple[float, dict]]]] = {}
    for name, title in RUNS.items():
        options = ["MODEL.DEVICE", "cpu", "SEED", 1, "SOLVER.MAX_ITER", ITERATIONS, "OUTPUT_DIR", DEMO / name]
        config = ROOT / "configs" / f"{name}.yaml"
        log = DEMO / f"{name}.log"
        run("train_net.py", "--config-file", config, *options, log=log, steps=ITERATIONS, title=f"training {title}")
    print("evaluating both models")
    folders = [DEMO / name for name in RUNS]
    options = ["--dataset", "synthetic_val", "--device", "cpu", "--output", DEMO / "comparison"]
    run("compare.py", *folders, *options, log=DEMO / "compare.log")
    print((DEMO / "comparison" / "comparison.md").read_text())
    for name, title in RUNS.items():
        found = models.setdefault(title, {})
        for d in json.loads((DEMO / "comparison" / name / "predictions.json").read_text()):
            found.setdefault(d["image_id"], []).append((d["score"], d["segmentation"]))
    return models


def small_network(diameter: float) -> KeypointGraphNet:
    """The network of configs/kg_r18_synthetic_plus_cpu.yaml, for cells of that diameter in pixels."""
    return KeypointGraphNet.build(
        KeypointGraphSettings(
            preprocessing=Preprocessing(resize="isotropic", diameter=diameter),
            backbone=BackboneSettings("resnet18", c0_channels=16),
            trunk=TrunkSettings(widths=(16, 32, 48, 64)),
            heads=HeadSettings(head_kernel=3),
            targets=TargetSettings(radius=2.0, min_side=3.0, heatmap_weight=5.0),
            decoding=DecodingSettings(
                smooth_sigma=0.8, peak_threshold=0.002, hops=2, corner_and_centre=True, nms_threshold=0.7
            ),
            segmentation=SegmentationSettings(box_jitter=0.2, mask_margin=1.0),
            ranking=RankingSettings(blur_weight=0.3, overlap_sigma=0.05),
        )
    )


def with_the_core(data: Path, folder: Path, iterations: int) -> dict[str, dict[int, list[tuple[float, dict]]]]:
    """Train the keypoint-graph model without Detectron2, as `kg-detectron train` does; its detections by image.

    Args:
        data: folder with train/, val/, instances_train.json and instances_val.json.
        folder: of the run.
        iterations: of the training.
    """
    torch.manual_seed(1)
    splits = ("train", "val")
    training, validation = (
        read_labelled_images(data / f"instances_{s}.json", data / s, Preprocessing()) for s in splits
    )
    network = small_network(float(np.median(np.concatenate([image.diameters for image in training]))))
    settings = TrainSettings(minutes=None, iterations=iterations, seed=1)
    window = GeometrySettings(window=min(training[0].labels.shape))
    figures = train(network, training, validation, folder, settings, geometry=window)
    if figures is None:
        sys.exit("stopped; the same command goes on")
    print(f"validation: {figures}")
    model = load_model(folder / MODEL_FILE)
    found = {}
    for record in load_coco(data / "instances_val.json", data / "val").records:
        cells = predict(model, read_image(record["file_name"]))
        found[record["image_id"]] = list(zip(cells.scores.tolist(), cells.masks.rle(), strict=True))
    return {RUNS["kg_r18_synthetic_plus_cpu"]: found}


def main() -> None:
    print("making synthetic cells")
    subprocess.run(
        [sys.executable, ROOT / "datasets" / "make_synthetic.py", "--kind", "nuclei", "--train", "120", "--val", "24"]
        + ["--size", "128", "128", "--cells", "4", "14", "--seed", "0", "--output", DATA],
        check=True,
    )
    dataset = load_coco(DATA / "synthetic" / "instances_val.json", DATA / "synthetic" / "val")
    if importlib.util.find_spec("detectron2") is None:
        print("Detectron2 is not installed: training the keypoint-graph model alone, as `kg-detectron train` does.")
        models = with_the_core(DATA / "synthetic", DEMO / "kg_core", ITERATIONS)
    else:
        models = with_detectron2(dataset)
    draw(dataset, models, DEMO / "overlay.png")
    print(f"Cells found in {PICTURES} images: {DEMO / 'overlay.png'}")
    if len(models) > 1:
        print(f"The table: {DEMO / 'comparison' / 'comparison.md'}")


if __name__ == "__main__":
    main()

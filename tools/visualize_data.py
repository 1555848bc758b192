#!/usr/bin/env python
"""Draw training images as a training sees them: augmented, with boxes, keypoints and masks.

    python tools/visualize_data.py --config-file configs/kg_lite_synthetic_cpu.yaml --output-dir pictures --count 8

As Detectron2's tool of that name, for data that a config of ours loads. `--source dataloader` draws the samples of the
training with the same `SEED`; `--source annotation` the images as they lie on the disk, in the model's grey levels.
Further `KEY VALUE` pairs override the config.
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if importlib.util.find_spec("detectron2") is None:
    print("visualize_data.py: error: Detectron2 is not installed; `make setup` installs it", file=sys.stderr)
    sys.exit(2)

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer

from kg_detectron.cells import MaskCrops
from kg_detectron.d2 import add_kg_config, register_files
from kg_detectron.d2.config import drop_initial_weights, merge_config, settings_of
from kg_detectron.d2.loaders import build_train_loader
from kg_detectron.io.images import read_image, write_png
from kg_detectron.layers.keypoints import box_keypoints
from kg_detectron.modeling import Preprocessing

# Image (H, W, 3) BGR of 0..255, boxes (M, 4) xyxy continuous, masks (M, H, W) bool.
Sample = tuple[np.ndarray, Tensor, np.ndarray]


def load_config(file: str, options: Sequence[str]) -> CfgNode:
    """The config, for samples that are drawn one by one in this process.

    Raises:
        OSError, KeyError, ValueError: a config, key, dataset or file that does not exist, or does not fit.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    merge_config(cfg, file)
    try:
        cfg.merge_from_list(list(options))
    except AssertionError as error:  # as Detectron2's config says it
        raise ValueError(f"KEY VALUE: {error}") from error
    drop_initial_weights(cfg)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 1, max(cfg.SEED, 0)
    register_files(cfg.DATASETS.TRAIN)
    for name in cfg.DATASETS.TRAIN:
        if name not in DatasetCatalog.list():
            raise ValueError(f"DATASETS.TRAIN: no dataset is called {name!r}; a COCO file is called by its path")
    return cfg


def samples(cfg: CfgNode) -> Iterator[tuple[str, Sample]]:
    """The samples of a training, without end, with the name of the file that each is of."""
    for (sample,) in build_train_loader(cfg):
        instances, image = sample["instances"], sample["image"].permute(1, 2, 0).numpy()
        image = image if cfg.INPUT.FORMAT == "BGR" else image[:, :, ::-1]
        yield sample["file_name"], (image, instances.gt_boxes.tensor, instances.gt_masks.tensor.numpy())


def annotations(cfg: CfgNode) -> Iterator[tuple[str, Sample]]:
    """The images of the training set as they are."""
    preprocessing = settings_of(cfg, Preprocessing)
    records = get_detection_dataset_dicts(list(cfg.DATASETS.TRAIN), filter_empty=False)
    for record in records:
        image = read_image(record["file_name"])
        cells = record["annotations"]
        boxes = np.array([cell["bbox"] for cell in cells], np.float64).reshape(-1, 4)
        boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        masks = MaskCrops.from_rle([cell["segmentation"] for cell in cells], image.shape[:2])
        image = preprocessing.levels(image)(image)
        yield (
            record["file_name"],
            (image, torch.from_numpy(boxes).float(), np.array([mask.numpy() for mask in masks], bool)),
        )


def draw(sample: Sample, scale: float = 1.0) -> np.ndarray:
    """One sample as a picture (H, W, 3), BGR: masks and boxes by Detectron2, and the five keypoints of every box."""
    image, boxes, masks = sample
    picture = Visualizer(image[:, :, ::-1].clip(0, 255).astype(np.uint8), scale=scale)
    picture.overlay_instances(boxes=boxes, masks=list(masks))
    for points in (box_keypoints(boxes) + 0.5).tolist():  # pixel indices -> centres of pixels
        for point in points:
            picture.draw_circle(point, color="yellow", radius=2)
    return np.ascontiguousarray(picture.output.get_image()[:, :, ::-1])


def write(cfg: CfgNode, source: str, count: int, folder: Path, scale: float) -> list[Path]:
    """Draw the first ``count`` samples into a folder, numbered, and return the files.

    Raises:
        OSError, ValueError: data that is missing or faulty, or a folder that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = samples(cfg) if source == "dataloader" else annotations(cfg)
    files = []
    for number, (name, sample) in enumerate(itertools.islice(drawn, count), start=1):
        files.append(folder / f"{number:03d}_{Path(name).stem}.png")
        write_png(files[-1], draw(sample, scale))
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a config of ours")
    parser.add_argument("--source", choices=("dataloader", "annotation"), default="dataloader", help="what is drawn")
    parser.add_argument("--output-dir", default="output/pictures", type=Path, metavar="FOLDER", help="of the PNGs")
    parser.add_argument("--count", default=16, type=int, metavar="N", help="of images (default: 16)")
    parser.add_argument("--scale", default=2.0, type=float, help="pixels of the picture for one of the image")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="override the config")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count: expected 1 or more, got {options.count}")
    if not 0 < options.scale <= 16:
        parser.error(f"--scale: expected a number above 0, at most 16, got {options.scale}")
    try:
        cfg = load_config(options.config_file, options.opts)
        files = write(cfg, options.source, options.count, options.output_dir, options.scale)
    except KeyError as error:
        parser.error(str(error.args[0]) if error.args else str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(files)} pictures in {options.output_dir}")


if __name__ == "__main__":
    main()

"""Builders that the tests share: tiny networks, drawn cells, small configs, golden cases."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kg_detectron.io.coco import coco_annotation, decode_mask, write_coco
from kg_detectron.io.images import read_image, write_png
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.io.resize import resize_image, resize_labels
from kg_detectron.modeling import InstanceNet, KeypointGraphNet, KeypointGraphSettings
from kg_detectron.modeling.settings import parts
from kg_detectron.synthetic import nuclei_image
from kg_detectron.training.augmentation import GeometrySettings
from kg_detectron.training.dataset import LabelledImage, labelled_image

if TYPE_CHECKING:
    from detectron2.config import CfgNode

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

# The keypoint graph with few channels, which finds something without any training.
TINY = {"backbone": "resnet18", "c0_channels": 4, "widths": (4, 6, 8, 8), "head_kernel": 3, "trunk_kernel": 3}
TINY |= {"radius": 3.0, "peak_threshold": 0.0, "size": (64, 96)}
# The same architecture with the channels that it needs to learn what cells look like in a few dozen steps.
TRAINABLE = TINY | {"c0_channels": 8, "widths": (8, 12, 16, 24), "radius": 2.0, "smooth_sigma": 1.0}
TRAINABLE |= {"peak_threshold": 0.004}
# Windows as small as the images of `labelled`, for speed.
SMALL = GeometrySettings(window=64)


def keypoint_graph_settings(**values: Any) -> KeypointGraphSettings:
    """Settings of the keypoint graph by the names of their fields, whatever part they belong to."""
    settings = {}
    for name, part in parts(KeypointGraphSettings):
        names = {field.name for field in dataclasses.fields(part)} & values.keys()
        settings[name] = part(**{name: values.pop(name) for name in names})
    assert not values, f"no part has the settings {', '.join(values)}"
    return KeypointGraphSettings(**settings)


def tiny_network(seed: int = 0, **changes: Any) -> KeypointGraphNet:
    """A network of the settings `TINY` and others, with random weights, in training mode."""
    torch.manual_seed(seed)
    return KeypointGraphNet.build(keypoint_graph_settings(**TINY | changes))


def drawn_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W) of the default floating-point type."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).to(torch.get_default_dtype())


def box_example(height: int, width: int, boxes: list[list[float]]) -> tuple[Tensor, dict[str, Tensor]]:
    """An image of noise and the target of cells that fill their boxes."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return torch.rand(3, height, width) * 255, {"boxes": torch.tensor(boxes).reshape(-1, 4), "masks": masks}


def nuclei_example(rng: np.random.Generator, side: int = 96, count: int = 10) -> tuple[Tensor, dict[str, Tensor]]:
    """An image of drawn nuclei and its target."""
    image, masks = nuclei_image(rng, side, side, count)
    target = {
        "boxes": torch.tensor([_tight_box(mask) for mask in masks], dtype=torch.float32),
        "masks": torch.from_numpy(np.array(masks)),
    }
    return to_tensor(image), target


def coco_example(record: dict[str, Any], size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image and target of a record of `load_coco`, resized to ``size``; cells that vanish are left out."""
    image = resize_image(Normalisation()(read_image(record["file_name"])), size)
    boxes, masks = [], []
    for annotation in record["annotations"]:
        mask = decode_mask(annotation["segmentation"], record["height"], record["width"])
        mask = resize_labels(mask.astype(np.uint8), size).astype(bool)
        if mask.any():
            boxes.append(_tight_box(mask))
            masks.append(mask)
    masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *size))
    return to_tensor(image), {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "masks": masks}


def _tight_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def train(
    model: torch.nn.Module,
    draw: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    steps: int,
    rate: float = 4e-3,
    batch_size: int = 2,
    decay: bool = False,
) -> None:
    """Train a network in place on examples that ``draw`` makes, and leave it in evaluation mode.

    The learning rate stays, or falls to 0 along a cosine.
    """
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps if decay else 10**9)
    model.train()
    for _ in range(steps):
        images, targets = zip(*(draw() for _ in range(batch_size)), strict=True)
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def nuclei_dataset(folder: Path, images: int, side: int = 64, seed: int = 0) -> Path:
    """Write a COCO data set of drawn nuclei, and return its JSON file; the images lie beside it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records, annotations = [], []
    for number in range(1, images + 1):
        image, masks = nuclei_image(rng, side, side, 4)
        write_png(folder / f"{number}.png", image)
        records.append({"id": number, "file_name": f"{number}.png", "height": side, "width": side})
        annotations += [
            coco_annotation(mask, image_id=number, annotation_id=len(annotations) + i + 1)
            for i, mask in enumerate(masks)
        ]
    write_coco(folder / "cells.json", records, annotations, [{"id": 1, "name": "cell"}], "made by a test")
    return folder / "cells.json"


def load_config(name: str, *options: object) -> "CfgNode":
    """A config of the folder configs, on the CPU, with further keys and values."""
    from detectron2.config import get_cfg

    from kg_detectron.d2 import add_kg_config
    from kg_detectron.d2.config import merge_config

    cfg = get_cfg()
    add_kg_config(cfg)
    merge_config(cfg, str(CONFIGS / f"{name}.yaml"))
    values = ["MODEL.DEVICE", "cpu", *options]
    cfg.merge_from_list([str(value) if isinstance(value, Path) else value for value in values])
    return cfg


def small_config(*options: object) -> "CfgNode":
    """The config of a tiny keypoint graph, which finds something without any training."""
    small = [
        "INPUT.SIZE",
        (64, 96),
        "INPUT.NORMALISATION",
        "fixed",
        "MODEL.CELLS.C0_CHANNELS",
        4,
        "MODEL.CELLS.WIDTHS",
        [4, 6, 8, 8],
    ]
    small += ["MODEL.KEYPOINT_GRAPH.HEAD_KERNEL", 3, "MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", 0.0]
    return load_config("kg_r18_dsb2018_cpu", *small, *options)


def golden_files(pattern: str) -> list[Path]:
    """Golden files: those of the repository, and the complete ones where they lie beside the checkout."""
    folders = ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def golden_id(path: Path) -> str:
    """Name of a golden file as the parameter of a test."""
    return path.stem if path.parent.parent.name == "tests" else f"complete_{path.stem}"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def labelled(model: InstanceNet, count: int, seed: int = 0) -> list[LabelledImage]:
    """Drawn images of 64x64 to train on."""
    images = []
    for index in range(count):
        image, cells = nuclei_image(np.random.default_rng(seed + index), 64, 64, 4)
        labels = np.zeros((64, 64), np.uint16)
        for number, cell in enumerate(cells, start=1):
            labels[cell] = number
        images.append(labelled_image(f"{index}", image, labels, model.preprocessing))
    return images


def training_network() -> InstanceNet:
    """A tiny network for the images of `labelled`."""
    torch.manual_seed(0)
    return tiny_network().with_preprocessing(resize="isotropic", diameter=14.0)

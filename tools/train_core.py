#!/usr/bin/env python
"""Train the keypoint-graph model with the core alone: a plain PyTorch loop on one device, for small experiments.

For everything else there is `train_net.py`, which needs Detectron2.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from kg_detectron.inference import predict, save_model
from kg_detectron.io.coco import CocoDataset, decode_mask, load_coco
from kg_detectron.io.images import read_image
from kg_detectron.io.resize import resize_labels
from kg_detectron.metrics import PaperMetrics
from kg_detectron.modeling import (
    BackboneSettings,
    DecodingSettings,
    HeadSettings,
    KeypointGraphNet,
    KeypointGraphSettings,
    Preprocessing,
    TargetSettings,
    TrunkSettings,
)
from kg_detectron.modeling.preprocessing import as_tensor


def settings(side: int) -> KeypointGraphSettings:
    """The network of configs/kg_r18_synthetic_cpu.yaml, for images of ``side`` pixels."""
    return KeypointGraphSettings(
        preprocessing=Preprocessing(size=(side, side)),
        backbone=BackboneSettings("resnet18", c0_channels=16),
        trunk=TrunkSettings(widths=(16, 32, 48, 64)),
        heads=HeadSettings(head_kernel=3),
        targets=TargetSettings(radius=2.0),
        decoding=DecodingSettings(smooth_sigma=1.0),
    )


def load_example(model: KeypointGraphNet, record: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Image (3, h, w) and target of a record, prepared as the model does it; cells that vanish are left out."""
    seen, _ = model.network_image(read_image(record["file_name"]))
    size, boxes, masks = (seen.shape[0], seen.shape[1]), [], []
    for annotation in record["annotations"]:
        mask = decode_mask(annotation["segmentation"], record["height"], record["width"])
        mask = resize_labels(mask.astype(np.uint8), size).astype(bool)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            masks.append(mask)
    return as_tensor(seen[:, :], model.place), {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "masks": torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *size)),
    }


def flipped(image: Tensor, target: dict[str, Tensor], axis: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirror an example along y (axis 1) or x (axis 2)."""
    boxes, (low, high) = target["boxes"].clone(), ((1, 3) if axis == 1 else (0, 2))
    boxes[:, low], boxes[:, high] = (
        image.shape[axis] - target["boxes"][:, high],
        image.shape[axis] - target["boxes"][:, low],
    )
    return image.flip(axis), {"boxes": boxes, "masks": target["masks"].flip(axis)}


def train(
    model: KeypointGraphNet,
    dataset: CocoDataset,
    iterations: int,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    flips: bool = True,
    seed: int = 0,
) -> None:
    """Train in place with Adam and a cosine schedule; batches are drawn with replacement between epochs."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    model.train()
    queue: list[int] = []
    with trange(iterations, desc="training") as progress:
        for _ in progress:
            while len(queue) < batch_size:
                queue += generator.permutation(len(dataset.records)).tolist()
            chosen, queue = queue[:batch_size], queue[batch_size:]
            examples = [load_example(model, dataset.records[i]) for i in chosen]
            for axis in (1, 2) if flips else ():
                examples = [flipped(*e, axis) if generator.random() < 0.5 else e for e in examples]
            loss = sum(model(*map(list, zip(*examples, strict=True))).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def evaluate(model: KeypointGraphNet, dataset: CocoDataset) -> dict[str, dict[str, float]]:
    """The paper's metrics of a model on a dataset, see `PaperMetrics`."""
    metrics = PaperMetrics()
    for record in dataset.records:
        found = predict(model, read_image(record["file_name"]))
        corners = np.array([a["bbox"] for a in record["annotations"]], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        truth = [a["segmentation"] for a in record["annotations"]]
        metrics.update(corners, truth, found["boxes"].numpy(), found["scores"].numpy(), found["masks"].rle())
    return metrics.compute()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train/, val/, instances_train.json, instances_val.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for model_final.pth")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=256, help="side of the network input, pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    training = load_coco(args.data / "instances_train.json", args.data / "train")
    validation = load_coco(args.data / "instances_val.json", args.data / "val")
    model = KeypointGraphNet.build(settings(args.size))
    start = time.perf_counter()
    train(model, training, args.iterations, args.batch_size, args.learning_rate, seed=args.seed)
    print(f"trained {args.iterations} iterations in {(time.perf_counter() - start) / 60:.1f} minutes")
    args.output.mkdir(parents=True, exist_ok=True)
    save_model(model, args.output / "model_final.pth")
    for iou, figures in evaluate(model, validation).items():
        print(f"IoU {iou}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()

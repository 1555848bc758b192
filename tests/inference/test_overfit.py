"""Training the tiny model on four real images must overfit them, through the whole path from data to masks."""

from itertools import cycle

import numpy as np
import pytest
import torch
from builders import TRAINABLE, coco_example, tiny_network, train

from kg_detectron.inference import predict
from kg_detectron.io.coco import load_coco
from kg_detectron.io.images import read_image
from kg_detectron.metrics import PaperMetrics

# A cell is a target where both sides exceed 2 r + 1 = 5 pixels; these images have only such cells.
SMALLEST_SIDE = 10
SIZE = 256, 256


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_overfits_four_images(shared):
    dataset = load_coco(shared / "dsb2018" / "instances_train.json", shared / "dsb2018" / "train")
    suitable = [
        record
        for record in dataset.records
        if (record["height"], record["width"]) == SIZE
        and 8 <= len(record["annotations"]) <= 30
        and min(min(a["bbox"][2:]) for a in record["annotations"]) >= SMALLEST_SIDE
    ][:4]
    # The channels of configs/parts/method/kg_r18.yaml.
    model = tiny_network(**TRAINABLE | {"c0_channels": 16, "widths": (16, 32, 48, 64), "size": SIZE})
    examples = cycle([coco_example(record, SIZE) for record in suitable])
    train(model, lambda: next(examples), steps=150, rate=2e-3, batch_size=4, decay=True)

    metrics = PaperMetrics()
    for record in suitable:
        cells = predict(model, read_image(record["file_name"]))
        corners = np.array([a["bbox"] for a in record["annotations"]], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        truth = [a["segmentation"] for a in record["annotations"]]
        metrics.update(corners, truth, cells.boxes.numpy(), cells.scores.numpy(), cells.masks.rle())
    figures = metrics.compute()
    assert figures["0.5"]["mask_ap"] > 0.9, figures
    assert figures["0.5"]["box_ap"] > 0.9, figures
    assert torch.isfinite(next(model.parameters())).all()

"""Training the tiny model on four real images must overfit them, through the whole path from data to masks."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from train_core import TINY, evaluate, train  # noqa: E402

from kg_detectron.io.coco import load_coco  # noqa: E402
from kg_detectron.modeling import KeypointGraphNet  # noqa: E402

# A cell is a target where both sides exceed 2 r + 1 = 5 pixels; these images have only such cells.
SMALLEST_SIDE = 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_overfits_four_images(shared):
    torch.manual_seed(0)
    dataset = load_coco(shared / "dsb2018" / "instances_train.json", shared / "dsb2018" / "train")
    suitable = [
        record
        for record in dataset.records
        if (record["height"], record["width"]) == (256, 256)
        and 8 <= len(record["annotations"]) <= 30
        and min(min(a["bbox"][2:]) for a in record["annotations"]) >= SMALLEST_SIDE
    ]
    four = dataclasses.replace(dataset, records=suitable[:4])
    model = KeypointGraphNet(**TINY)
    train(model, four, iterations=150, learning_rate=2e-3, flips=False)
    figures = evaluate(model, four)
    assert figures["0.5"]["mask_ap"] > 0.9, figures
    assert figures["0.5"]["box_ap"] > 0.9, figures

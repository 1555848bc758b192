"""Every method on the shared trunk can learn four real images by heart: the whole way, on cells that nobody drew."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import to_tensor, train
from test_every_method import LEARNS, METHODS, small

from kg_detectron.cells import MaskCrops
from kg_detectron.inference import predict
from kg_detectron.io.coco import load_coco
from kg_detectron.io.images import read_image
from kg_detectron.metrics import PaperMetrics
from kg_detectron.training.dataset import labels_of_record

SIDE = 128
IMAGES = 4
STEPS = 120
# Cells of fewer pixels, which the crop has cut off, are left out.
SMALLEST = 20


def real_crops(data: Path) -> list[tuple[np.ndarray, MaskCrops]]:
    """(image (SIDE, SIDE, 3), cells) of the middle of images of 4 to 20 cells there; no two of one size.

    In this data set images of one size come from one experiment.
    """
    found: dict[tuple[int, int], tuple[np.ndarray, MaskCrops]] = {}
    for record in load_coco(data / "instances_train.json", data / "train").records:
        size = record["height"], record["width"]
        if size in found or min(size) < SIDE:
            continue
        window = tuple(slice(n // 2 - SIDE // 2, n // 2 + SIDE // 2) for n in size)
        labels = labels_of_record(record)[window]
        labels[np.isin(labels, np.flatnonzero(np.bincount(labels.ravel()) < SMALLEST))] = 0
        if 4 <= len(np.unique(labels)) - 1 <= 20:
            found[size] = read_image(record["file_name"])[window], MaskCrops.from_label_image(labels)
        if len(found) == IMAGES:
            break
    return list(found.values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", METHODS)
def test_it_overfits_four_real_images(name, shared):
    data = real_crops(shared / "dsb2018")
    assert len(data) == IMAGES
    model = small(name, size=SIDE, width=4)
    examples = [
        (to_tensor(image), {"boxes": cells.windows.float(), "masks": torch.stack(list(cells))}) for image, cells in data
    ]
    order, start = iter(range(10**6)), time.perf_counter()
    train(model, lambda: examples[next(order) % IMAGES], STEPS, rate=2e-3, batch_size=IMAGES, decay=True)
    seconds = time.perf_counter() - start
    metrics = PaperMetrics()
    for image, truth in data:
        cells = predict(model, image)
        boxes, scores = cells.boxes.double().numpy(), cells.scores.numpy()
        metrics.update(truth.windows.double().numpy(), truth.rle(), boxes, scores, cells.masks.rle())
    figures = metrics.compute()
    print(name, f"{seconds:.0f} s", {iou: {k: round(v, 3) for k, v in of.items()} for iou, of in figures.items()})
    assert figures["0.5"][LEARNS.get(name, "mask_ap")] > 0.8, figures

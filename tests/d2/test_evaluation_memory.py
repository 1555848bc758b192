"""5,000 cells of an image of 4096 x 4096 pixels: their dense masks would be 84 GB."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, resource, sys
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from kg_detectron.d2.config import add_kg_config
from kg_detectron.d2.evaluators import build_evaluators
from kg_detectron.cells.masks import MaskCrops

side, cells, path, with_coco = 4096, 5000, sys.argv[1], sys.argv[2] == "coco"
y, x = torch.meshgrid(torch.arange(41), torch.arange(41), indexing="ij")
disc = ((y - 20) ** 2 + (x - 20) ** 2 <= 400).float()
place = torch.arange(cells)
corner = torch.stack((place % 72, place // 72), dim=1) * 56
windows = torch.cat((corner, corner + 41), dim=1)
masks = MaskCrops([disc] * cells, windows, (side, side))
annotations = [
    {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, 41, 41], "area": int(disc.sum()), "iscrowd": 0,
     "segmentation": rle}
    for i, (rle, (x1, y1, _, _)) in enumerate(zip(masks.rle(), windows.tolist()))
]
images = [{"id": 1, "file_name": "1.png", "height": side, "width": side}]
with open(path, "w") as file:
    json.dump({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}, file)
register_coco_instances("memory", {}, path, "")

cfg = get_cfg()
add_kg_config(cfg)
evaluators = build_evaluators(cfg, "memory")
evaluators.reset()
instances = Instances((side, side), pred_boxes=Boxes(windows.float()), scores=torch.linspace(1, 0.1, cells),
                      pred_classes=torch.zeros(cells, dtype=torch.int64), pred_masks=masks)
evaluators.process([{"image_id": 1}], [{"instances": instances}])
coco, paper = evaluators._evaluators
assert len(coco._predictions[0]["instances"]) == cells
figures = evaluators.evaluate() if with_coco else paper.evaluate()
assert figures["paper"]["mask_AP@0.7"] == 100
assert not with_coco or figures["segm"]["AP"] > 99.9
print("GiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "evaluation",
    [
        "paper",
        pytest.param("coco", marks=pytest.mark.slow),  # pycocotools compares every pair of cells in Python
    ],
)
def test_5000_cells_evaluate_within_4_gib(tmp_path: Path, evaluation: str) -> None:
    """Export to COCO results and evaluation; where it takes minutes, COCO's own figures too."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cells.json"), evaluation]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split("GiB:")[1]) < 4

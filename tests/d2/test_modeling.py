"""The parts in Detectron2: the same results as the core, parts that can be swapped, checkpoints that the core reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.d2 import add_kg_config
from kg_detectron.d2.modeling import ModelDescription
from kg_detectron.inference import load_model
from kg_detectron.inference.model_file import _own_names
from kg_detectron.modeling import KeypointGraphNet

CONFIGS = Path(__file__).parents[2] / "configs"


def small_config(*changes: object) -> CfgNode:
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "kg_dsb2018_tiny.yaml"), allow_unsafe=False)
    network = "MODEL.KEYPOINT_GRAPH."
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "INPUT.SIZE", (64, 96), f"{network}C0_CHANNELS", 4, f"{network}WIDTHS", [4, 6, 8, 8]]
        + [f"{network}DEPTH", 18, f"{network}HEAD_KERNEL", 3, f"{network}BACKBONE_WEIGHTS", ""]
        + [f"{network}PEAK_THRESHOLD", 0.0, *changes]
    )
    return cfg


def scene(count: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for cells in (count, 0):
        boxes = torch.tensor([[4.0, 5, 40, 50], [50, 10, 90, 60]])[:cells]
        masks = torch.zeros(cells, 64, 96, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        instances = Instances((64, 96), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.zeros(cells, dtype=torch.int64)
        image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": 100, "width": 120})
    return inputs


def core_of(cfg: CfgNode, model: torch.nn.Module, folder) -> KeypointGraphNet:
    """What the core loads from a checkpoint of the model, written the way `train_net.py` does."""
    checkpointer = DetectionCheckpointer(model, str(folder))
    checkpointer.add_checkpointable(ModelDescription.KEY, ModelDescription.of(cfg))
    checkpointer.save("model")
    return load_model(folder / "model.pth")


@pytest.mark.parametrize("head", ["CropFeatureMaskHead", "SegS1MaskHead"])
@pytest.mark.parametrize(("scales", "ranking"), [([1, 2, 3, 4], (0.5, 0.0, 0.0, 0.0)), ([1], (0.7, 2.0, 0.1, 1.5))])
def test_core_and_detectron2_agree(tmp_path, head, scales, ranking):
    torch.manual_seed(0)
    changes = ["MODEL.ROI_MASK_HEAD.NAME", head, "MODEL.KEYPOINT_GRAPH.SCALES", scales]
    for key, value in zip(("NMS_THRESHOLD", "BLUR_WEIGHT", "OVERLAP_SIGMA", "MASK_MARGIN"), ranking, strict=True):
        changes += [f"MODEL.KEYPOINT_GRAPH.{key}", value]
    changes += ["INPUT.NORMALISATION", "percentile", "INPUT.PERCENTILES", (2.0, 99.0)]
    cfg = small_config(*changes)
    model, inputs = build_model(cfg), scene()
    core = core_of(cfg, model, tmp_path)
    assert core.input_size == (64, 96)
    assert (core.normalisation, core.percentiles) == ("percentile", (2.0, 99.0))

    targets = [{"boxes": i["instances"].gt_boxes.tensor, "masks": i["instances"].gt_masks.tensor} for i in inputs]
    losses = model(inputs)
    expected = core.train()([i["image"] for i in inputs], targets)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])

    with torch.no_grad():
        results, others = model.eval()(inputs), core.eval()([i["image"] for i in inputs])
    for result, other in zip(results, others, strict=True):
        instances = result["instances"]
        assert len(instances) > 0 and instances.image_size == (100, 120)
        scale = other["boxes"].new_tensor([120 / 96, 100 / 64, 120 / 96, 100 / 64])
        torch.testing.assert_close(instances.pred_boxes.tensor, other["boxes"] * scale)
        torch.testing.assert_close(instances.scores, other["scores"])
        assert isinstance(instances.pred_masks, MaskCrops)
        assert instances.pred_masks.rle() == other["masks"].resized((100, 120)).rle()
        assert (instances.pred_classes == 0).all()


def test_masks_come_one_at_a_time_as_the_coco_export_takes_them():
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    torch.manual_seed(0)
    model = build_model(small_config()).eval()
    with torch.no_grad():
        instances = model(scene())[0]["instances"].to("cpu")
    exported = instances_to_coco_json(instances, 1)
    assert len(exported) == len(instances) > 0
    for one, rle in zip(exported, instances.pred_masks.rle(), strict=True):
        assert one["segmentation"] == rle


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.IN_FEATURES", ["c4"]], {"loss_rpn_cls", "loss_mask"}),
        (
            ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["c2"]]
            + ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
            + ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1],
            {"loss_heatmap", "loss_mask", "loss_box_reg"},
        ),
    ],
)
def test_parts_can_be_swapped_by_name(changes, keys):
    """RPN in the place of the keypoint graph; Mask R-CNN's heads on its proposals."""
    torch.manual_seed(0)
    cfg = small_config(*changes)
    assert ModelDescription.of(cfg) is None
    model = build_model(cfg)
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = model(scene())
    assert keys <= set(losses)
    sum(losses.values()).backward()
    with torch.no_grad():
        instances = model.eval()(scene())[0]["instances"]
    assert instances.image_size == (100, 120)
    assert all(mask.shape == (100, 120) for mask in instances.pred_masks)


def test_ground_truth_that_is_no_target_still_trains_the_masks():
    """A cell too small for any scale has no keypoints, but a mask; an image without cells is fine."""
    torch.manual_seed(0)
    model, inputs = build_model(small_config()), scene(count=1)
    inputs[0]["instances"].gt_boxes = Boxes(torch.tensor([[4.0, 5, 8, 9]]))
    losses = model(inputs)
    assert losses["loss_group_offset"] == 0 and losses["loss_mask"] > 0
    losses = model([inputs[1]])
    assert losses["loss_mask"] == 0 and all(torch.isfinite(v) for v in losses.values())


def test_jitter_moves_the_boxes_of_the_masks_in_training_alone():
    torch.manual_seed(0)
    plain = build_model(small_config())
    cfg = small_config("MODEL.KEYPOINT_GRAPH.BOX_JITTER", 0.2)
    model, inputs = build_model(cfg), scene()
    model.load_state_dict(plain.state_dict())
    assert ModelDescription.of(cfg).arguments == ModelDescription.of(small_config()).arguments

    seen = []
    model.roi_heads.mask_head.loss = lambda features, boxes, masks: seen.append(boxes) or features[0].sum() * 0
    expected, losses = plain(inputs), model(inputs)
    truth = inputs[0]["instances"].gt_boxes.tensor
    ((jittered, none),) = seen
    assert jittered.shape == truth.shape and (jittered != truth).any() and len(none) == 0
    for name in ("loss_heatmap", "loss_single_offset", "loss_group_offset"):  # keypoints are those of the true boxes
        torch.testing.assert_close(losses[name], expected[name])

    with torch.no_grad():
        found, same = (m.eval()(inputs)[0]["instances"] for m in (model, plain))
    assert torch.equal(found.pred_boxes.tensor, same.pred_boxes.tensor)
    assert found.pred_masks.rle() == same.pred_masks.rle()
    with pytest.raises(ValueError, match=r"BOX_JITTER.*0\.5"):
        build_model(small_config("MODEL.KEYPOINT_GRAPH.BOX_JITTER", 0.5))


def test_precision_is_that_of_the_core():
    torch.manual_seed(0)
    model = build_model(small_config("MODEL.KEYPOINT_GRAPH.PRECISION", "bfloat16")).eval()
    core = KeypointGraphNet(**ModelDescription.of(small_config()).arguments).eval().accelerate("bfloat16")
    core.load_state_dict(_own_names(model.state_dict()))
    inputs = scene()
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
        expected = core([inputs[0]["image"]])[0]
    scale = torch.tensor([120 / 96, 100 / 64, 120 / 96, 100 / 64])
    torch.testing.assert_close(found.pred_boxes.tensor, expected["boxes"] * scale)
    with pytest.raises(ValueError, match="precision"):
        build_model(small_config("MODEL.KEYPOINT_GRAPH.PRECISION", "half"))


def test_unknown_parts_and_keys_are_named():
    cfg = small_config("MODEL.ROI_MASK_HEAD.NAME", "NoSuchHead")
    with pytest.raises(KeyError, match="NoSuchHead"):
        build_model(cfg)
    with pytest.raises(AssertionError, match="NO_SUCH_KEY"):
        small_config("MODEL.KEYPOINT_GRAPH.NO_SUCH_KEY", 1)


@pytest.mark.parametrize("path", sorted(p.name for p in CONFIGS.glob("kg_*.yaml")))
def test_every_config_builds(path):
    """On the meta device, without the initial weights: names, keys and shapes fit."""
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.merge_from_file(str(CONFIGS / path), allow_unsafe=False)
    cfg.MODEL.KEYPOINT_GRAPH.BACKBONE_WEIGHTS = ""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
        core = KeypointGraphNet(**ModelDescription.of(cfg).arguments)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in core.parameters())
    assert cfg.OUTPUT_DIR == f"output/{path.removesuffix('.yaml')}"
    assert cfg.DATASETS.TRAIN and cfg.DATASETS.VALIDATION and cfg.DATASETS.TEST
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def test_description_covers_every_argument_of_the_network():
    arguments = ModelDescription.of(small_config()).arguments
    assert arguments.keys() == KeypointGraphNet(**arguments).arguments.keys()
    assert not any(isinstance(value, np.generic) for value in arguments.values())

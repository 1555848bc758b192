"""The parts in Detectron2: the same results as the core, parts that can be swapped, checkpoints that the core reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CONFIGS, drawn_image, load_config, small_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from kg_detectron.cells import MaskCrops
from kg_detectron.d2.confidence import confidence_head
from kg_detectron.d2.config import method_settings
from kg_detectron.d2.meta_architecture import CellGeneralizedRCNN, CellInstanceSegmentation, Description
from kg_detectron.inference import load_model, predict
from kg_detectron.inference.model_file import DESCRIPTION_KEY
from kg_detectron.modeling import KeypointGraphNet, KeypointGraphSettings
from kg_detectron.modeling.settings import from_plain

# From the network's input of `scene` to the output that it asks for.
OUTPUT_SCALE = torch.tensor([120 / 96, 100 / 64, 120 / 96, 100 / 64])


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


def save(model: nn.Module, folder: Path) -> Path:
    """A checkpoint of a model, written the way `train_net.py` does."""
    checkpointer = DetectionCheckpointer(model, str(folder))
    checkpointer.add_checkpointable(DESCRIPTION_KEY, Description.of(model))
    checkpointer.save("model")
    return folder / "model.pth"


@pytest.mark.parametrize("head", ["CropFeatureMaskHead", "SegS1MaskHead"])
@pytest.mark.parametrize(("scales", "ranked"), [([1, 2, 3, 4], False), ([1], True)])
def test_core_and_detectron2_agree(tmp_path, head, scales, ranked):
    torch.manual_seed(0)
    changes = ["MODEL.ROI_MASK_HEAD.NAME", head, "MODEL.KEYPOINT_GRAPH.SCALES", scales]
    if ranked:
        changes += ["MODEL.KEYPOINT_GRAPH.NMS_THRESHOLD", 0.7, "MODEL.CELLS.BLUR_WEIGHT", 2.0]
        changes += ["MODEL.CELLS.OVERLAP_SIGMA", 0.1, "MODEL.CELLS.MASK_MARGIN", 1.5, "MODEL.CELLS.BOX_JITTER", 0.1]
        changes += ["MODEL.CELLS.CONFIDENCE", "mask", "MODEL.CELLS.VOTE_EXPONENT", 0.3]
    cfg = small_config(*changes, "INPUT.NORMALISATION", "percentile", "INPUT.PERCENTILES", (2.0, 99.0))
    model, inputs = build_model(cfg), scene()
    if ranked:
        torch.nn.init.normal_(confidence_head(model).layers[-1].weight)  # as if it were fitted
    core = load_model(save(model, tmp_path))
    assert type(core) is KeypointGraphNet and core.preprocessing.size == (64, 96)
    assert (core.preprocessing.normalisation, core.preprocessing.percentiles) == ("percentile", (2.0, 99.0))
    assert core.segmentation.settings.cut_from == ("s1" if head == "SegS1MaskHead" else "features")

    targets = [{"boxes": i["instances"].gt_boxes.tensor, "masks": i["instances"].gt_masks.tensor} for i in inputs]
    torch.manual_seed(1)
    losses = model(inputs)
    torch.manual_seed(1)
    expected = core.train()([i["image"] for i in inputs], targets)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])

    results, others = model.eval()(inputs), core.eval()([i["image"] for i in inputs])
    for result, cells in zip(results, others, strict=True):
        instances = result["instances"]
        assert len(instances) > 0 and instances.image_size == (100, 120)
        torch.testing.assert_close(instances.pred_boxes.tensor, cells.boxes * OUTPUT_SCALE)
        torch.testing.assert_close(instances.scores, cells.scores)
        assert isinstance(instances.pred_masks, MaskCrops)
        assert instances.pred_masks.rle() == cells.masks.resized((100, 120)).rle()
        assert (instances.pred_classes == 0).all()


@pytest.mark.parametrize("normalisation", ["fixed", "percentile"])
@pytest.mark.parametrize("levels", ["8 bits", "16 bits", "12 bits"])
def test_detectron2s_predictor_gives_what_predict_gives(tmp_path, normalisation, levels):
    """Of raw images of any size, although it hands all of them over as floats."""
    torch.manual_seed(0)
    cfg = small_config("INPUT.NORMALISATION", normalisation)
    cfg.MODEL.WEIGHTS = str(save(build_model(cfg), tmp_path))
    image = drawn_image(50, 70)
    image = {"8 bits": image, "16 bits": image.astype(np.uint16) * 200, "12 bits": image.astype(np.uint16) * 9}[levels]
    core, predictor = load_model(cfg.MODEL.WEIGHTS), DefaultPredictor(cfg)
    if normalisation == "fixed" and levels == "12 bits":
        for call in (lambda: predict(core, image), lambda: predictor(image)):
            with pytest.raises(ValueError, match="12 bits"):
                call()
        return
    cells, instances = predict(core, image), predictor(image)["instances"]
    assert len(cells) > 0 and instances.image_size == (50, 70)
    torch.testing.assert_close(instances.pred_boxes.tensor, cells.boxes)
    torch.testing.assert_close(instances.scores, cells.scores)
    assert instances.pred_masks.rle() == cells.masks.rle()


def test_masks_come_one_at_a_time_as_the_coco_export_takes_them():
    torch.manual_seed(0)
    model = build_model(small_config()).eval()
    with torch.no_grad():
        instances = model(scene())[0]["instances"].to("cpu")
    exported = instances_to_coco_json(instances, 1)
    assert len(exported) == len(instances) > 0
    for one, rle in zip(exported, instances.pred_masks.rle(), strict=True):
        assert one["segmentation"]["counts"] == rle["counts"]


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
    model = build_model(small_config(*changes))
    assert isinstance(model, CellGeneralizedRCNN) and Description.of(model) is None
    with EventStorage():
        losses = model(scene())
    assert keys <= set(losses)
    sum(losses.values()).backward()
    with torch.no_grad():
        instances = model.eval()(scene())[0]["instances"]
    assert instances.image_size == (100, 120)
    assert all(mask.shape == (100, 120) for mask in instances.pred_masks)


def test_a_confidence_head_beside_foreign_parts_is_refused():
    cfg = small_config("MODEL.CELLS.CONFIDENCE", "mask", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
    cfg.MODEL.RPN.IN_FEATURES = ["c4"]
    with pytest.raises(ValueError, match="MODEL.CELLS.CONFIDENCE: expected none"):
        build_model(cfg)


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
    model, inputs = build_model(small_config("MODEL.CELLS.BOX_JITTER", 0.2)), scene()
    model.load_state_dict(plain.state_dict())

    seen = []
    model.network.segmentation._losses = lambda maps, boxes, *_: (seen.append(boxes) or maps[0].sum() * 0, None)
    expected, losses = plain(inputs), model(inputs)
    truth = inputs[0]["instances"].gt_boxes.tensor
    ((jittered, none),) = seen
    assert jittered.shape == truth.shape and (jittered != truth).any() and len(none) == 0
    for name in ("loss_heatmap", "loss_single_offset", "loss_group_offset"):  # keypoints are those of the true boxes
        torch.testing.assert_close(losses[name], expected[name])

    instances, same = (m.eval()(inputs)[0]["instances"] for m in (model, plain))
    assert torch.equal(instances.pred_boxes.tensor, same.pred_boxes.tensor)
    assert instances.pred_masks.rle() == same.pred_masks.rle()


def test_precision_is_that_of_the_core():
    torch.manual_seed(0)
    model = build_model(small_config("MODEL.CELLS.PRECISION", "bfloat16")).eval()
    core = KeypointGraphNet.build(method_settings(small_config())).eval().accelerate("bfloat16")
    core.load_state_dict(model.network.state_dict())
    inputs = scene()
    instances, (cells,) = model(inputs)[0]["instances"], core([inputs[0]["image"]])
    torch.testing.assert_close(instances.pred_boxes.tensor, cells.boxes * OUTPUT_SCALE)
    with pytest.raises(ValueError, match="precision"):
        build_model(small_config("MODEL.CELLS.PRECISION", "half"))


def test_what_masks_are_cut_from_is_said_once():
    """By the name of the mask head, where Detectron2's registries are used."""
    with pytest.raises(ValueError, match="CUT_FROM: 's1' does not go with .* CropFeatureMaskHead"):
        build_model(small_config("MODEL.CELLS.CUT_FROM", "s1"))
    model = build_model(small_config("MODEL.CELLS.CUT_FROM", "s1", "MODEL.ROI_MASK_HEAD.NAME", "SegS1MaskHead"))
    assert model.network.settings.segmentation.cut_from == "s1"


def test_unknown_parts_are_named():
    with pytest.raises(KeyError, match="NoSuchHead"):
        build_model(small_config("MODEL.ROI_MASK_HEAD.NAME", "NoSuchHead"))
    with pytest.raises(ValueError, match="method: expected one of .*keypoint_graph.*'no_such'"):
        build_model(
            small_config("MODEL.META_ARCHITECTURE", "CellInstanceSegmentation", "MODEL.CELLS.METHOD", "no_such")
        )


def test_a_method_needs_its_name_alone():
    """The keypoint graph by the name of the method is that by Detectron2's registries."""
    by_name = build_model(small_config("MODEL.META_ARCHITECTURE", "CellInstanceSegmentation"))
    by_parts = build_model(small_config())
    assert type(by_name) is type(by_parts) is CellInstanceSegmentation
    assert by_name.network.description() == by_parts.network.description()
    by_name.load_state_dict(by_parts.state_dict())


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("kg_*.yaml")))
def test_every_config_builds(name):
    """On the meta device, without the initial weights: names, keys and shapes fit."""
    cfg = load_config(name, "MODEL.CELLS.BACKBONE_WEIGHTS", "", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(cfg)
        core = KeypointGraphNet.build(from_plain(KeypointGraphSettings, model.network.description()["settings"]))
    assert {name: value.shape for name, value in model.network.state_dict().items()} == {
        name: value.shape for name, value in core.state_dict().items()
    }

"""The configs: leaves of few lines, made of parts, whose settings the models accept."""

from pathlib import Path

import pytest
import torch
from builders import box_example
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from kg_detectron.d2 import add_kg_config
from kg_detectron.d2.config import merge_config, method_settings

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
METHODS = ("kg_lite", "kg_r18", "kg", "mask_rcnn_c4_narrow", "mask_rcnn_c4", "mask_rcnn_fpn_r18", "mask_rcnn_fpn_lite0")
METHODS += ("mask_rcnn_fpn",)
METHODS += ("stardist", "dcan", "cornernet", "cosine_embedding", "fcis")
DATA = ("dsb2018", "neural", "synthetic", "usiigaci")
RECIPES = ("plus", "plus_imagenet", "seg_s1", "single_scale", "plus_single_scale")


def load(file: Path) -> CfgNode:
    cfg = get_cfg()
    add_kg_config(cfg)
    merge_config(cfg, str(file))
    return cfg


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_what_its_name_says(name):
    cfg = load(CONFIGS / f"{name}.yaml")
    method_settings(cfg)  # refuses values out of range
    cpu = name.endswith("_cpu")
    assert cfg.VERSION == 2 and cfg.INPUT.MIN_SIZE_TEST == 0
    assert cfg.OUTPUT_DIR == "./output"  # train_net.py names it by the file
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.LR_SCHEDULER_NAME) == (
        (4, "WarmupCosineLR") if cpu else (2, "WarmupStepWithFixedGammaLR")
    )
    ours = not name.startswith("mask_rcnn") or "lite0" in name
    initial = cfg.MODEL.CELLS.BACKBONE_WEIGHTS if ours else cfg.MODEL.WEIGHTS
    assert bool(initial) != (cpu and "lite0" not in name and not name.endswith("imagenet_cpu"))
    if name == "mask_rcnn_dsb2018":  # the paper's baseline
        return
    method = next(method for method in METHODS if name.startswith(f"{method}_"))
    assert (CONFIGS / "parts" / "method" / f"{method}.yaml").is_file()
    data, _, recipe = name.removeprefix(f"{method}_").removesuffix("_cpu").partition("_")
    assert data in DATA and cfg.DATASETS.TRAIN == (f"{data}_train",)
    assert not recipe or recipe in RECIPES
    assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) <= 9


def test_every_part_is_used():
    """By a leaf, by another part, or, a recipe, by a row of the results."""
    import reproduce

    used = set()
    for file in CONFIGS.rglob("*.yaml"):
        base = file.read_text().partition("_BASE_:")[2].partition("\n")[0]
        names = [name.strip(" []") for name in base.split(",") if name.strip(" []")]
        used |= {(file.parent / name).resolve() for name in names}
    for rows in reproduce.PLANS.values():
        used |= {reproduce.recipe_file(recipe).resolve() for row in rows for recipe in row.recipes}
    assert {path.resolve() for path in (CONFIGS / "parts").rglob("*.yaml")} <= used


# Networks of few channels: every part is there, and a step takes a tenth of a second.
NARROW = ["MODEL.DEVICE", "cpu", "INPUT.SIZE", (64, 64), "MODEL.WEIGHTS", "", "MODEL.CELLS.BACKBONE_WEIGHTS", ""]
NARROW += ["MODEL.CELLS.BACKBONE", "resnet18", "MODEL.CELLS.C0_CHANNELS", 4, "MODEL.CELLS.WIDTHS", [4, 6, 8, 8]]
NARROW += ["MODEL.KEYPOINT_GRAPH.HEAD_KERNEL", 3, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
NARROW += ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]
NARROW += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8]


def narrow_models() -> dict[str, CfgNode]:
    """The different models of all leaves, made narrow, by the name of their first leaf."""
    models: dict[str, CfgNode] = {}
    for name in LEAVES:
        cfg = load(CONFIGS / f"{name}.yaml")
        width = 64 if cfg.MODEL.RESNETS.DEPTH == 18 else 8  # Detectron2's ResNet-18 has no other
        more = ["MODEL.RESNETS.RES2_OUT_CHANNELS", width]
        if width == 8:
            more += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4]
        cfg.merge_from_list([*NARROW, *more])
        if all(cfg.MODEL != other.MODEL for other in models.values()):
            models[name] = cfg
    return models


def test_every_parameter_gets_a_gradient():
    """Which training in several processes needs: also of a process whose images have no cells."""
    models = narrow_models()
    assert len(models) > 8
    for name, cfg in models.items():
        torch.manual_seed(0)
        model = build_model(cfg).train()
        for cells in (2, 0):
            model.zero_grad()
            with EventStorage():
                sum(model([training_image(cells), training_image(cells)]).values()).backward()
            missing = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
            assert not missing, f"{name}, {cells} cells: {missing}"


def training_image(cells: int) -> dict[str, object]:
    image, target = box_example(64, 64, [[4, 5, 34, 40], [36, 30, 60, 58]][:cells])
    instances = Instances((64, 64), gt_boxes=Boxes(target["boxes"]), gt_masks=BitMasks(target["masks"]))
    instances.gt_classes = torch.zeros(cells, dtype=torch.long)
    return {"image": image, "instances": instances, "file_name": "", "height": 64, "width": 64}

"""The configs: leaves of few lines, made of parts, whose settings the models accept."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from kg_detectron.d2 import add_kg_config
from kg_detectron.d2.config import merge_config, method_settings

CONFIGS = Path(__file__).parents[2] / "configs"
LEAVES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
METHODS = ("kg_lite", "kg_r18", "kg", "mask_rcnn_c4_narrow", "mask_rcnn_c4", "mask_rcnn_fpn_r18", "mask_rcnn_fpn")
METHODS += ("stardist", "dcan", "cornernet", "cosine_embedding")
DATA = ("dsb2018", "neural", "synthetic", "usiigaci")
RECIPES = ("plus", "seg_s1", "single_scale", "plus_single_scale")


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
    initial = cfg.MODEL.WEIGHTS if name.startswith("mask_rcnn") else cfg.MODEL.CELLS.BACKBONE_WEIGHTS
    assert bool(initial) != cpu
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

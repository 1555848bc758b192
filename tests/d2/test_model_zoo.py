"""The model zoo, and Detectron2's own predictor on what it gives."""

import pytest
import torch
from builders import load_config
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from kg_detectron.d2 import add_kg_config, model_zoo
from kg_detectron.inference import load_model, predict
from kg_detectron.synthetic import nuclei_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))


def test_a_kept_model_gives_the_cells_of_predict(tmp_path, monkeypatch):
    """By its name, and by the path of its file; scores are calibrated."""
    import numpy as np

    image, masks = nuclei_image(np.random.default_rng(0), 96, 128, 6)
    core = load_model("nuclei")
    assert core.scores.raw and core.threshold > 0
    cells = predict(core, image)
    cfg = model_zoo.get_config("nuclei", trained=True)
    cfg.MODEL.DEVICE = "cpu"
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert len(cells) >= len(masks) // 2 and instances.image_size == (96, 128)
    assert torch.equal(instances.pred_boxes.tensor, cells.boxes) and torch.equal(instances.scores, cells.scores)
    assert instances.pred_masks.rle() == cells.masks.rle()

    model = model_zoo.get("nuclei", trained=True, device="cpu")
    for name, value in core.state_dict().items():
        assert torch.equal(model.state_dict()[f"network.{name}"], value)
    assert len(list((tmp_path / "kg_detectron").iterdir())) == 1  # written once


def test_names_that_do_not_fit_are_answered():
    with pytest.raises(ValueError, match="no config 'kg_lte'; there are cells, nuclei, cornernet_dsb2018"):
        model_zoo.get_config("kg_lte")
    with pytest.raises(ValueError, match="kg_lite_dsb2018: no weights of it are kept; trained are cells, nuclei"):
        model_zoo.get("kg_lite_dsb2018.yaml", trained=True)


def test_a_config_by_its_name():
    assert model_zoo.get_config("kg_lite_dsb2018").MODEL.CELLS == load_config("kg_lite_dsb2018").MODEL.CELLS


@pytest.mark.parametrize("name", ["KGInstanceSegmentation", "CellInstanceSegmentation"])
@pytest.mark.parametrize(
    ("key", "value"), [("INPUT.MIN_SIZE_TEST", 800), ("INPUT.FORMAT", "RGB")], ids=["resized", "RGB"]
)
def test_images_that_detectron2_would_change_are_refused(name, key, value):
    cfg = get_cfg()
    add_kg_config(cfg)
    assert cfg.INPUT.MIN_SIZE_TEST == 0
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", name, "MODEL.DEVICE", "cpu", key, value])
    with pytest.raises(ValueError, match=f"{key}: expected .*, got '?{value}"):
        build_model(cfg)

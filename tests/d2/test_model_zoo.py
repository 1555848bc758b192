"""The model zoo, and Detectron2's own predictor on what it gives."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import load_config, tiny_network
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from kg_detectron import model_zoo
from kg_detectron.d2 import add_kg_config
from kg_detectron.d2.checkpointer import WholeCheckpointer
from kg_detectron.inference import load_model, predict
from kg_detectron.inference.model_file import save_model
from kg_detectron.modeling import KeypointGraphNet, Scores
from kg_detectron.synthetic import nuclei_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))


def test_a_kept_model_gives_the_cells_of_predict(tmp_path):
    """Scores are calibrated."""
    image, masks = nuclei_image(np.random.default_rng(0), 96, 128, 6)
    core = load_model("nuclei", channels_last=False)  # as Detectron2's models are
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


def test_a_model_file_by_its_path_gives_the_cells_of_predict(tmp_path, monkeypatch):
    """Relative to the working directory too; the calibration comes from the file, for the config has none."""
    image, _ = nuclei_image(np.random.default_rng(0), 96, 128, 6)
    core = save_tiny(tmp_path / "mine.safetensors")
    cells = predict(core, image)
    assert len(cells) > 3
    cfg = model_zoo.get_config(str(tmp_path / "mine.safetensors"))
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.CELLS.BACKBONE_WEIGHTS = "build_kg_resnet_c4_backbone", "needless.pth"
    cfg.MODEL.DEVICE = "cpu"
    monkeypatch.chdir(tmp_path)
    for name in ("CellInstanceSegmentation", "KGInstanceSegmentation"):
        for weights in (str(tmp_path / "mine.safetensors"), "mine.safetensors"):
            cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = name, weights
            if name == "KGInstanceSegmentation":
                cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME = "KeypointGraph", "KGROIHeads"
                cfg.MODEL.ROI_MASK_HEAD.NAME = "CropFeatureMaskHead"
            predictor = DefaultPredictor(cfg)
            assert predictor.model.network.scores == core.scores
            instances = predictor(image)["instances"]
            assert torch.equal(instances.pred_boxes.tensor, cells.boxes)
            assert torch.equal(instances.scores, cells.scores)
            assert instances.pred_masks.rle() == cells.masks.rle()


def test_a_model_file_loads_whole_or_not_at_all(tmp_path):
    """In a training too, and by this project's checkpointer; other checkpoints may start a training in part."""
    file = tmp_path / "mine.safetensors"
    save_tiny(file)
    other = build_model(tiny_config(file, "MODEL.KEYPOINT_GRAPH.HEAD_KERNEL", 5))
    lost = r"mine.safetensors.* does not fit the model of the config: \d+ weights are missing or have another shape"
    for checkpointer in (DetectionCheckpointer, WholeCheckpointer):
        for model in (other.train(), other.eval()):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(ValueError, match=lost):
                checkpointer(model).load(str(file))
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fewer = build_model(tiny_config(file))
    fewer.network.segmentation.predict.register_parameter("bias", None)
    with pytest.raises(ValueError, match="mine.safetensors.*1 weights are not in the model"):
        DetectionCheckpointer(fewer).load(str(file))
    torch.save({"model": {}}, tmp_path / "empty.pth")
    DetectionCheckpointer(other.train()).load(str(tmp_path / "empty.pth"))  # which Detectron2 warns of
    with pytest.raises(ValueError, match="MODEL.WEIGHTS does not fit"):
        DetectionCheckpointer(other.eval()).load(str(tmp_path / "empty.pth"))


def test_another_preprocessing_than_the_trained_one_is_refused(tmp_path, caplog):
    file = tmp_path / "mine.safetensors"
    save_tiny(file)
    with pytest.raises(ValueError, match=r"INPUT.NORMALISATION: the config has percentile, but mine.safetensors"):
        DefaultPredictor(tiny_config(file, "INPUT.NORMALISATION", "percentile"))
    DefaultPredictor(tiny_config(file, "MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", 0.5))
    assert "PEAK_THRESHOLD: 0.5, as the config says; mine.safetensors has 0.0" in caplog.text


def test_other_files_of_weights_stay_what_they_are(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert PathManager.get_local_path(str(tmp_path / "other.safetensors")) == str(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="cut.safetensors cannot be read as a model file"):
        PathManager.get_local_path(str(tmp_path / "cut.safetensors"))
    (tmp_path / "text").write_text("kept")
    with PathManager.open(str(tmp_path / "text")) as file:
        assert file.read() == "kept"
    assert PathManager.isfile(str(tmp_path / "text")) and PathManager.ls(str(tmp_path))
    with pytest.raises(ValueError, match="other.safetensors does not describe a network"):
        WholeCheckpointer(torch.nn.Linear(2, 2)).load(str(tmp_path / "other.safetensors"))


def save_tiny(file: Path) -> KeypointGraphNet:
    model = tiny_network().eval()
    model.scores = Scores(raw=(0.0, 1.0), probability=(0.1, 0.9), threshold=0.3)
    save_model(model, file)
    return model


def tiny_config(file: Path, *changes: object) -> CfgNode:
    cfg = model_zoo.get_config(str(file), trained=True)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *changes])
    return cfg


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

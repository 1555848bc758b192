"""The confidence head in Detectron2: fitted at the end of a training, in its files, and in all processes."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import load_config, nuclei_dataset
from detectron2.config import CfgNode
from detectron2.utils import comm

import kg_detectron.d2.confidence
import kg_detectron.d2.hooks
from kg_detectron.d2 import register_files
from kg_detectron.d2.confidence import CONFIDENCE_FILE, FitConfidence
from kg_detectron.d2.launch import launch
from kg_detectron.d2.trainer import Trainer
from kg_detectron.training.confidence import fit_confidence
from kg_detectron.training.dataset import read_labelled_images

HEAD = "network.segmentation.confidence_head."


def config(root: Path, output: Path, *options: object) -> CfgNode:
    small = ["INPUT.SIZE", (64, 64), "SOLVER.IMS_PER_BATCH", 2, "SEED", 3, "OUTPUT_DIR", output]
    small += ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 100, "DATALOADER.NUM_WORKERS", 0]
    small += ["DATASETS.TRAIN", (str(root / "train" / "cells.json"),), "DATASETS.VALIDATION", ()]
    small += ["DATASETS.TEST", (), "MODEL.DEVICE", "cpu"]
    small += ["MODEL.CELLS.WIDTHS", [4, 6, 8, 8], "MODEL.CELLS.C0_CHANNELS", 4, "MODEL.CELLS.CONFIDENCE", "mask"]
    cfg = load_config("kg_r18_synthetic_cpu", *small, "MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", 0.0, *options)
    register_files([*cfg.DATASETS.TRAIN, *cfg.DATASETS.VALIDATION])
    return cfg


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("confidence")
    for split, count in (("train", 3), ("val", 1)):
        nuclei_dataset(root / split, count)
    return root


def train(cfg: CfgNode, *, resume: bool = False) -> Trainer:
    torch.manual_seed(3)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}


def head_of(file: Path) -> dict[str, torch.Tensor]:
    return head(torch.load(file, weights_only=True)["model"])


@pytest.mark.parametrize("best", [1, 5])
def test_the_best_and_the_last_model_get_the_head_that_fits(data, tmp_path, monkeypatch, best):
    few = partial(fit_confidence, views=4)
    monkeypatch.setattr(kg_detectron.d2.confidence, "fit_confidence", few)
    options = ["DATASETS.VALIDATION", (str(data / "val" / "cells.json"),), "TEST.EVAL_PERIOD", 2]
    losses = itertools.count(step=1.0 if best == 1 else -1.0)
    monkeypatch.setattr(kg_detectron.d2.hooks, "validation_losses", lambda *_: {"loss": next(losses)})
    cfg = config(data, tmp_path / "run", *options)
    trainer = train(cfg)
    files = [torch.load(tmp_path / "run" / name, weights_only=True) for name in ("model_best.pth", "model_final.pth")]
    assert [state["iteration"] for state in files] == [best, 5] and "trainer" in files[1]
    first, last = (head(state["model"])["layers.4.weight"] for state in files)
    assert torch.equal(first, last) == (best == 5)
    for state in files:
        model = Trainer.build_model(cfg)
        model.load_state_dict(state["model"])
        images = read_labelled_images(data / "train" / "cells.json", data / "train", model.network.preprocessing)
        assert few(model.network, images, 3) > 20
        for name, value in head(state["model"]).items():
            torch.testing.assert_close(head(model.state_dict())[name], value)
    for name, value in files[1]["model"].items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    noted = json.loads((tmp_path / "run" / CONFIDENCE_FILE).read_text())
    assert noted["boxes"] > 20 and noted["minutes"] > 0


def test_a_run_that_ended_already_is_fitted_where_it_was_not(data, tmp_path, monkeypatch):
    """Killed after the last iteration, before the fit was done."""
    monkeypatch.setattr(kg_detectron.d2.confidence, "fit_confidence", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(data, tmp_path / "run"))
    assert not head_of(tmp_path / "run" / "model_final.pth")["layers.4.weight"].any()
    monkeypatch.setattr(kg_detectron.d2.confidence, "fit_confidence", partial(fit_confidence, views=4))
    trainer = train(config(data, tmp_path / "run"), resume=True)
    fitted = head_of(tmp_path / "run" / "model_final.pth")
    assert fitted["layers.4.weight"].any()
    for name, value in head(trainer.model.state_dict()).items():
        assert torch.equal(value, fitted[name])


def train_and_compare(root: Path, output: Path) -> None:
    kg_detectron.d2.confidence.fit_confidence = partial(fit_confidence, views=4)  # in a process of its own
    trainer = train(config(root, output))
    values = [value.tolist() for value in head(trainer.model.module.state_dict()).values()]
    assert any(map(any, values[-2])) and all(other == values for other in comm.all_gather(values))


def test_all_processes_get_the_head(data, tmp_path):
    launch(train_and_compare, "cpu", processes=2, args=(data, tmp_path / "run"))


def test_without_a_head_nothing_is_fitted(data, tmp_path, monkeypatch):
    monkeypatch.setattr(kg_detectron.d2.confidence, "fit_confidence", lambda *_: 1 / 0)
    train(config(data, tmp_path / "run", "MODEL.CELLS.CONFIDENCE", ""))
    assert (tmp_path / "run" / "model_final.pth").is_file() and not (tmp_path / "run" / CONFIDENCE_FILE).exists()


@pytest.mark.parametrize("name", ["dcan_synthetic_cpu", "mask_rcnn_fpn_r18_synthetic_cpu"])
def test_methods_without_a_head_have_nothing_to_fit(data, tmp_path, name):
    """Whatever the config asks of the keypoint graph."""
    files = ["DATASETS.TRAIN", (str(data / "train" / "cells.json"),), "DATASETS.VALIDATION", (), "DATASETS.TEST", ()]
    cfg = load_config(name, *files, "OUTPUT_DIR", tmp_path, "MODEL.CELLS.CONFIDENCE", "mask", "SEED", 3)
    register_files(cfg.DATASETS.TRAIN)
    assert not any(isinstance(hook, FitConfidence) for hook in Trainer(cfg)._hooks)

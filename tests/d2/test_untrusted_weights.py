"""Weights and configs from elsewhere run nothing and download nothing, unless --trust-pickle opens the old way."""

import contextlib
import os
import pickle
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
import train_net
from builders import CONFIGS
from detectron2.utils.file_io import PathManager
from torch import nn

from kg_detectron.d2 import trainer
from kg_detectron.d2.checkpointer import WholeCheckpointer
from kg_detectron.d2.config import merge_config

CONFIG = str(CONFIGS / "kg_r18_synthetic_cpu.yaml")


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "made by a file"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks Detectron2 for a file that is not here fails the test."""
    get = PathManager.get_local_path

    def local_only(path: str, *arguments, **options) -> str:
        assert "://" not in path, f"asked for {path}"
        return get(path, *arguments, **options)

    monkeypatch.setattr(PathManager, "get_local_path", local_only)


def malicious(path: Path, marker: Path) -> Path:
    content = {"model": Code(marker), "model_state": Code(marker), "__author__": "somebody"}
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


def arguments(*given: object):
    return train_net.build_parser().parse_args(["--config-file", CONFIG, *map(str, given)])


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth", "weights.pyth", "weights"])
@pytest.mark.parametrize("resume", [False, True])
def test_weights_run_nothing(tmp_path: Path, marker: Path, name: str, resume: bool):
    path = malicious(tmp_path / name, marker)
    if resume:
        (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(ValueError, match=rf"{path}.*(trust-pickle|could run code)"):
        WholeCheckpointer(nn.Linear(2, 2), str(tmp_path)).resume_or_load(str(path), resume=resume)
    assert not marker.exists()


@pytest.mark.parametrize("mode", [["--eval-only"], [], ["--resume"]])
def test_train_net_hands_its_weights_to_that_checkpointer(tmp_path: Path, marker: Path, monkeypatch, mode: list[str]):
    """Up to the loading of weights everything else is left out."""
    path = malicious(tmp_path / "weights.pkl", marker)
    (tmp_path / "last_checkpoint").write_text("weights.pkl")
    monkeypatch.setattr(train_net, "check_datasets", lambda *_: None)
    monkeypatch.setattr(trainer.Trainer, "build_model", classmethod(lambda cls, cfg: nn.Linear(2, 2)))
    monkeypatch.setattr(trainer, "Seeding", lambda *_: None)
    monkeypatch.setattr(train_net, "default_setup", lambda *_: None)
    monkeypatch.setattr(train_net, "setup_logger", lambda *_, **__: None)
    monkeypatch.setattr(trainer.Trainer, "build_train_loader", classmethod(lambda cls, cfg: FakeLoader()))
    options = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", path, "SOLVER.OPTIMIZER", "SGD"]
    with pytest.raises(ValueError, match="weights.pkl was refused.*--trust-pickle"):
        train_net.main(arguments(*mode, *options))
    assert not marker.exists()
    with contextlib.suppress(Exception):  # what comes back from the code is no weights
        train_net.main(arguments(*mode, "--trust-pickle", *options))
    assert marker.is_dir()


class FakeLoader:
    sampler = None

    def __iter__(self):
        return iter([])


def test_trusted_pickles_load(tmp_path: Path):
    """Detectron2's own weights are pickles of arrays."""
    weights = {"weight": np.full((2, 2), 3, np.float32), "bias": np.zeros(2, np.float32)}
    (tmp_path / "d2.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2"}))
    torch.save({"model": weights}, tmp_path / "old.pth")
    for name in ("d2.pkl", "old.pth"):
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=name):
            WholeCheckpointer(model).load(str(tmp_path / name))
        WholeCheckpointer(model, trust_pickle=True).load(str(tmp_path / name))
        assert (model.weight == 3).all()


def test_the_checkpoint_to_resume_from_lies_in_the_runs_folder(tmp_path: Path):
    (tmp_path / "run").mkdir()
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    for name in ("../other.pth", str(tmp_path / "other.pth")):
        (tmp_path / "run" / "last_checkpoint").write_text(name)
        with pytest.raises(ValueError, match="last_checkpoint names .*other.pth, expected a file in its folder"):
            WholeCheckpointer(nn.Linear(2, 2), str(tmp_path / "run")).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "text",
    [
        "MODEL: !!python/object/apply:os.mkdir ['{marker}']\n",
        "_BASE_: base.yaml\n",
        "_BASE_: https://localhost/base.yaml\n",
        "_BASE_: [detectron2://base.yaml]\n",
        "just text",
        "MODEL: [1\n",
    ],
)
def test_configs_are_data_and_are_not_downloaded(tmp_path: Path, marker: Path, text: str):
    config = tmp_path / "config.yaml"
    config.write_text(text.format(marker=marker))
    (tmp_path / "base.yaml").write_text(f"MODEL: !!python/object/apply:os.mkdir ['{marker}']\n")
    cfg = train_net.get_cfg()
    with pytest.raises((ValueError, OSError), match=r"base\.yaml|config\.yaml"):
        merge_config(cfg, str(config))
    with pytest.raises((ValueError, OSError), match=r"base\.yaml|config\.yaml"):
        train_net.setup(train_net.build_parser().parse_args(["--config-file", str(config)]))
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(compare.CompareError, match=r"cannot use .*config\.yaml"):
        compare.load_model(compare.find_runs([str(tmp_path)])[0], "cpu")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model_final.pth", "weights.pkl"])
def test_compare_runs_nothing(tmp_path: Path, marker: Path, name: str):
    cfg = train_net.get_cfg()
    train_net.add_kg_config(cfg)
    merge_config(cfg, CONFIG)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    malicious(tmp_path / name, marker)
    with pytest.raises(compare.CompareError, match=f"cannot load {tmp_path / name}"):
        compare.load_model(compare.find_runs([str(tmp_path)], name)[0], "cpu")
    assert not marker.exists()


def test_only_what_stands_on_the_command_line_is_downloaded(tmp_path: Path):
    address = "https://localhost/weights.pth"
    config = tmp_path / "config.yaml"
    config.write_text(f"_BASE_: {CONFIG}\nMODEL:\n  WEIGHTS: {address}\nOUTPUT_DIR: {tmp_path / 'out'}\n")
    given = ["--config-file", str(config), "MODEL.DEVICE", "cpu"]
    with pytest.raises(ValueError, match=f"{address} .*not downloaded unless it stands on the command line"):
        train_net.setup(train_net.build_parser().parse_args(given))
    train_net.setup(train_net.build_parser().parse_args([*given, "MODEL.WEIGHTS", address]))


def test_files_of_proposals_are_pickles():
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS: files of proposals are pickles"):
        train_net.setup(arguments("MODEL.LOAD_PROPOSALS", "True"))

"""Runs that are the same twice, and the same when they are interrupted: by signals, by errors, by SIGKILL."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_synthetic
import pytest
import torch
import train_net
from builders import ROOT, load_config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from kg_detectron.d2 import register_cells
from kg_detectron.d2.trainer import Trainer

ITERATIONS = 6
DATA_KEYS = ("json_file", "image_root")
KG, MASK_RCNN = MODELS = ("kg_r18_synthetic_cpu", "mask_rcnn_fpn_r18_synthetic_cpu")


@pytest.fixture(scope="module", autouse=True)
def cells(tmp_path_factory):
    """Datasets ``resume_train`` of 5 images, so that no epoch is a whole number of batches, and ``resume_val`` of 2."""
    root = tmp_path_factory.mktemp("data")
    make_synthetic.main(
        ["--kind", "nuclei", "--train", "5", "--val", "2", "--size", "64", "64", "--cells", "2", "4"]
        + ["--seed", "0", "--output", str(root)]
    )
    for split in ("train", "val"):
        folder = root / "synthetic"
        register_cells(f"resume_{split}", str(folder / f"instances_{split}.json"), str(folder / split))
    yield
    for split in ("train", "val"):
        DatasetCatalog.remove(f"resume_{split}")
        MetadataCatalog.remove(f"resume_{split}")


def config(model: str, output: Path, *options: object) -> CfgNode:
    """Small networks, with everything on that draws random numbers or has a state."""
    small = ["INPUT.SIZE", (64, 64), "SOLVER.IMS_PER_BATCH", 2, "SEED", 3, "OUTPUT_DIR", output]
    small += ["SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 100, "DATALOADER.NUM_WORKERS", 0]
    small += ["DATASETS.TRAIN", ("resume_train",), "DATASETS.VALIDATION", ("resume_val",), "DATASETS.TEST", ()]
    small += ["TEST.EVAL_PERIOD", 2, "SOLVER.EARLY_STOPPING.PATIENCE", 9, "SOLVER.WARMUP_ITERS", 4]
    small += ["MODEL.CELLS.WIDTHS", [8, 8, 8, 8], "MODEL.CELLS.C0_CHANNELS", 8]
    small += ["MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.CELLS.BOX_JITTER", 0.2]
    return load_config(model, *small, *options)


class Interruption(HookBase):
    """Does something at the end of an iteration's computations, before the other hooks."""

    def __init__(self, iteration: int, action) -> None:
        self.iteration = iteration
        self.action = action

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.action()


def train(cfg: CfgNode, *, resume: bool = False, interruption: Interruption | None = None) -> None:
    seed_all_rng(None if resume else cfg.SEED)  # what is resumed owes nothing to the seeds of its process
    trainer = Trainer(cfg)
    if interruption:
        trainer.register_hooks([interruption])
        trainer._hooks.insert(0, trainer._hooks.pop())
    trainer.resume_or_load(resume=resume)
    trainer.train()


def checkpoint(output: Path, name: str = "model_final") -> dict:
    return torch.load(output / f"{name}.pth", weights_only=True)


def assert_same(one: object, other: object, where: str = "checkpoint") -> None:
    """Equal in every part, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Path]:
    """Output folders of whole runs."""
    folders = {model: tmp_path_factory.mktemp(model) for model in MODELS}
    for model, folder in folders.items():
        train(config(model, folder))
    return folders


def iterations(output: Path) -> list[int]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [line["iteration"] for line in lines if "total_loss" in line]


def interrupt_everything() -> None:
    """As a scheduler does: to this process and its workers, from outside."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
    time.sleep(0.2)


@pytest.mark.parametrize("model, workers", [(KG, 0), (KG, 1), (KG, 2), (MASK_RCNN, 2)])
def test_stopped_by_a_signal_and_resumed_is_the_whole_run(uninterrupted, tmp_path, model, workers):
    """Weights, optimiser, schedule, early stopping and place in the data: on any number of workers, where the whole
    run had none, and with another SEED in the config of the second part."""
    cfg = config(model, tmp_path, "DATALOADER.NUM_WORKERS", workers)
    stop = (lambda: signal.raise_signal(signal.SIGINT)) if workers == 0 else interrupt_everything
    handler = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs the tests in the background
    with pytest.raises(SystemExit) as exit:
        train(cfg, interruption=Interruption(2, stop))
    assert exit.value.code == (130 if workers == 0 else 143)
    assert checkpoint(tmp_path, "model_stopped")["iteration"] == 2
    assert not (tmp_path / "model_final.pth").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    cfg.SEED = 4
    train(cfg, resume=True)
    whole, resumed = checkpoint(uninterrupted[model]), checkpoint(tmp_path)
    assert whole["iteration"] == ITERATIONS - 1
    assert whole["trainer"]["hooks"].keys() >= {"Seeding", "LRScheduler", "EarlyStopping"}
    assert_same(whole, resumed)


def test_same_twice_with_or_without_validation_and_workers(uninterrupted, tmp_path):
    train(config(KG, tmp_path, "DATASETS.VALIDATION", (), "DATALOADER.NUM_WORKERS", 1))
    one, other = checkpoint(uninterrupted[KG]), checkpoint(tmp_path)
    assert_same(one["model"], other["model"])
    assert_same(one["trainer"]["_trainer"]["optimizer"], other["trainer"]["_trainer"]["optimizer"])


def test_after_an_error_the_lost_stretch_is_done_again_and_logged_once(uninterrupted, tmp_path):
    def fail() -> None:
        raise RuntimeError("something broke")

    cfg = config(KG, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2)
    with pytest.raises(RuntimeError, match="something broke"):
        train(cfg, interruption=Interruption(4, fail))
    assert iterations(tmp_path) == [4]
    train(cfg, resume=True)
    assert iterations(tmp_path) == [5]
    assert_same(checkpoint(uninterrupted[KG]), checkpoint(tmp_path))


def test_killed_and_resumed_is_the_whole_run(uninterrupted, tmp_path):
    cfg = config(KG, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1)
    code = (
        "import sys; import test_resume as t;"
        "t.register_cells('resume_train', *sys.argv[1:3]); t.register_cells('resume_val', *sys.argv[3:5]);"
        "t.train(t.config(t.KG, sys.argv[5], 'SOLVER.CHECKPOINT_PERIOD', 1))"
    )
    data = [MetadataCatalog.get(f"resume_{split}").get(key) for split in ("train", "val") for key in DATA_KEYS]
    command = [sys.executable, "-c", code, *data, cfg.OUTPUT_DIR]
    folders = [ROOT, *(ROOT / name for name in ("tests/d2", "tests", "tools", "datasets"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not Path(cfg.OUTPUT_DIR, "model_0000002.pth").exists():
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train(cfg, resume=True)
    assert_same(checkpoint(uninterrupted[KG]), checkpoint(tmp_path))


def test_a_new_run_in_the_folder_of_another_is_not_mixed_with_it(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    (tmp_path / "metrics.json").write_text('{"iteration": 99, "total_loss": 1.0}\n')

    def end() -> None:
        raise RuntimeError("before the first checkpoint")

    with pytest.raises(RuntimeError, match="before the first"):
        train(config(KG, tmp_path), interruption=Interruption(0, end))
    assert not (tmp_path / "last_checkpoint").exists()
    assert iterations(tmp_path) == [0]


def test_a_run_without_a_seed_keeps_the_one_it_drew(tmp_path):
    cfg = config(KG, tmp_path, "SEED", -1)
    drawn = {train_net.run_seed(cfg, resume=False) for _ in range(3)}
    assert len(drawn) == 3 and min(drawn) >= 0
    cfg.SEED = drawn.pop()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    resumed = config(KG, tmp_path, "SEED", -1)
    assert train_net.run_seed(resumed, resume=True) == cfg.SEED
    assert train_net.run_seed(config(KG, tmp_path, "SEED", 7), resume=True) == 7

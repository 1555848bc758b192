"""Trainings that several processes share over gloo: equal to one process, resumed on another number, ended together."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import CONFIGS, ROOT, load_config, nuclei_dataset
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm

from kg_detectron.d2 import register_files
from kg_detectron.d2.launch import ProcessError, launch
from kg_detectron.d2.trainer import Trainer

ITERATIONS = 10
SMALL = ["INPUT.SIZE", "(64,64)", "SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.CELLS.WIDTHS", "[4,6,8,8]", "MODEL.CELLS.C0_CHANNELS", "4", "SEED", "3"]
SMALL += ["MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", "0.0", "SOLVER.WARMUP_ITERS", "2", "SOLVER.CHECKPOINT_PERIOD", "100"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of datasets: 5 training images, of which 3 have no cells, 1 validation and 2 test images."""
    root = tmp_path_factory.mktemp("data")
    files = {split: nuclei_dataset(root / split, n) for split, n in (("TRAIN", 5), ("VALIDATION", 1), ("TEST", 2))}
    content = json.loads(files["TRAIN"].read_text())
    content["annotations"] = [cell for cell in content["annotations"] if cell["image_id"] < 3]
    files["TRAIN"].write_text(json.dumps(content))
    return [option for split, file in files.items() for option in (f"DATASETS.{split}", f"('{file}',)")]


def config(output: Path, *options: object) -> CfgNode:
    cfg = load_config("kg_r18_synthetic_cpu", *SMALL, "SOLVER.MAX_ITER", ITERATIONS, "OUTPUT_DIR", output, *options)
    for split in ("TRAIN", "VALIDATION", "TEST"):
        register_files(cfg.DATASETS[split])
    return cfg


def train(options: list[object], output: Path, *, double: bool = False, resume: bool = False, hook: object = None):
    """Train in this process, which may be one of several; ``hook`` is made and comes first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        torch.manual_seed(3)
        output.mkdir(exist_ok=True)
        trainer = Trainer(config(output, *options))
        if hook is not None:
            trainer.register_hooks([hook()])
            trainer._hooks.insert(0, trainer._hooks.pop())
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer
    finally:
        torch.set_default_dtype(before)


class Signalled(HookBase):
    """A signal to one of the processes, in one iteration."""

    def __init__(self, rank: int, number: int, iteration: int) -> None:
        self.rank, self.number, self.iteration = rank, number, iteration

    def before_step(self) -> None:
        if comm.get_rank() == self.rank and self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def checkpoint(output: Path, name: str = "model_final") -> dict:
    return torch.load(output / f"{name}.pth", weights_only=True)


def test_two_and_then_four_processes_are_one(data, tmp_path):
    """Stopped by a signal to one of two processes and resumed by four: the run of one process.

    With random boxes, images without cells in a process, batches across the end of an epoch, and a validation image
    that only one process has.
    """
    options = [*data, "DATASETS.TEST", (), "MODEL.CELLS.NORM", "GN", "MODEL.CELLS.BOX_JITTER", 0.2]
    options += ["MODEL.CELLS.CELLS_PER_IMAGE", 3, "TEST.EVAL_PERIOD", 3, "SOLVER.EARLY_STOPPING.PATIENCE", 9]
    train(options, tmp_path / "one", double=True)
    shared = tmp_path / "shared"
    first = partial(train, double=True, hook=partial(Signalled, 1, signal.SIGTERM, 4))
    with pytest.raises(SystemExit, match="143"):
        launch(first, "cpu", processes=2, args=(options, shared))
    assert checkpoint(shared, "model_stopped")["iteration"] == 4
    launch(partial(train, double=True, resume=True), "cpu", processes=4, args=(options, shared))
    one, other = checkpoint(tmp_path / "one"), checkpoint(shared)
    assert one["iteration"] == other["iteration"] == ITERATIONS - 1
    moved = 0.0
    start = Trainer.build_model(config(tmp_path, *options)).state_dict()
    for name, value in one["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=0, atol=1e-8, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
    best = [state["trainer"]["hooks"]["EarlyStopping"]["best"] for state in (one, other)]
    assert best[0] == pytest.approx(best[1], rel=1e-8)

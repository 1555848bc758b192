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
import train_net
from builders import CONFIGS, ROOT, load_config, nuclei_dataset
from detectron2.config import CfgNode
from detectron2.engine import HookBase
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
    torch.manual_seed(3)
    start = Trainer.build_model(config(tmp_path, *options)).state_dict()
    for name, value in one["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=0, atol=1e-8, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
    best = [state["trainer"]["hooks"]["EarlyStopping"]["best"] for state in (one, other)]
    assert best[0] == pytest.approx(best[1], rel=1e-8)


def compare_statistics(options: list[object], output: Path) -> None:
    trainer = train(options, output)
    statistics = [buffer.tolist() for name, buffer in trainer.model.named_buffers() if "running" in name]
    assert statistics and all(other == statistics for other in comm.all_gather(statistics))


def test_processes_have_the_same_running_statistics(data, tmp_path):
    """Those of batch normalisation, whose batches are those of each process."""
    options = [*data, "DATASETS.VALIDATION", (), "DATASETS.TEST", (), "SOLVER.MAX_ITER", 2, "MODEL.CELLS.NORM", "BN"]
    launch(compare_statistics, "cpu", processes=2, args=(options, tmp_path))


def evaluate(options: list[object], output: Path) -> None:
    output.mkdir(exist_ok=True)
    torch.manual_seed(3)
    cfg = config(output, *options)
    results = Trainer.test(cfg, Trainer.build_model(cfg))
    if comm.is_main_process():
        (output / "figures.json").write_text(json.dumps(results))


def test_evaluation_sees_every_image_once(data, tmp_path):
    """Two images in three processes, one of which has none."""
    found = []
    for processes in (1, 3):
        output = tmp_path / str(processes)
        launch(evaluate, "cpu", processes=processes, args=(data, output))
        cells = json.loads((output / "inference" / "cells" / "coco_instances_results.json").read_text())
        found.append((sorted(json.dumps(cell) for cell in cells), json.loads((output / "figures.json").read_text())))
    (cells, figures), (other_cells, other_figures) = found
    assert len(cells) > 2 and cells == other_cells
    assert figures["paper"] == pytest.approx(other_figures["paper"], nan_ok=True)


def test_early_stopping_stops_all_processes(data, tmp_path):
    """With a learning rate of nothing the loss stays: two evaluations after the first, then the end."""
    options = [*data, "DATASETS.TEST", (), "MODEL.CELLS.NORM", "FrozenBN", "SOLVER.BASE_LR", 1e-12]
    options += ["DATALOADER.NUM_WORKERS", 1]  # whose ends are waited for
    options += ["TEST.EVAL_PERIOD", 1, "SOLVER.EARLY_STOPPING.PATIENCE", 2]
    launch(train, "cpu", processes=2, args=(options, tmp_path))
    assert checkpoint(tmp_path)["iteration"] == 2


def test_a_killed_process_ends_all(data, tmp_path):
    options = [*data, "DATASETS.VALIDATION", (), "DATASETS.TEST", ()]
    killed = partial(train, hook=partial(Signalled, 1, signal.SIGKILL, 2))
    with pytest.raises(
        ProcessError, match="process 1 of 2 was ended by SIGKILL.*; the other processes were ended"
    ) as error:
        launch(killed, "cpu", processes=2, args=(options, tmp_path))
    assert error.value.status == 128 + signal.SIGKILL


def fail_in_one_process(rank: int) -> None:
    if comm.get_rank() == rank:
        raise FloatingPointError("a loss is broken")
    comm.synchronize()


def test_an_error_in_one_process_is_shown_once_and_ends_all():
    with pytest.raises(ProcessError, match=r"(?s)process 1 of 2 failed.*FloatingPointError: a loss is broken") as error:
        launch(fail_in_one_process, "cpu", processes=2, args=(1,))
    assert error.value.status == 1


def wait_for_a_signal(folder: Path, status: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    (folder / str(comm.get_rank())).touch()
    time.sleep(60)


def test_a_signal_to_the_launcher_reaches_the_processes(tmp_path):
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        launch(wait_for_a_signal, "cpu", processes=2, args=(tmp_path, 143))
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "--num-gpus"),
        ({"machines": 2, "machine_rank": 2}, "--machine-rank"),
        ({"machines": 2}, "--dist-url"),
    ],
)
def test_numbers_that_make_no_sense(options, message):
    with pytest.raises(ProcessError, match=message) as error:
        launch(print, "cpu", **options)
    assert error.value.status == 2


def test_synchronised_batch_normalisation_needs_gpus(data, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="SyncBN.*GPUs"):
        Trainer(config(tmp_path, *data, "MODEL.CELLS.NORM", "SyncBN"))


def test_machines_that_find_different_checkpoints(data, tmp_path, monkeypatch):
    trainer = Trainer(config(tmp_path, *data))
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, 7])
    with pytest.raises(ValueError, match="all machines share"):
        trainer.resume_or_load()


# The program


def start(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(ROOT / "tools" / "train_net.py")]
    command += ["--config-file", str(CONFIGS / "kg_r18_synthetic_cpu.yaml"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_launchers_as_two_machines_then_torchrun(data, tmp_path):
    """Trained by two launchers of one process; what they saved is evaluated by two processes of torchrun."""
    options = [*SMALL, *data, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path / "run", "DATASETS.VALIDATION", "()"]
    machines = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--machine-rank"]
    launchers = [start(*machines, rank, *options, "DATASETS.TEST", "()") for rank in (0, 1)]
    for status, output in map(ended, launchers):
        assert status == 0, output[-3000:]
    assert checkpoint(tmp_path / "run")["iteration"] == 1
    evaluation = ["--eval-only", *options, "MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth"]
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    status, output = ended(start(*evaluation, launcher=torchrun))
    assert status == 0, output[-3000:]
    assert output.count("copypaste: Task: paper") == 1  # by the main process alone


def test_a_mistake_ends_all_processes_with_its_status(tmp_path):
    missing = ["DATASETS.TRAIN", f"('{tmp_path}/nothing.json',)", "OUTPUT_DIR", str(tmp_path / "run")]
    command = ["--config-file", str(CONFIGS / "kg_r18_synthetic_cpu.yaml"), "--num-gpus", "2", *SMALL, *missing]
    with pytest.raises(SystemExit, match="2"):
        train_net.start(train_net.build_parser().parse_args(command))

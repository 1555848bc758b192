"""tools/train_net.py on a handful of synthetic images: train, resume, evaluate, early stopping, and its errors."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import make_synthetic
import pytest
import torch
import train_net
from builders import CONFIGS, ROOT, load_config
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kg_detectron.d2 import CellMapper, add_kg_config, register_cells
from kg_detectron.d2.checkpointer import WholeCheckpointer
from kg_detectron.d2.config import merge_config
from kg_detectron.d2.trainer import Trainer
from kg_detectron.inference import load_model, predict
from kg_detectron.io.images import read_image
from kg_detectron.modeling.cpu_layers import DepthwiseConv2d

CONFIG = CONFIGS / "kg_r18_synthetic_cpu.yaml"
SMALL = ["MODEL.DEVICE", "cpu", "INPUT.SIZE", "(64,64)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", "0.0"]  # hardly trained: let something through
SMALL += ["SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data root with synthetic/, where DETECTRON2_DATASETS will point."""
    root = tmp_path_factory.mktemp("data")
    make_synthetic.main(
        ["--kind", "nuclei", "--train", "4", "--val", "2", "--size", "64", "64", "--cells", "2", "4"]
        + ["--seed", "0", "--output", str(root)]
    )
    return root


def run(data: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(CONFIG), *map(str, arguments)]
    environment = os.environ | {"DETECTRON2_DATASETS": str(data), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def logged(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def iterations(output: Path) -> list[int]:
    """Those of training that were logged; evaluation after it is logged under the next number."""
    return [line["iteration"] for line in logged(output) if "total_loss" in line]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    done = run(data, *SMALL, "OUTPUT_DIR", output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_training_leaves_a_model_and_figures(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.json", "model_final.pth", "model_best.pth", "last_checkpoint"} <= names
    # Of the checkpoints every two iterations the last two stay.
    assert not any(name.startswith("model_0000001") for name in names)
    assert iterations(trained)[-1] == 5
    last = logged(trained)[-1]
    assert {"bbox/AP", "segm/AP", "paper/box_AP@0.5", "paper/mask_AP@0.7"} <= last.keys()
    assert any("validation/total_loss" in line for line in logged(trained))


def test_losses_by_name_and_figures_are_written_twice(trained):
    """metrics.json and TensorBoard have the same: every loss, the learning rate, validation losses, AP."""
    named = set().union(*(line.keys() for line in logged(trained))) - {"iteration"}
    shown = EventAccumulator(str(trained)).Reload()
    assert named == set(shown.Tags()["scalars"])
    losses = {"loss_heatmap", "loss_mask"}
    assert {*losses, *(f"validation/{loss}" for loss in losses), "total_loss", "lr", "segm/AP"} <= named
    assert [event.step for event in shown.Scalars("segm/AP")][-1] == 6


def test_the_core_loads_the_checkpoint_and_finds_the_same_cells(trained, data):
    """Checkpoints are data only, and hold what the core needs: same boxes, same masks."""
    cfg = get_cfg()
    add_kg_config(cfg)
    merge_config(cfg, str(trained / "config.yaml"))
    model = build_model(cfg).eval()
    WholeCheckpointer(model, complete=True).load(str(trained / "model_final.pth"))
    core = load_model(trained / "model_final.pth")
    file = sorted((data / "synthetic" / "val").iterdir())[0]
    record = {"file_name": str(file), "image_id": 1, "height": 64, "width": 64}
    instances = model([CellMapper(cfg, is_train=False)(record)])[0]["instances"]
    cells = predict(core, read_image(file))
    assert len(cells) > 0
    torch.testing.assert_close(cells.boxes, instances.pred_boxes.tensor)
    torch.testing.assert_close(cells.scores, instances.scores)
    assert cells.masks.rle() == instances.pred_masks.rle()


def test_evaluation_alone_gives_the_figures_of_training(trained, data, tmp_path):
    done = run(data, "--eval-only", *SMALL, "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", trained / "model_final.pth")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mask_AP@0.5" in done.stdout + done.stderr
    written = json.loads((tmp_path / "inference" / "synthetic_val" / "coco_instances_results.json").read_text())
    expected = json.loads((trained / "inference" / "synthetic_val" / "coco_instances_results.json").read_text())
    assert [r["bbox"] for r in written] == [r["bbox"] for r in expected] != []


def test_resuming_goes_on_where_the_run_ended(trained, data, tmp_path):
    output = tmp_path / "resumed"
    stopped = run(data, *SMALL, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", output)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    done = run(data, "--resume", *SMALL, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert iterations(output)[-1] == 3
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 3


def test_stops_when_the_validation_loss_no_longer_falls(data, tmp_path):
    """With a learning rate of nothing the loss stays: two evaluations after the first, then the end."""
    stop = ["SOLVER.EARLY_STOPPING.PATIENCE", "2", "SOLVER.BASE_LR", "1e-12", "MODEL.CELLS.NORM", "FrozenBN"]
    done = run(data, *SMALL, *stop, "SOLVER.MAX_ITER", "40", "OUTPUT_DIR", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert iterations(tmp_path)[-1] == 5
    assert (tmp_path / "model_final.pth").is_file() and (tmp_path / "model_best.pth").is_file()


def arguments(*options: str, config: Path = CONFIG, eval_only: bool = False) -> Namespace:
    switches = {"resume": False, "skip_bad": False, "trust_pickle": False, "eval_only": eval_only}
    return Namespace(config_file=str(config), opts=list(options), **switches)


def test_bad_input_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="DATASETS.TRAIN.*'cells_train'.*synthetic_train"):
        train_net.setup(arguments("DATASETS.TRAIN", "('cells_train',)"))
    with pytest.raises(ValueError, match="SOLVER.NO_SUCH_KEY"):
        train_net.setup(arguments("SOLVER.NO_SUCH_KEY", "1"))
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"_BASE_: {CONFIG}\nMODEL:\n  KEYPOINT_GRAPH:\n    COLOUR: 1\n")
    with pytest.raises(KeyError, match="MODEL.KEYPOINT_GRAPH.COLOUR"):
        train_net.setup(arguments(config=bad))
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        train_net.setup(arguments(config=tmp_path / "nowhere.yaml"))
    options = ("OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cpu")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS"):
        train_net.main(arguments(*options, eval_only=True))
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER.*RMS"):
        Trainer.build_optimizer(train_net.setup(arguments(*options, "SOLVER.OPTIMIZER", "RMS")), None)


def test_evaluation_downloads_no_initial_weights(tmp_path):
    options = ("OUTPUT_DIR", str(tmp_path))
    config = CONFIGS / "kg_dsb2018.yaml"
    assert train_net.setup(arguments(*options, config=config)).MODEL.CELLS.BACKBONE_WEIGHTS
    assert not train_net.setup(arguments(*options, config=config, eval_only=True)).MODEL.CELLS.BACKBONE_WEIGHTS


def test_bad_data_ends_a_training_before_it_begins(data, tmp_path):
    for file in (data / "synthetic" / "train").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    register_cells("broken_train", str(data / "synthetic" / "instances_train.json"), str(tmp_path))
    command = ["--config-file", str(CONFIG), "--skip-bad", *SMALL]
    command += [
        option for part in ("TRAIN", "VALIDATION", "TEST") for option in (f"DATASETS.{part}", "('broken_train',)")
    ]
    try:
        with pytest.raises(ValueError, match="instances_train.json: no image is sound"):
            train_net.main(train_net.build_parser().parse_args([*command, "OUTPUT_DIR", str(tmp_path / "out")]))
        command.remove("--skip-bad")
        with pytest.raises(ValueError, match=r"broken_train: unreadable file \(4\).*--skip-bad"):
            train_net.main(train_net.build_parser().parse_args([*command, "OUTPUT_DIR", str(tmp_path / "out")]))
    finally:
        DatasetCatalog.remove("broken_train")
        MetadataCatalog.remove("broken_train")


def test_missing_data_is_named(tmp_path):
    done = run(tmp_path, *SMALL, "OUTPUT_DIR", tmp_path / "out")
    assert done.returncode != 0 and "instances_train.json" in done.stderr


def test_on_a_cpu_depthwise_convolutions_have_their_fast_gradient():
    cfg = load_config("kg_lite_synthetic_cpu", "MODEL.CELLS.BACKBONE_WEIGHTS", "")
    layers = [type(layer) for layer in Trainer.build_model(cfg).modules()]
    assert layers.count(DepthwiseConv2d) >= 9 and DepthwiseConv2d not in map(type, build_model(cfg).modules())

"""The methods beside the keypoint graph, by their configs: they train, resume exactly, are exported and predict."""

import json
import shutil

import pytest
import torch
import train_net
from builders import CONFIGS, nuclei_dataset

from kg_detectron.cli.main import main
from kg_detectron.inference import export_run, load_model
from kg_detectron.modeling import method_class

# One in every run; the others take the same way.
METHODS = [
    "stardist",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("dcan", "cornernet", "cosine_embedding", "fcis")),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The JSON file of four images of drawn nuclei."""
    return nuclei_dataset(tmp_path_factory.mktemp("data"), images=4)


def train(name: str, dataset: object, *options: str) -> None:
    settings = ["MODEL.DEVICE", "cpu", "INPUT.SIZE", "(64,64)", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"]
    settings += ["MODEL.CELLS.C0_CHANNELS", "4", "MODEL.CELLS.WIDTHS", "[4,6,8,8]", "SOLVER.IMS_PER_BATCH", "2"]
    settings += ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"]
    settings += [word for split in ("TRAIN", "VALIDATION", "TEST") for word in (f"DATASETS.{split}", f"('{dataset}',)")]
    command = ["--config-file", str(CONFIGS / f"{name}_synthetic_cpu.yaml"), *options[:-1]]
    train_net.main(train_net.build_parser().parse_args([*command, *settings, "OUTPUT_DIR", options[-1]]))


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_all_the_way(name, dataset, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    train(name, dataset, str(run))
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    assert "paper/mask_AP@0.5" in lines[-1] and any("validation/total_loss" in line for line in lines)

    again.mkdir()
    shutil.copy(run / "model_0000000.pth", again)
    (again / "last_checkpoint").write_text("model_0000000.pth")
    train(name, dataset, "--resume", str(again))
    weights, same = (load_model(folder / "model_final.pth").state_dict() for folder in (run, again))
    assert all(torch.equal(value, same[key]) for key, value in weights.items())

    export_run(run, tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    assert type(model) is method_class(name) and model.settings.trunk.widths == (4, 6, 8, 8)
    command = ["predict", str(dataset.parent), "-m", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert len(list((tmp_path / "out").glob("*_labels.tif"))) == 4
    assert main(["evaluate", str(dataset), str(tmp_path / "out")]) == 0

"""A method of its own file goes all the way, with nothing inside the package edited: see tests/toy_method.py."""

import json
from importlib.metadata import EntryPoint

import compare
import numpy as np
import pytest
import torch
import train_net
from builders import CONFIGS, nuclei_dataset
from toy_method import ForegroundSettings, ToyNet, ToySettings

from kg_detectron.cli.main import main
from kg_detectron.inference import export_run, load_model, predict
from kg_detectron.io.images import read_image
from kg_detectron.io.labels import read_label_image
from kg_detectron.modeling import Preprocessing, method_class, method_names, methods

# Importing it registered it; other tests must not see it, for they start processes that do not know it.
methods._METHODS.pop("toy", None)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The toy method, while the tests of this file run."""
    methods._METHODS["toy"] = ToyNet
    yield
    methods._METHODS.pop("toy", None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The JSON file of six images of drawn nuclei."""
    return nuclei_dataset(tmp_path_factory.mktemp("data"), images=6)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The folder of a short training by tools/train_net.py."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "toy_config.yaml"
    config.write_text(
        f"_BASE_: ['{CONFIGS / 'parts' / 'shared.yaml'}', '{CONFIGS / 'parts' / 'schedule' / 'cpu.yaml'}']\n"
        "MODEL:\n  META_ARCHITECTURE: CellInstanceSegmentation\n  DEVICE: cpu\n"
        "  CELLS: {METHOD: toy}\n  TOY: {CHANNELS: 6, PROBABILITY: 0.3}\n"
        f"DATASETS: {{TRAIN: ['{dataset}'], VALIDATION: ['{dataset}'], TEST: ['{dataset}']}}\n"
        "INPUT:\n  SIZE: [64, 64]\n  NORMALISATION: percentile\n"
        "  AUGMENTATION: {EXPAND: 1.0, CROP: 1.0, CONTRAST: [1.0, 1.0], BRIGHTNESS: 0.0}\n"
        "DATALOADER: {NUM_WORKERS: 0}\nTEST: {EVAL_PERIOD: 40}\nSEED: 1\n"
        "SOLVER: {MAX_ITER: 80, BASE_LR: 0.02, WARMUP_ITERS: 0, IMS_PER_BATCH: 2}\n"
    )
    command = ["--config-file", str(config), "OUTPUT_DIR", str(folder)]
    train_net.main(train_net.build_parser().parse_args(command))
    return folder


def test_it_trains(run):
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses[-1] < losses[0]
    assert any("validation/total_loss" in line for line in lines) and lines[-1]["paper/mask_AP@0.5"] > 0


def test_its_checkpoint_describes_it(run):
    model = load_model(run / "model_final.pth")
    assert type(model) is ToyNet and model.settings.preprocessing.size == (64, 64)
    assert model.settings.foreground == ForegroundSettings(channels=6, probability=0.3)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_it_becomes_a_model_file_that_predicts_the_same(run, dataset, tmp_path, ending):
    export_run(run, tmp_path / f"toy{ending}")
    image = read_image(dataset.parent / "1.png")
    expected = predict(load_model(run / "model_best.pth"), image)
    cells = predict(load_model(tmp_path / f"toy{ending}"), image)
    assert len(cells) > 0 and torch.equal(cells.boxes, expected.boxes) and torch.equal(cells.scores, expected.scores)
    assert cells.masks.rle() == expected.masks.rle()
    assert (cells.scores.diff() <= 0).all() and cells.size == image.shape[:2]


def test_it_is_compared_and_reported(run, dataset, tmp_path):
    compare.main([str(run), "--dataset", str(dataset), "--output", str(tmp_path), "--device", "cpu", "--report"])
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert row["mask_AP@0.5"] > 0 and row["parameters_M"] > 0
    assert row["GMACs"] == pytest.approx(row["dense_GMACs"]) and row["GMACs"] > 0
    assert "toy" in (run / "config.yaml").read_text()
    assert (tmp_path / "report.html").is_file()


def test_the_command_predicts_evaluates_and_reports(run, dataset, tmp_path, capsys):
    export_run(run, tmp_path / "toy.safetensors")
    images = str(dataset.parent)
    assert main(["predict", images, "-m", str(tmp_path / "toy.safetensors"), "-o", str(tmp_path / "out")]) == 0
    labels = sorted((tmp_path / "out").glob("*_labels.tif"))
    assert len(labels) == 6 and read_label_image(labels[0]).max() > 0
    assert main(["evaluate", str(dataset), str(tmp_path / "out")]) == 0
    page = tmp_path / "page.html"
    assert main(["report", str(dataset), str(tmp_path / "out"), "--images", images, "-o", str(page)]) == 0
    assert page.is_file()
    explained = ["explain", f"{images}/1.png", "-m", str(tmp_path / "toy.safetensors"), "-o", str(tmp_path / "x.png")]
    capsys.readouterr()
    assert main(explained) == 2 and "only keypoint graphs can be explained" in capsys.readouterr().err


def test_large_images_are_predicted_at_once():
    """It does not say that it is local, so no tiles are cut."""
    torch.manual_seed(0)
    model = ToyNet.build(ToySettings(Preprocessing(size=(64, 64)), ForegroundSettings(probability=0.45))).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    whole, tiled = predict(model, image, scale=1), predict(model, image, scale=1, tile=32)
    assert torch.equal(whole.boxes, tiled.boxes) and whole.masks.rle() == tiled.masks.rle()


def test_an_installed_package_brings_its_methods(monkeypatch):
    """By an entry point: its module is imported when a method is asked for, and for the keys of the config."""
    entry = EntryPoint("toy", "toy_method", methods.ENTRY_POINTS)

    def entry_points(group, **selection):
        return [entry] if group == methods.ENTRY_POINTS and selection.get("name", "toy") == "toy" else []

    def load(entry):
        assert entry.value == "toy_method"
        methods.register_method("toy")(ToyNet)

    monkeypatch.setattr(methods, "entry_points", entry_points)
    monkeypatch.setattr(EntryPoint, "load", load)
    for ask in (lambda: method_class("toy") is ToyNet, lambda: "toy" in method_names()):
        monkeypatch.setattr(methods, "_METHODS", {"keypoint_graph": method_class("keypoint_graph")})
        assert ask()

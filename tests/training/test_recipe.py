"""Recipes: settings in a YAML file, read as data only, over those of a model and below the command line's."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from builders import ROOT, tiny_network

from kg_detectron.cli import main
from kg_detectron.cli.train import add_parser, train_settings
from kg_detectron.inference import save_model
from kg_detectron.modeling.settings import from_plain, replaced
from kg_detectron.training.recipe import Recipe, read_recipe
from kg_detectron.training.run import TrainSettings, starting_model

RECIPE = """
network:
  backbone: {c0_channels: 6}
  targets: {radius: 2.5}
training: {iterations: 7, learning_rate: 1e-3, batch_size: 2}
geometry: {window: 96}
colours: {noise: 0.0}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.fixture
def start(tmp_path: Path) -> str:
    file = tmp_path / "start.safetensors"
    save_model(tiny_network(), file)
    return str(file)


def test_a_recipe_says_what_differs(tmp_path):
    recipe = read_recipe(written(tmp_path, RECIPE))
    assert recipe.network == {"backbone": {"c0_channels": 6}, "targets": {"radius": 2.5}}
    assert recipe.training == {"iterations": 7, "learning_rate": 0.001, "batch_size": 2}
    assert recipe.geometry.window == 96 and recipe.geometry.rotation == Recipe().geometry.rotation
    assert recipe.colours.noise == 0
    assert read_recipe(written(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: {}", "unknown settings colour"),
        ("geometry: {windows: 3}", "unknown settings windows"),
        ("network: 3", "network: expected a mapping"),
        ("- 1", "expected a mapping"),
        ("a: [", "recipe.yaml"),
        ("a: &a [1]\nb: [*a, *a]", "aliases are not allowed"),
        ("[" * 9999, "recipe.yaml"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(written(tmp_path, text))
    assert "recipe.yaml cannot be read as a recipe" in str(error.value)


def test_a_recipe_runs_nothing(tmp_path, capsys):
    marker = tmp_path / "made"
    file = written(tmp_path, f"network: !!python/object/apply:os.mkdir ['{marker}']")
    assert main(["train", str(tmp_path), "-o", str(tmp_path / "run"), "--config", str(file)]) == 2
    assert "recipe.yaml cannot be read as a recipe" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "run").exists()


def test_a_trained_model_keeps_its_weights_where_they_fit(start):
    model = starting_model(start, changes={"targets": {"radius": 2.5}, "segmentation": {"box_jitter": 0.1}})
    assert model.settings.targets.radius == 2.5 and model.settings.segmentation.box_jitter == 0.1
    for name, value in tiny_network().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ValueError, match="start.safetensors: its weights do not fit"):
        starting_model(start, changes={"backbone": {"c0_channels": 6}})
    with pytest.raises(ValueError, match="unknown settings colour"):
        starting_model(start, changes={"backbone": {"colour": 6}})


def test_a_network_from_nothing_takes_any_settings(start, monkeypatch):
    kept = starting_model(start)
    monkeypatch.setattr("kg_detectron.training.run.load_model", lambda *_, **__: kept)
    model = starting_model("nothing", changes={"method": "keypoint_graph", "backbone": {"c0_channels": 6}})
    assert model.settings.backbone.c0_channels == 6 and model.settings.trunk == kept.settings.trunk
    with pytest.raises(ValueError, match="method: expected one of"):
        starting_model("nothing", changes={"method": "no_such_method"})


def options(*given: str) -> TrainSettings:
    parser = ArgumentParser()
    add_parser(parser.add_subparsers())
    recipe = Recipe(training={"iterations": 7, "batch_size": 2, "weight_decay": 0.5})
    return train_settings(parser.parse_args(["train", "images", "-o", "run", *given]), recipe)


def test_the_command_line_counts_more_than_the_recipe():
    settings = options()
    assert (settings.iterations, settings.minutes, settings.batch_size, settings.weight_decay) == (7, None, 2, 0.5)
    settings = options("--minutes", "3", "--batch-size", "5", "--patience", "2", "--validations", "9")
    assert (settings.iterations, settings.minutes, settings.batch_size, settings.weight_decay) == (None, 3.0, 5, 0.5)
    assert (settings.patience, settings.validations) == (2, 9)
    with pytest.raises(ValueError, match="patience: expected 0 or more"):
        options("--patience", "-1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--learning-rate -1", "--learning-rate: expected a number above 0, got -1.0"),
        ("--batch-size 0", "--batch-size: expected 1 or more, got 0"),
        ("--iterations 1 --minutes 1", "--minutes and --iterations: expected one of them"),
        ("--freeze 9", "--freeze: expected a number of 0..4, got 9"),
        ("--config recipe.yaml", "training: batch_size: expected 1 or more, got 0"),
        ("--validation a b c", "--validation: expected IMAGES MASKS, or a COCO JSON, got 3 names"),
    ],
)
def test_a_wrong_setting_is_called_as_it_was_given(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("training: {batch_size: 0}")
    assert main(["train", "images", "masks", "-o", "run", *given.split()]) == 2
    assert capsys.readouterr().err == f"kg-detectron: error: {message}\n"


@pytest.mark.parametrize("page", ["train", "add_a_backbone"])
def test_recipes_of_the_docs_are_good(tmp_path, page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (shown,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "network:" in block]
    recipe = read_recipe(written(tmp_path, shown))
    replaced(tiny_network().settings, recipe.network)
    from_plain(TrainSettings, {"minutes": None, "iterations": 1} | recipe.training)

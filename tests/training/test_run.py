"""A whole training with the core alone: from labelled images to a model file, resumed exactly."""

import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SMALL, labelled, training_network
from PIL import Image
from tqdm import TqdmWarning

from kg_detectron.cli import main
from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.modeling import InstanceNet, KeypointGraphNet, Scores
from kg_detectron.training.confidence import fit_confidence
from kg_detectron.training.dataset import LabelledImage, labelled_image, read_dataset
from kg_detectron.training.run import TrainSettings, split_validation, starting_model, train
from kg_detectron.training.scalars import ScalarLog
from kg_detectron.training.validation import Validation, validate


def write_folders(folder: Path, count: int) -> tuple[Path, Path]:
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for image in labelled(training_network(), count):
        Image.fromarray(image.image[:, :, ::-1]).save(images / f"{image.name}.png")
        Image.fromarray(image.labels).save(masks / f"{image.name}.png")
    return images, masks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder / "model.safetensors").state_dict()


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = labelled(training_network(), 4)
    settings = TrainSettings(minutes=None, iterations=4, batch_size=1, seed=3)
    lines: list[str] = []
    figures = train(
        training_network(), images[:3], images[3:], tmp_path / "whole", settings, geometry=SMALL, log=lines.append
    )
    assert figures is not None and any("iteration 4" in line for line in lines)

    from kg_detectron.training.loop import Trainer

    step = Trainer.step

    def stopping(self: Trainer, *arguments: object) -> dict[str, float]:
        result = step(self, *arguments)
        self.stop_requested = self.iteration == 2
        return result

    monkeypatch.setattr(Trainer, "step", stopping)
    stopped = train(
        training_network(), images[:3], images[3:], tmp_path / "parts", settings, geometry=SMALL, log=lines.append
    )
    assert stopped is None
    monkeypatch.setattr(Trainer, "step", step)
    train(training_network(), images[:3], images[3:], tmp_path / "parts", settings, geometry=SMALL, log=lines.append)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name

    with pytest.raises(ValueError, match="holds a run of other settings and other geometry; "):
        train(training_network(), images[:3], images[3:], tmp_path / "parts", TrainSettings(iterations=7, minutes=None))


def test_the_bar_ends_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though the last iteration ends after the time is over, of which tqdm warns."""
    images = labelled(training_network(), 2)
    settings = TrainSettings(minutes=1 / 600, batch_size=1, validations=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TqdmWarning)
        train(training_network(), images, images, tmp_path, settings, geometry=SMALL)
    assert "training: 100.0 %" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It has not noted settings that came later; one that it noted must be the same."""
    images = labelled(training_network(), 4)
    settings = TrainSettings(minutes=None, iterations=1, batch_size=1, validations=0)
    train(training_network(), images, images, tmp_path, settings, geometry=SMALL)
    file = tmp_path / "train.json"
    noted = json.loads(file.read_text())
    for part, name in (("model", "classes"), ("model", "ranking")):
        del noted[part]["settings"][name]
    del noted["settings"]["freeze"]
    file.write_text(json.dumps(noted))
    assert train(training_network(), images, images, tmp_path, settings, geometry=SMALL) is not None
    noted["model"]["settings"]["decoding"]["hops"] += 1
    file.write_text(json.dumps(noted))
    with pytest.raises(ValueError, match="another model"):
        train(training_network(), images, images, tmp_path, settings, geometry=SMALL)


def test_a_run_of_other_images_is_refused(tmp_path: Path) -> None:
    """A finished run too, whose model would be fitted to them. Those of an earlier version did not note the images."""
    first, second, other = labelled(training_network(), 3)
    settings = TrainSettings(minutes=None, iterations=1, batch_size=1, validations=0, confidence="")

    def run(training: LabelledImage, validation: LabelledImage) -> Validation | None:
        return train(training_network(), [training], [validation], tmp_path, settings, geometry=SMALL)

    assert run(first, second) is not None
    kept = (tmp_path / "model.safetensors").read_bytes()
    for images in ((first, other), (other, second), (replace(first, labels=first.labels[::-1]), second)):
        with pytest.raises(ValueError, match="holds a run of other images; choose another folder"):
            run(*images)
    assert (tmp_path / "model.safetensors").read_bytes() == kept
    assert run(replace(first, name="moved/a"), second) is not None
    file = tmp_path / "train.json"
    noted = json.loads(file.read_text())
    del noted["images"]
    file.write_text(json.dumps(noted))
    assert run(first, other) is not None


@pytest.mark.slow
def test_the_command_adapts_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = write_folders(tmp_path, 5)
    start = tmp_path / "start.safetensors"
    save_model(training_network(), start)
    run = tmp_path / "run"
    command = ["train", str(images), str(masks), "-o", str(run), "-m", str(start), "--iterations", "2"]
    assert main([*command, "--batch-size", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "4 images with" in said and "1 images to validate on" in said
    assert f"kg-detectron predict IMAGES -m {run}/model.safetensors" in said
    model = load_model(run / "model.safetensors")
    assert model.preprocessing.resize == "isotropic" and len(model.preprocessing.diameters) == 5
    records = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert (run / "curves.png").stat().st_size > 1000
    predict(model, read_dataset(images, masks, model.preprocessing)[0].image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "1", "--iterations", "1"], "--minutes and --iterations"),
        (["-m", "no_such_model"], "no_such_model"),
        (["--validation", "a", "b", "c"], "--validation"),
        (["-o", __file__], "--output: expected a folder, but"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], options, message) -> None:
    images, masks = write_folders(tmp_path, 1)
    assert main(["train", str(images), str(masks), "-o", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err


def short_run(tmp_path: Path, model: InstanceNet, **settings: object) -> tuple[KeypointGraphNet, list[str]]:
    """The kept model of two iterations on two images, and what was said."""
    images, lines = labelled(model, 3), []
    budget = TrainSettings(minutes=None, iterations=2, batch_size=3, seed=5, **settings)
    train(model, images[:2], images[2:], tmp_path / "run", budget, geometry=SMALL, log=lines.append)
    return load_model(tmp_path / "run" / "model.safetensors"), lines


@pytest.mark.parametrize("better", [True, False])
def test_a_confidence_head_comes_where_it_does_better(tmp_path: Path, monkeypatch, better: bool) -> None:
    """Fitted to the training images: to half as many views as the training saw windows, 200 at most."""
    fitted = []

    def noted(model, images, seed, views):
        fitted.append(([image.name for image in images], seed, views))
        return fit_confidence(model, images, seed, views)

    def figures(model: KeypointGraphNet, images: list, **_: object) -> Validation:
        value = 0.5 + (0.1 if better else 0.0) * (model.segmentation.confidence_head is not None)
        return Validation({0.5: value, 0.7: value}, value, np.zeros(0), np.zeros(0, bool), 4)

    monkeypatch.setattr("kg_detectron.training.run.fit_confidence", noted)
    monkeypatch.setattr("kg_detectron.training.run.validate", figures)
    kept, lines = short_run(tmp_path, training_network())
    assert fitted == [(["0", "1"], 5, 3)]
    assert any("confidence head was fitted to" in line for line in lines)
    settings = kept.settings
    if better:
        assert settings.segmentation.confidence == "context" and settings.ranking.vote_exponent == 0.5
        assert kept.segmentation.confidence_head.layers[-1].weight.any()
    else:
        assert settings.segmentation == training_network().settings.segmentation and settings.ranking.vote_exponent == 1


def test_no_confidence_head_where_none_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kg_detectron.training.run.fit_confidence", lambda *_: 1 / 0)
    kept, _ = short_run(tmp_path, training_network(), confidence="")
    assert not kept.settings.segmentation.confidence


def test_a_model_with_a_confidence_head_gets_it_fitted_again(tmp_path: Path) -> None:
    """Whether it does better or not, before the scores are calibrated, and as it is, whatever others would get."""
    changes = {"segmentation": {"confidence": "mask"}, "ranking": {"vote_exponent": 0.1}}
    save_model(training_network(), tmp_path / "start.safetensors")
    kept, lines = short_run(tmp_path, starting_model(str(tmp_path / "start.safetensors"), changes=changes))
    assert kept.settings.segmentation.confidence == "mask" and kept.settings.ranking.vote_exponent == 0.1
    assert kept.segmentation.confidence_head.layers[-1].weight.any()
    assert any("confidence head was fitted to" in line for line in lines)


def test_images_without_cells_cannot_be_trained_on(tmp_path: Path) -> None:
    empty = labelled_image(
        "a", np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), int), training_network().preprocessing
    )
    with pytest.raises(ValueError, match="at least one labelled cell"):
        train(training_network(), [empty], [empty], tmp_path / "run")


def test_the_split_is_random_but_always_the_same() -> None:
    images = labelled(training_network(), 10)
    training, validation = split_validation(images, seed=1)
    assert len(training) == 8 and len(validation) == 2
    again = split_validation(images, seed=1)
    assert [i.name for i in validation] == [i.name for i in again[1]]
    few = split_validation(images[:3])
    assert len(few[0]) == len(few[1]) == 3


def test_a_start_from_nothing_has_the_kept_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = tmp_path / "nuclei.safetensors"
    save_model(training_network(), kept)
    monkeypatch.setattr("kg_detectron.training.run.load_model", lambda *_, **__: load_model(kept))
    model = starting_model("nothing")
    assert model.settings == training_network().settings
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), load_model(kept).parameters(), strict=True))


@pytest.mark.parametrize("of_several_dyes", [False, True])
def test_pictures_of_several_dyes_are_learned_and_predicted_in_all_colours(tmp_path: Path, of_several_dyes) -> None:
    model, lines = training_network().with_preprocessing(single_colours=True), list[str]()
    images = labelled(model, 2)
    if of_several_dyes:
        images[1].image[..., 1:] = images[1].image[::-1, ::-1, 1:]
    settings = TrainSettings(minutes=None, iterations=1, batch_size=1, validations=1)
    assert train(model, images, images, tmp_path, settings, geometry=SMALL, log=lines.append) is not None
    assert load_model(tmp_path / "model.safetensors").preprocessing.single_colours is not of_several_dyes
    assert any("all their colours" in line for line in lines) is of_several_dyes


@pytest.mark.parametrize("true_scale", [False, True])
def test_a_validation_estimates_the_scale_as_a_prediction_does(true_scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model's scores, though those of its result are raw."""
    model = training_network()
    images, calibrated = labelled(model, 2), Scores((0.0, 1.0), (0.1, 0.9), threshold=0.5)
    model.scores, looks, look = calibrated, [], model.network_image

    def noted(image, **given):
        seen = look(image, **given)
        looks.append((model.scores, given.get("diameter"), given.get("scale"), seen[0].scale[0]))
        return seen

    monkeypatch.setattr(model, "network_image", noted)
    figures = validate(model, images, true_scale=true_scale)
    assert model.scores == calibrated and len(looks) == 4
    for image, first, second in zip(images, looks[::2], looks[1::2], strict=True):
        assert first[:3] == (calibrated, image.diameter if true_scale else None, None)
        assert second[0] == Scores() and second[2] == first[3] == second[3]
    assert len(figures.boxes) == len(figures.scores)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Validations have these figures, one after the other, and then the last one."""

    def validate(*_: object, **__: object) -> Validation:
        value = values.pop(0) if len(values) > 1 else values[0]
        return Validation({"0.5": value, "0.7": value}, value, np.zeros(0), np.zeros(0, bool), 1)

    monkeypatch.setattr("kg_detectron.training.run.validate", validate)


def stopping(folder: Path, lines: list[str], iterations: int = 8) -> list[int]:
    """Iterations of the validations of a run with a patience of two."""
    settings = TrainSettings(minutes=None, iterations=iterations, batch_size=1, validations=7, patience=2)
    images = labelled(training_network(), 2)
    assert train(training_network(), images, images, folder, settings, geometry=SMALL, log=lines.append) is not None
    return [json.loads(line)["iteration"] for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_a_run_ends_when_it_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.3, 0.2, 0.2, 0.2])
    lines: list[str] = []
    assert stopping(tmp_path, lines) == [1, 2, 3, 4]  # the best came second
    assert "no better over 2 validations: the training ends after iteration 4" in lines
    assert stopping(tmp_path, lines) == [1, 2, 3, 4]  # it stays ended


def test_a_run_that_gets_better_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.2, 0.1, 0.3])
    assert stopping(tmp_path, [], iterations=4) == [1, 2, 3, 4]


def test_curves_go_to_tensorboard_where_it_is_installed(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = ScalarLog(tmp_path)
    for iteration in (20, 40):
        log.write(iteration, {"loss": 1.0 / iteration})
    log.show(40, {"validation/f1": 0.5})
    log.close()
    time.sleep(1.1)  # TensorBoard's files are ordered by the second
    again = ScalarLog(tmp_path)  # resumed from iteration 30
    again.start(31)
    again.write(40, {"loss": 7.0})
    again.close()
    shown = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(20, pytest.approx(0.05)), (40, 7.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["loss"]) for line in lines] == [(20, 0.05), (40, 7.0)]


def test_without_tensorboard_the_lines_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    log = ScalarLog(tmp_path)
    log.write(20, {"loss": 1.0})
    log.show(20, {"validation/f1": 0.5})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

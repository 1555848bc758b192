"""Classes in training data: categories of any ids, missing ones, one that never occurs, many that are rare."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_network

from kg_detectron.cli import main
from kg_detectron.inference import load_model, save_model
from kg_detectron.io.coco import coco_annotation, load_coco, write_coco
from kg_detectron.io.images import write_png
from kg_detectron.modeling import Preprocessing
from kg_detectron.synthetic import nuclei_image
from kg_detectron.training.augmentation import GeometrySettings, random_window
from kg_detectron.training.dataset import augmented, class_counts, dataset_classes, labelled_image, read_dataset
from kg_detectron.training.run import balance_classes, starting_model
from kg_detectron.training.validation import validate

CATEGORIES = [{"id": 900, "name": "long"}, {"id": 3, "name": "round"}, {"id": 7, "name": "dark"}]


def write_dataset(folder: Path, categories=CATEGORIES, images: int = 2, of_cell=None) -> Path:
    """Drawn nuclei; `of_cell` gives the id of the category of each cell by its number, or None for none."""
    ids = [category["id"] for category in categories]
    of_cell = of_cell or (lambda number: ids[number % len(ids)])
    folder.mkdir(parents=True, exist_ok=True)
    records, annotations = [], []
    for image_id in range(1, images + 1):
        image, masks = nuclei_image(np.random.default_rng(image_id), 64, 64, 5)
        write_png(folder / f"{image_id}.png", image)
        records.append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 64})
        for mask in masks:
            number = len(annotations) + 1
            annotation = coco_annotation(mask, image_id=image_id, annotation_id=number) | {
                "category_id": of_cell(number)
            }
            annotations.append(annotation)
    write_coco(folder / "cells.json", records, annotations, categories, "made by a test")
    return folder / "cells.json"


def test_categories_of_any_ids_become_classes_by_name(tmp_path):
    file = write_dataset(tmp_path)
    assert dataset_classes(file) == ("round", "dark", "long") and dataset_classes(tmp_path) == ()
    truth = {one["id"]: one["name"] for one in CATEGORIES}
    annotations = json.loads(file.read_text())["annotations"]
    for names in (("round", "dark", "long"), ("long", "other", "dark", "round")):
        images = read_dataset(file, None, Preprocessing(), class_names=names)
        found = [names[label - 1] for image in images for label in image.classes]
        assert found == [truth[one["category_id"]] for one in annotations]
    with pytest.raises(ValueError, match="its category 'round' is none of the classes of the model: dark, long"):
        read_dataset(file, None, Preprocessing(), class_names=("dark", "long"))
    (first, *_) = read_dataset(file, None, Preprocessing())  # of one class
    assert not first.classes.any()


def test_two_categories_of_one_name_are_refused(tmp_path, capsys):
    file = write_dataset(tmp_path, [{"id": 3, "name": "round"}, {"id": 9, "name": "round "}])
    with pytest.raises(ValueError, match="the categories 3 and 9 are both called 'round', expected different names"):
        load_coco(file, tmp_path)
    assert main(["check-data", str(file)]) == 1
    assert "categories of one name" in capsys.readouterr().out
    assert main(["convert", str(file), "-o", str(tmp_path / "one.json"), "--merge-categories"]) == 0
    assert load_coco(tmp_path / "one.json", tmp_path).category_names == ["cell"]


def test_cells_without_a_class_are_read_and_written(tmp_path, capsys):
    file = write_dataset(tmp_path, of_cell=lambda number: None if number % 2 else 7 if number % 4 else 3)
    dataset = load_coco(file, tmp_path)
    ids = [cell["category_id"] for record in dataset.records for cell in record["annotations"]]
    assert ids.count(None) == len(ids) // 2 and set(ids) == {None, 0, 1}
    images = read_dataset(file, None, Preprocessing(), class_names=("round", "dark"))
    labels = np.concatenate([image.classes for image in images])
    assert (labels == [0 if id is None else id + 1 for id in ids]).all()
    assert main(["check-data", str(file)]) == 1  # the category that nothing is of
    printed = capsys.readouterr().out
    assert "annotations have no category" in printed and "no annotation is of the category long" in printed
    content = json.loads(file.read_text())
    del content["annotations"][0]["category_id"]  # instead of null
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 1: missing key 'category_id'; kg-detectron convert adds it"):
        load_coco(file, tmp_path)
    assert main(["convert", str(file), "-o", str(tmp_path / "new.json")]) == 0
    assert [one["category_id"] for one in json.loads((tmp_path / "new.json").read_text())["annotations"]] == [
        None if id is None else (3, 7)[id] for id in ids
    ]


def test_cells_keep_their_class_in_windows_and_reflections():
    """The class of a cell is its grey level here, so that every window can be checked pixel by pixel."""
    labels = np.zeros((96, 96), np.uint16)
    labels[5:30, 5:30], labels[40:70, 8:25], labels[20:90, 50:62] = 7, 2, 4
    classes = np.array([0, 0, 3, 0, 1, 0, 0, 2])
    image = np.repeat((60 * classes[labels])[..., None], 3, axis=2).astype(np.uint8)
    source = labelled_image("a", image, labels, Preprocessing(normalisation="fixed"), classes)
    assert source.classes.tolist() == [3, 1, 2]
    settings = GeometrySettings(window=128, reflection=1.0, wide_share=0, narrow=0.1)
    seen = set()
    for seed in range(12):
        window, numbers, origin = random_window(
            source.image, source.labels, 1.0, source.centres, settings, np.random.default_rng(seed)
        )
        for number in range(1, len(origin)):
            inside = numbers == number
            if inside.sum() > 50:
                label = source.classes[origin[number] - 1]
                assert np.median(window[inside]) == pytest.approx(60 * label, abs=3)
                seen.add((int(label), number > 3))
    assert {(1, True), (2, True), (3, True), (1, False)} <= seen  # cells and reflections of them
    still = dict.fromkeys(("inversion", "grey", "tint", "levels", "illumination", "blur", "noise"), 0.0)
    from kg_detectron.training.augmentation import ColourSettings

    picture, target = augmented(source, 50.0, settings, ColourSettings(**still), np.random.default_rng(1))
    for mask, label in zip(target["masks"], target["labels"], strict=True):
        assert float(picture[0][mask].median()) == pytest.approx(60 * int(label), abs=3)


def test_a_one_class_model_is_adapted_to_several(tmp_path):
    """All weights stay but those of the new head; where the classes are known already, those too."""
    model = tiny_network(resize="isotropic").eval()
    save_model(model, tmp_path / "one.safetensors")
    names = ("round", "dark", "long")
    adapted = starting_model(str(tmp_path / "one.safetensors"), classes=names)
    assert adapted.classes.names == names
    weights = adapted.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    save_model(adapted, tmp_path / "three.safetensors")
    for again in (("dark", "round"), names):
        known = starting_model(str(tmp_path / "three.safetensors"), classes=again)
        assert known.classes.names == names
        assert all(torch.equal(value, weights[name]) for name, value in known.state_dict().items())
    other = starting_model(str(tmp_path / "three.safetensors"), classes=("dark", "pale"))
    assert other.classes.names == ("dark", "pale")
    with pytest.raises(ValueError, match="method dcan tells no classes apart, and the data have 3"):
        starting_model("nothing", changes={"method": "dcan"}, classes=names)


def test_twenty_classes_of_which_one_holds_most_are_balanced():
    """A class that never occurs weighs nothing; the mean weight of all cells is 1."""
    names = tuple(f"class {number}" for number in range(20))
    model = tiny_network(names=names)
    counts = [900] + [5] * 18 + [0]
    classes = np.repeat(np.arange(1, 21), counts)
    image = labelled_image("a", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int), Preprocessing())
    balance_classes(model, [dataclasses.replace(image, classes=classes), image])
    assert model.classes.cells_of_class == tuple(counts) == model.segmentation.class_head.settings.cells_of_class
    weights = model.segmentation.class_head.weights
    assert weights[19] == 0 and weights[1] > 50 * weights[0] > 0
    assert float((weights * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(1, rel=1e-4)


def test_validation_counts_the_classes_of_matched_cells(tmp_path):
    file = write_dataset(tmp_path)
    names = dataset_classes(file)
    model = tiny_network(names=names, resize="isotropic", normalisation="fixed").eval()
    images = read_dataset(file, None, model.preprocessing, class_names=names)
    figures = validate(model, images, true_scale=True)
    assert figures.class_pairs.shape == (figures.right.sum(), 2)
    pairs = dataclasses.replace(figures, class_pairs=np.array([[1, 1], [2, 3], [3, 3], [3, 3]]))
    assert pairs.class_accuracy == 0.75 and "class accuracy of matched cells 75.0" in str(pairs)


def test_train_command_with_classes(tmp_path, capsys):
    file = write_dataset(tmp_path / "data", images=4, of_cell=lambda number: (3, 7, None)[number % 3])
    save_model(tiny_network(resize="isotropic").eval(), tmp_path / "start.safetensors")
    (tmp_path / "small.yaml").write_text("geometry: {window: 64}\n", encoding="utf-8")
    command = ["train", str(file), "-o", str(tmp_path / "run"), "-m", str(tmp_path / "start.safetensors")]
    command += ["--iterations", "1", "--validations", "0", "--batch-size", "1", "--device", "cpu"]
    command += ["--config", str(tmp_path / "small.yaml")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "cells of each class: round " in printed and "of no known class" in printed
    model = load_model(tmp_path / "run" / "model.safetensors")
    assert model.classes.names == ("round", "dark") and sum(model.classes.cells_of_class) > 0
    command[3] = str(tmp_path / "one")
    assert main([*command, "--merge-categories"]) == 0
    assert load_model(tmp_path / "one" / "model.safetensors").classes.names == ("cell",)


def test_categories_that_the_model_does_not_know_are_refused(tmp_path, capsys):
    training = write_dataset(tmp_path / "a")
    other = write_dataset(tmp_path / "b", [{"id": 1, "name": "pale"}, {"id": 2, "name": "round"}])
    save_model(tiny_network(resize="isotropic").eval(), tmp_path / "start.safetensors")
    command = ["train", str(training), "-o", str(tmp_path / "run"), "-m", str(tmp_path / "start.safetensors")]
    assert main([*command, "--validation", str(other), "--device", "cpu"]) == 2
    assert "its category 'pale' is none of the classes of the model: round, dark, long" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [True, 3, None, {"a": 1}])
def test_lists_that_are_none_have_no_classes(tmp_path: Path, broken: object):
    """What is wrong with such a file, reading it says."""
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"images": [], "annotations": broken, "categories": broken}))
    assert class_counts(file) == {}

"""What a prediction of several classes writes: table, COCO, GeoJSON, label image with its table, overlay."""

import csv
import json

import numpy as np
import pytest
import tifffile
import torch
from builders import drawn_image, tiny_network

from kg_detectron.cells import MaskCrops
from kg_detectron.export.results import save_results
from kg_detectron.inference import predict, save_model
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.run_settings import Settings
from kg_detectron.io.images import write_png

NAMES, COLOURS = ("round", "dark", "long"), ("#ff0000", "#00ff00", "#0000ff")
KINDS = ("labels", "overlay", "coco", "geojson", "csv")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    model = tiny_network(names=NAMES, colours=COLOURS, normalisation="fixed").eval()
    save_model(model, folder / "model.safetensors")
    image = drawn_image(64, 96)
    write_png(folder / "a.png", image)
    predict_files([folder / "a.png"], folder / "model.safetensors", folder / "out", Settings(save=KINDS), device="cpu")
    cells = {row["id"]: row["class"] for row in rows(folder / "out" / "a_cells.csv")}
    return folder, model, image, cells


def test_every_file_says_the_same_class_of_a_cell(predicted):
    folder, model, image, cells = predicted
    assert len(set(cells.values())) > 1 and set(cells.values()) <= set(NAMES)
    out = folder / "out"
    assert {row["id"]: row["class"] for row in rows(out / "cells.csv")} == cells
    table = rows(out / "a_classes.csv")
    assert {row["id"]: row["class"] for row in table} == cells
    assert all(NAMES[int(row["class_id"]) - 1] == row["class"] for row in table)
    assert sorted(map(int, cells)) == np.unique(tifffile.imread(out / "a_labels.tif"))[1:].tolist()
    coco = json.loads((out / "a_coco.json").read_text())
    assert coco["categories"] == [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    assert {str(one["id"]): NAMES[one["category_id"] - 1] for one in coco["annotations"]} == cells
    features = json.loads((out / "a.geojson").read_text())["features"]
    found = {one["properties"]["name"]: one["properties"]["classification"] for one in features}
    colours = dict(zip(NAMES, ([255, 0, 0], [0, 255, 0], [0, 0, 255]), strict=True))
    assert found == {id: {"name": name, "color": colours[name]} for id, name in cells.items()}


def test_the_overlay_shows_the_colours_of_the_classes(tmp_path):
    masks = MaskCrops.from_label_image(np.array([[0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 0], [0, 1, 1, 2, 2, 0]]))
    cells = predict(tiny_network(names=NAMES).eval(), drawn_image(64, 96))[:2]
    cells = type(cells)(masks.windows.float(), torch.tensor([0.9, 0.8]), torch.tensor([3, 1]), masks)
    image = np.zeros((3, 6, 3), np.uint8)
    given = {"category_names": NAMES, "category_colours": ((255, 0, 0), (0, 255, 0), (0, 0, 255))}
    paths = save_results(cells, image, tmp_path, "x", ["overlay", "classes"], **given)
    import cv2

    picture = cv2.imread(str(paths["overlay"]))
    assert picture[1, 1].tolist() == [255, 0, 0] and picture[1, 4].tolist() == [0, 0, 255]  # BGR
    assert rows(paths["classes"]) == [
        {"id": "1", "class_id": "3", "class": "long"},
        {"id": "2", "class_id": "1", "class": "round"},
    ]


def test_one_class_adds_no_column_and_no_table(tmp_path):
    model = tiny_network(normalisation="fixed").eval()
    save_model(model, tmp_path / "model.safetensors")
    write_png(tmp_path / "a.png", drawn_image(64, 96))
    predict_files([tmp_path / "a.png"], tmp_path / "model.safetensors", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "a_classes.csv").exists()
    assert "class" not in rows(tmp_path / "out" / "a_cells.csv")[0]

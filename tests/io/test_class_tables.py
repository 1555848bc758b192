"""Classes on their way into a COCO dataset: tables of label images, folders by class, GeoJSON of QuPath."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cli import main
from kg_detectron.export.results import save_results
from kg_detectron.io.coco import decode_mask, load_coco
from kg_detectron.io.convert import convert, convert_geojson
from kg_detectron.io.qupath import read_geojson

# Cells 2, 5 and 9 of one image.
LABELS = np.zeros((24, 32), np.uint8)
LABELS[2:8, 3:10], LABELS[10:20, 2:9], LABELS[4:18, 15:28] = 2, 5, 9
LABELS[8:12, 18:22] = 0  # a hole
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def folders(tmp_path: Path) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for name, picture in (("a", PICTURE), ("b", 255 - PICTURE)):
        Image.fromarray(picture).save(images / f"{name}.png")
        Image.fromarray(LABELS).save(masks / f"{name}.png")
    return images, masks


def classes_of(file: Path) -> list[dict[int, str | None]]:
    """Of each image, the class of every number of `LABELS`; the masks must be those."""
    dataset = load_coco(file, file.parent)
    images = []
    for record in dataset.records:
        classes = {}
        for cell in record["annotations"]:
            mask = decode_mask(cell["segmentation"], *LABELS.shape)
            (number,) = np.unique(LABELS[mask])
            assert (mask == (LABELS == number)).all()
            id = cell["category_id"]
            classes[int(number)] = None if id is None else dataset.category_names[id]
        images.append(classes)
    return images


EXPECTED = [{2: "tumour", 5: "lymphocyte", 9: None}, {2: "lymphocyte", 5: "lymphocyte", 9: "tumour"}]
CSV = (
    "image,id,class\na.png,2,tumour\na.png,5,lymphocyte\na.png,9,\nb.png,2,lymphocyte\nb.png,5,lymphocyte\nb,9,tumour\n"
)


@pytest.mark.parametrize("kind", ["csv", "json", "folder"])
def test_tables_tell_the_class_of_each_number(tmp_path, kind):
    images, masks = folders(tmp_path)
    table = tmp_path / f"classes.{kind}"
    if kind == "csv":
        table.write_text(CSV)
    elif kind == "json":
        table.write_text(json.dumps({"a.png": {"2": "tumour", "5": "lymphocyte", "9": None}, "b": EXPECTED[1]}))
    else:
        table.mkdir()
        (table / "a_classes.csv").write_text("id,class_id,class\n2,1,tumour\n5,2,lymphocyte\n")
        (table / "b.json").write_text(json.dumps(EXPECTED[1]))
    command = ["convert", str(images), str(masks), "-o", str(tmp_path / "x.json"), "--classes", str(table)]
    assert main(command) == 0
    assert classes_of(tmp_path / "x.json") == EXPECTED
    assert load_coco(tmp_path / "x.json", tmp_path).category_names == ["lymphocyte", "tumour"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,class\na,x\n", "expected the columns image, id, class, got image, class"),
        ("image,id,class\na,2,x\na,2,y\n", "cell 2 has two classes, 'x' and 'y'"),
        ("image,id,class\na,first,x\n", "expected a cell's number and the name of its class, got 'first' and 'x'"),
        ("image,id,class\na,2,x\n", "it has no cell of the image b"),
        ("image,id,class\na,3,x\nb,2,x\n", "a: its label image has no cell 3"),
        ("image,id,class\na,2,\nb,2,\n", "expected the class of at least one cell, got none"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, text, message):
    images, masks = folders(tmp_path)
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(images, masks, tmp_path / "x.json", classes=tmp_path / "classes.csv")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("kind", ["slashes", "backslashes", "files", "names"])
def test_tables_of_images_in_subfolders(tmp_path, kind):
    images, masks = folders(tmp_path)
    for folder in (images, masks):
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / f"{name}.png").rename(folder / name / ("c.png" if kind != "names" else f"{name}.png"))
    table = tmp_path / "classes"
    if kind == "files":
        for name, classes in zip("ab", EXPECTED, strict=True):
            (table / name).mkdir(parents=True)
            (table / name / "c.json").write_text(json.dumps(classes))
    elif kind == "names":  # no folder is needed
        table.write_text(CSV)
    else:
        named = CSV.replace("a.png", "a/c.png").replace("b.png", "b/c.png").replace("\nb,", "\nb/c,")
        table.write_text(named.replace("/", "\\") if kind == "backslashes" else named)
    convert(images, masks, tmp_path / "x.json", classes=table)
    assert classes_of(tmp_path / "x.json") == EXPECTED


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_name_that_may_be_several_images_is_refused(tmp_path, is_folder):
    images, masks = folders(tmp_path)
    for folder in (images, masks):
        (folder / "b").mkdir()
        (folder / "b.png").rename(folder / "b" / "a.png")
    table = tmp_path / "classes"
    if is_folder:
        table.mkdir()
        (table / "a.json").write_text(json.dumps(EXPECTED[0]))
    else:
        table.write_text("image,id,class\na.png,2,tumour\n")
    with pytest.raises(ValueError, match="a may be the image a or b/a; expected names with their folders"):
        convert(images, masks, tmp_path / "x.json", classes=table)


def test_folders_are_classes(tmp_path):
    images, masks = folders(tmp_path)
    by_class = tmp_path / "by_class"
    for name, numbers in (("tumour", {"a": (2,), "b": (9,)}), ("lymphocyte", {"a": (5, 9)})):
        (by_class / name).mkdir(parents=True)
        for image, those in numbers.items():
            Image.fromarray(np.where(np.isin(LABELS, those), LABELS, 0)).save(by_class / name / f"{image}.png")
    convert(images, by_class, tmp_path / "x.json", classes="folders")
    assert classes_of(tmp_path / "x.json") == [{2: "tumour", 5: "lymphocyte", 9: "lymphocyte"}, {9: "tumour"}]
    Image.fromarray(PICTURE[::-1]).save(images / "c.png")
    with pytest.raises(ValueError, match="missing|there are no masks|no partner|c.png"):
        convert(images, by_class, tmp_path / "x.json", classes="folders")
    with pytest.raises(ValueError, match="expected a folder with a folder of masks for each class, got none"):
        convert(images, images, tmp_path / "x.json", classes="folders")


def test_what_is_exported_for_qupath_is_read_back(tmp_path):
    """Polygons with holes, and their classes, pixel by pixel."""
    images, _ = folders(tmp_path)
    masks = MaskCrops.from_label_image(LABELS)
    cells = Cells(masks.windows.float(), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 3, 2]), masks)
    names = ("tumour", "lymphocyte", "stroma")
    for name in "ab":
        save_results(cells, PICTURE, tmp_path / "q", name, ["geojson"], category_names=names)
    colour = json.loads((tmp_path / "q" / "a.geojson").read_text())["features"][1]["properties"]["classification"]
    assert colour == {"name": "stroma", "color": [0, 158, 115]}
    assert main(["convert", str(images), str(tmp_path / "q"), "-o", str(tmp_path / "x.json")]) == 0
    assert classes_of(tmp_path / "x.json") == [{2: "tumour", 5: "stroma", 9: "lymphocyte"}] * 2
    (tmp_path / "q" / "b.geojson").unlink()
    with pytest.raises(ValueError, match=r"b.png: there is no file \*.geojson of it"):
        convert_geojson(images, tmp_path / "q", tmp_path / "x.json")


def feature(coordinates, kind="Polygon", **properties):
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def test_objects_of_qupath(tmp_path):
    square = [[[2, 3], [6, 3], [6, 8], [2, 8], [2, 3]]]
    file = tmp_path / "a.geojson"
    region = feature([[[0, 0], [30, 0], [30, 20], [0, 0]]], objectType="annotation", classification={"name": "Region"})
    cell = feature(square, objectType="cell", classification={"names": ["Tumor", "Positive"]})
    file.write_text(json.dumps({"type": "FeatureCollection", "features": [region, cell]}))
    (found,) = read_geojson(file, (24, 32))
    assert found.category == "Tumor: Positive" and found.mask.sum() == 20 and found.mask[3:8, 2:6].all()
    file.write_text(json.dumps([region, feature([square, [[[9, 9], [12, 9], [12, 12], [9, 12]]]], "MultiPolygon")]))
    assert [one.category for one in read_geojson(file, (24, 32))] == ["Region", None]  # without cells, annotations
    for wrong, message in (
        (feature([1, 2], "Point"), "feature 0: expected a Polygon or MultiPolygon, got Point"),
        (feature([[[1, 2], [3, "x"], [4, 5]]]), "its coordinates are no rings of points x, y"),
        (feature([[[50, 50], [60, 50], [60, 60]]]), "has no pixel in the image of 24 x 32"),
        (feature(square, classification={"name": 3}), "expected a classification with a name"),
        (3, "expected GeoJSON features"),
    ):
        file.write_text(json.dumps([wrong]))
        with pytest.raises(ValueError, match=message):
            read_geojson(file, (24, 32))

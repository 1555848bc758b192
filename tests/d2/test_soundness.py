"""Bad data is found before the training, all at once, and left out with --skip-bad."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from kg_detectron.d2 import register_cells
from kg_detectron.d2.training_check import check_datasets
from kg_detectron.io.coco import coco_annotation
from kg_detectron.io.normalisation import Normalisation

NAME = "/cells/of_the_soundness_tests.json"  # datasets may be named by a file
SIDE = 32


def cell(index: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[2 + 9 * index : 10 + 9 * index, 4:12] = True
    return mask


@pytest.fixture
def content(tmp_path) -> dict:
    """A COCO dataset of five images with three cells each; images/0.png to images/4.png are there."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for image_id in range(5):
        cv2.imwrite(str(tmp_path / "images" / f"{image_id}.png"), rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8))
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": SIDE, "width": SIDE})
        for index in range(3):
            number = 3 * image_id + index + 1
            annotations.append(coco_annotation(cell(index), image_id=image_id, annotation_id=number, category_id=7))
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "nucleus"}]}


@pytest.fixture
def register(tmp_path):
    def registered(content: dict) -> None:
        (tmp_path / "cells.json").write_text(json.dumps(content))
        register_cells(NAME, str(tmp_path / "cells.json"), str(tmp_path / "images"))

    yield registered
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def spoil(content: dict, folder: Path) -> None:
    """Images 0, 1 and 2, one cell of image 3 and two of image 4, and a cell of no image."""
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])
    content["images"][1]["width"] = SIDE + 1
    for annotation in content["annotations"][3:6]:
        annotation["segmentation"]["size"] = [SIDE, SIDE + 1]
    (folder / "2.png").unlink()
    content["annotations"][9]["bbox"][2] = 0
    content["annotations"][12]["bbox"][0] += 9
    content["annotations"][13]["category_id"] = 8
    content["annotations"].append({**content["annotations"][14], "id": 99, "image_id": 50})


def test_all_faults_are_named_at_once(content, register, tmp_path, caplog):
    spoil(content, tmp_path / "images")
    register(content)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=f"{NAME}: .*--skip-bad") as error:
        check_datasets([NAME], skip_bad=False, folder=tmp_path / "sound")
    for kind in ("unreadable file (1)", "missing image (1)", "box without area (1)", "mask misses its box (1)"):
        assert kind in str(error.value)
    named = "\n".join(record.getMessage() for record in caplog.records)
    for what in ("0.png: ", "1.png: ", "2.png: ", "annotation 10: ", "annotation 13: ", "annotation 14: ", "99: "):
        assert what in named
    assert "(32, 32)" in named  # the size of 1.png, as it is
    assert not (tmp_path / "sound").exists()


def test_going_on_without_what_is_bad(content, register, tmp_path, caplog):
    content["annotations"][14]["iscrowd"] = 1
    spoil(content, tmp_path / "images")
    register(content)
    with caplog.at_level(logging.WARNING):
        check_datasets([NAME, NAME], skip_bad=True, folder=tmp_path / "sound")
    assert "without 3 of 5 images and 14 of 16 cells" in caplog.text
    records = DatasetCatalog.get(NAME)
    assert [Path(record["file_name"]).name for record in records] == ["3.png", "4.png"]
    assert [[c["bbox"] for c in record["annotations"]] for record in records] == [
        [[4, 11, 8, 8], [4, 20, 8, 8]],
        [],
    ]
    # What the COCO evaluator will read is the same set.
    assert MetadataCatalog.get(NAME).json_file == str(tmp_path / "sound" / "_cells_of_the_soundness_tests.json")
    truth = COCO(MetadataCatalog.get(NAME).json_file)
    assert sorted(truth.getImgIds()) == [3, 4] and truth.getCatIds() == [7]
    assert sorted((a["image_id"], a["iscrowd"]) for a in truth.anns.values()) == [(3, 0), (3, 0)]
    assert Path(MetadataCatalog.get(NAME).image_root) == tmp_path / "images"


def test_what_is_only_odd_does_not_stop_a_training(content, register, tmp_path, caplog):
    """An image without cells, and one that comes twice."""
    content["annotations"] = content["annotations"][3:]
    (tmp_path / "images" / "1.png").write_bytes((tmp_path / "images" / "2.png").read_bytes())
    register(content)
    with caplog.at_level(logging.INFO):
        check_datasets([NAME], skip_bad=False, folder=tmp_path / "sound")
    assert "0.png" in caplog.text and "2.png" in caplog.text
    assert MetadataCatalog.get(NAME).json_file == str(tmp_path / "cells.json")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_can_be_mended_is_mended_in_a_copy(content, register, tmp_path, caplog, skip_bad):
    """Annotation ids from 0, which COCO's evaluation takes for missed cells, and a category that nothing uses."""
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    del content["annotations"][3]["area"]
    content["categories"].insert(0, {"id": 0, "name": "cells"})
    register(content)
    with caplog.at_level(logging.WARNING):
        check_datasets([NAME], skip_bad=skip_bad, folder=tmp_path / "sound")
    assert "the id 0" in caplog.text and "no annotation is of the category cells" in caplog.text
    truth = COCO(MetadataCatalog.get(NAME).json_file)
    assert truth.getCatIds() == [7] and sorted(truth.getAnnIds()) == list(range(1, 16))
    assert {cell["category_id"] for record in DatasetCatalog.get(NAME) for cell in record["annotations"]} == {0}


def test_crowds_stop_a_training(content, register, tmp_path, caplog):
    for annotation in content["annotations"][:6]:
        annotation["iscrowd"] = 1
    register(content)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"crowd annotations \(1\).*--skip-bad"):
        check_datasets([NAME], skip_bad=False, folder=tmp_path / "sound")
    assert "6 of 15 annotations are crowds, which training leaves out; CVAT writes brush masks so" in caplog.text


@pytest.mark.parametrize("skip_bad", [False, True])
def test_categories_of_one_name_stop_a_training(content, register, tmp_path, caplog, skip_bad):
    content["categories"].append({"id": 9, "name": "nucleus"})
    content["annotations"][4]["category_id"] = 9
    register(content)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"categories of one name \(1\)"):
        check_datasets([NAME], skip_bad=skip_bad, folder=tmp_path / "sound")
    assert "7 and 9 are both called 'nucleus'" in caplog.text and "--merge-categories" in caplog.text


def test_several_categories_are_named_and_trained(content, register, tmp_path, caplog):
    content["categories"].append({"id": 9, "name": "mitosis"})
    content["annotations"][4]["category_id"] = 9
    register(content)
    with caplog.at_level(logging.INFO):
        check_datasets([NAME], skip_bad=False, folder=tmp_path / "sound")
    assert "2 categories, nucleus (14), mitosis (1)" in caplog.text
    assert {cell["category_id"] for record in DatasetCatalog.get(NAME) for cell in record["annotations"]} == {0, 1}


def test_images_that_the_normalisation_cannot_take(content, register, tmp_path, caplog):
    image = np.random.default_rng(1).integers(0, 4000, (SIDE, SIDE)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "images" / "2.png"), image)
    register(content)
    check_datasets([NAME], skip_bad=False, folder=tmp_path / "sound")  # the normalisation is not known
    check_datasets([NAME], False, tmp_path / "sound", Normalisation("percentile"))
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"no fixed white level \(1\)"):
        check_datasets([NAME], False, tmp_path / "sound", Normalisation("fixed"))
    assert "2.png: " in caplog.text and "INPUT.NORMALISATION percentile" in caplog.text
    check_datasets([NAME], True, tmp_path / "sound", Normalisation("fixed"))
    assert len(DatasetCatalog.get(NAME)) == 4


def test_nothing_sound(content, register, tmp_path):
    for image in content["images"]:
        image["height"] = 0
    register(content)
    with pytest.raises(ValueError, match=r"cells\.json: no image is sound"):
        check_datasets([NAME], skip_bad=True, folder=tmp_path / "sound")

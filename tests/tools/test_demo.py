"""What `make demo` does where Detectron2 is missing, and its picture."""

import dataclasses

import demo
import make_synthetic
import numpy as np
import pytest
from builders import load_config

from kg_detectron.inference import load_model
from kg_detectron.io.coco import load_coco
from kg_detectron.io.images import read_image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_synthetic.main(
        ["--kind", "nuclei", "--train", "4", "--val", "3", "--size", "80", "64", "--cells", "2", "4"]
        + ["--seed", "0", "--output", str(root)]
    )
    return root / "synthetic"


def test_trains_as_the_command_does(data, tmp_path):
    found = demo.with_the_core(data, tmp_path, iterations=2)
    images = [record["image_id"] for record in load_coco(data / "instances_val.json", data / "val").records]
    assert list(found["keypoint graph"]) == images
    preprocessing = load_model(tmp_path / "model.safetensors").preprocessing
    assert preprocessing.resize == "isotropic" and len(preprocessing.diameters) == 5


@pytest.mark.detectron2
def test_the_network_is_that_of_the_config():
    from kg_detectron.d2.config import method_settings

    expected = method_settings(load_config("kg_r18_synthetic_plus_cpu"))
    network = demo.small_network(14.0).settings
    assert dataclasses.replace(network, preprocessing=expected.preprocessing) == expected


def test_the_demos_picture_shows_the_best_detections(data, tmp_path):
    """As many as there are cells: the true masks are drawn, a false one of a lower score is not."""
    dataset = load_coco(data / "instances_val.json", data / "val")
    truth = {r["image_id"]: [(1.0, a["segmentation"]) for a in r["annotations"]] for r in dataset.records}
    worse = {i: [(0.1, m[0][1]), *m] for i, m in truth.items()}
    demo.draw(dataset, {"a": truth, "b": worse, "c": {}}, tmp_path / "picture.png")
    picture = read_image(tmp_path / "picture.png")
    columns = np.split(picture, 5, axis=1)
    assert picture.shape[0] == demo.PICTURES * (3 * 80 + 32)
    image, cells, same, best, nothing = (column[28 : 28 + 240] for column in columns)  # the first row, no caption
    assert np.array_equal(cells, same) and np.array_equal(cells, best)
    assert np.array_equal(image, nothing) and not np.array_equal(image, cells)

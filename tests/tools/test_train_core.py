"""The plain training loop of tools/, which `make demo` runs where Detectron2 is missing, and the demo's picture."""

import demo
import make_synthetic
import numpy as np
import pytest
import torch
import train_core

from kg_detectron.inference import load_model
from kg_detectron.io.coco import load_coco
from kg_detectron.io.images import read_image
from kg_detectron.modeling import KeypointGraphNet


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_synthetic.main(
        ["--kind", "nuclei", "--train", "4", "--val", "3", "--size", "80", "64", "--cells", "2", "4"]
        + ["--seed", "0", "--output", str(root)]
    )
    return root / "synthetic"


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    corners = [
        [float(c[0]), float(r[0]), float(c[-1] + 1), float(r[-1] + 1)]
        for c, r in ((m.any(0).nonzero()[:, 0], m.any(1).nonzero()[:, 0]) for m in masks)
    ]
    return torch.tensor(corners).reshape(-1, 4)


def test_examples_and_flips_keep_boxes_on_masks(data):
    record = load_coco(data / "instances_train.json", data / "train").records[0]
    model = KeypointGraphNet.build(train_core.settings(64)).with_preprocessing(size=(48, 96))
    image, target = train_core.load_example(model, record)
    assert image.shape == (3, 48, 96) and len(target["boxes"]) == len(record["annotations"])
    assert torch.equal(target["boxes"], tight_boxes(target["masks"]))
    for axis in (1, 2):
        mirrored, other = train_core.flipped(image, target, axis)
        assert torch.equal(mirrored, image.flip(axis))
        assert torch.equal(other["boxes"], tight_boxes(other["masks"]))
        assert not torch.equal(other["boxes"], target["boxes"])


def test_trains_saves_and_scores(data, tmp_path, capsys):
    options = ["--output", str(tmp_path), "--iterations", "3", "--batch-size", "2", "--size", "32"]
    train_core.main([str(data), *options])
    assert "IoU 0.5: box_ap" in capsys.readouterr().out
    model = load_model(tmp_path / "model_final.pth")
    assert model.preprocessing.size == (32, 32)
    fresh = KeypointGraphNet.build(train_core.settings(32))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


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

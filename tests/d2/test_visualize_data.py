"""tools/visualize_data.py: the pictures show what the training sees."""

import cv2
import numpy as np
import pytest
import torch
import visualize_data
from builders import CONFIGS, nuclei_dataset
from detectron2.data import DatasetCatalog, MetadataCatalog

CONFIG = str(CONFIGS / "kg_lite_synthetic_cpu.yaml")


@pytest.fixture
def options(tmp_path):
    name = str(nuclei_dataset(tmp_path / "data", images=2))
    yield ["--config-file", CONFIG, "--output-dir", str(tmp_path / "out"), "DATASETS.TRAIN", f"('{name}',)"]
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("source", ["dataloader", "annotation"])
def test_pictures_are_written(options, tmp_path, source, capsys):
    visualize_data.main([*options, "--source", source, "--count", "2"])
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 2 and "2 pictures" in capsys.readouterr().out
    pictures = [cv2.imread(str(file)) for file in files]
    if source == "annotation":
        assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 2  # --scale 2
    yellow = (0, 255, 255)  # BGR
    assert all((picture == yellow).all(axis=2).any() for picture in pictures)


def test_boxes_keypoints_and_masks_lie_on_the_cell():
    image, mask = np.zeros((60, 80, 3), np.float32), np.zeros((1, 60, 80), bool)
    mask[0, 20:41, 30:51] = True
    picture = visualize_data.draw((image, torch.tensor([[30.0, 20.0, 51.0, 41.0]]), mask), scale=2)
    assert picture.shape == (120, 160, 3)
    inside, outside = picture[50:56, 70:76].max(axis=2), picture[90:, 110:]
    assert inside.min() > 0 and outside.max() == 0
    for x, y in ((30, 20), (50, 20), (30, 40), (50, 40), (40, 30)):  # tl, tr, bl, br, centre
        blue, green, red = picture[2 * y + 1, 2 * x + 1].astype(int)
        assert red > 150 and green > 150 and blue < 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["DATASETS.TRAIN", "('nowhere.json',)"], "dataset nowhere.json: there is no such file"),
        (["DATASETS.TRAIN", "('cells',)"], "no dataset is called 'cells'"),
        (["NO_SUCH", "1"], "Non-existent key: NO_SUCH"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--count", "0"], "--count: expected 1 or more, got 0"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(options, changes, message, capsys):
    with pytest.raises(SystemExit) as stop:
        visualize_data.main([*options, *changes])
    assert stop.value.code == 2 and message in capsys.readouterr().err

"""A user's own images and label images: convert, train, predict without Detectron2, evaluate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import compare  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402

from kg_detectron.cli.main import main  # noqa: E402
from kg_detectron.d2 import register_files  # noqa: E402
from kg_detectron.inference import load_model, predict  # noqa: E402
from kg_detectron.io.images import read_image, write_png  # noqa: E402
from kg_detectron.io.labels import write_label_image  # noqa: E402
from kg_detectron.synthetic import nuclei_image  # noqa: E402

SMALL = ["MODEL.DEVICE", "cpu", "INPUT.SIZE", "(64,64)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["MODEL.KEYPOINT_GRAPH.PEAK_THRESHOLD", "0.0", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "3", "SEED", "1"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mine/{train,val}/{images/*.png,masks/*_labels.tif}, and mine/{train,val}.json by the command."""
    mine = tmp_path_factory.mktemp("data") / "mine"
    for seed, split in enumerate(("train", "val")):
        (mine / split / "masks").mkdir(parents=True)
        (mine / split / "images").mkdir()
        rng = np.random.default_rng(seed)
        for index in range(3):
            image, masks = nuclei_image(rng, 64, 64, n=3)
            labels = np.zeros((64, 64), np.uint16)
            for i, mask in enumerate(masks, start=1):
                labels[mask] = i
            write_png(mine / split / "images" / f"{index}.png", image)
            write_label_image(mine / split / "masks" / f"{index}_labels.tif", labels)
        folders = [str(mine / split / kind) for kind in ("images", "masks")]
        assert main(["check-data", *folders]) == 0
        assert main(["convert", *folders, "-o", str(mine / f"{split}.json")]) == 0
    return mine


def test_convert_train_export_predict_evaluate(mine, tmp_path, capsys):
    """The datasets of a run are named by their files, relative to where the command is given."""
    names = {"TRAIN": "train", "VALIDATION": "val", "TEST": "val"}
    datasets = [part for key, split in names.items() for part in (f"DATASETS.{key}", f"('mine/{split}.json',)")]
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file"]
    config = ROOT / "configs" / "kg_r18_synthetic_cpu.yaml"
    command += [str(config), *SMALL, *datasets, "OUTPUT_DIR", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=mine.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in mine.iterdir()) == ["train", "train.json", "val", "val.json"]
    results = tmp_path / "run" / "inference" / "val" / "coco_instances_results.json"
    assert json.loads(results.read_text())

    model_file = tmp_path / "model.safetensors"
    assert main(["export", str(tmp_path / "run"), "-o", str(model_file)]) == 0
    model = load_model(model_file)
    found = []
    for image_id, name in enumerate("012", start=1):
        cells = predict(model, read_image(mine / "val" / "images" / f"{name}.png"))
        columns = cells["boxes"].tolist(), cells["scores"].tolist(), cells["masks"].rle()
        for (x1, y1, x2, y2), score, rle in zip(*columns, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            found.append({"image_id": image_id, "bbox": box, "score": score, "segmentation": rle})
    (tmp_path / "found.json").write_text(json.dumps(found))
    capsys.readouterr()
    figures = tmp_path / "figures.json"
    command = ["evaluate", str(mine / "val.json"), str(tmp_path / "found.json"), "--json", str(figures)]
    assert main(command) == 0
    ours = json.loads(figures.read_text())

    # tools/compare.py, by Detectron2, on the same run and dataset.
    compare.main(
        [str(tmp_path / "run"), "--dataset", str(mine / "val.json"), "--output", str(tmp_path), "--device", "cpu"]
    )
    (theirs,) = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    for iou, values in ours["paper"].items():
        for own, name in (("box_ap", "box_AP"), ("mask_ap", "mask_AP"), ("mean_mask_iou", "IOU")):
            expected = theirs[f"{name}@{iou}"]
            assert (values[own] is None) == (expected is None)
            assert expected is None or 100 * values[own] == pytest.approx(expected, abs=1e-6)
    assert 100 * ours["coco"]["mask"]["ap"] == pytest.approx(theirs["COCO_mask_AP"], abs=1e-6)
    assert 100 * ours["coco"]["box"]["ap"] == pytest.approx(theirs["COCO_box_AP"], abs=1e-6)


def test_only_files_that_exist_are_registered(mine, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        register_files([str(tmp_path / "none.json")])
    register_files([str(mine / "val.json"), "nobody_registered"])
    register_files([str(mine / "val.json")])
    records = DatasetCatalog.get(str(mine / "val.json"))
    assert [Path(record["file_name"]).name for record in records] == ["0.png", "1.png", "2.png"]
    assert "nobody_registered" not in DatasetCatalog
    with pytest.raises(compare.CompareError, match="none.json"):
        compare.load_records(str(tmp_path / "none.json"))

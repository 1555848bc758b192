"""tools/compare.py: its tables, its errors, and both models end to end with random weights."""

import csv
import json
import math
from pathlib import Path

import compare
import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from kg_detectron.d2 import add_kg_config, register_cells

ROOT = Path(__file__).parents[2]
NAME = "compare_test"


def row(**values) -> dict:
    return {"run": "kg", "weights": "model_final.pth"} | dict.fromkeys(compare.HEADINGS, 1.0) | values


# Pure parts


def test_every_column_stands_in_one_table():
    keys = [key for table in compare.TABLES.values() for key in table]
    assert sorted(keys) == sorted(compare.HEADINGS)


def test_markdown():
    rows = [row(**{"mask_AP@0.5": 71.584, "IOU@0.7": math.nan}), row(run="mask_rcnn", seconds_per_image=0.12345)]
    lines = compare.markdown(rows, "dsb2018_val", 134, "cpu with 2 threads").splitlines()
    assert lines[0] == "Dataset dsb2018_val, 134 images; timed on cpu with 2 threads."
    assert "| model | AP@0.5 | AP@0.7 | IOU@0.5 | IOU@0.7 |" in lines
    assert "| kg | 71.58 | 1.00 | 1.00 | n/a |" in lines
    assert "| mask_rcnn | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 0.123 | 1.0 |" in lines
    assert sum(line.startswith("| kg |") for line in lines) == 3
    assert any("at most 10000 detections an image" in line for line in lines)


def test_undefined_figures_are_empty_in_csv_and_null_in_json(tmp_path):
    compare.save(tmp_path, [row(**{"IOU@0.5": math.nan})], "some", 3, "cpu")
    with open(tmp_path / "comparison.csv", newline="") as file:
        (written,) = csv.DictReader(file)
    assert written["IOU@0.5"] == "" and written["IOU@0.7"] == "1.0"
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert report["runs"][0]["IOU@0.5"] is None and report["runs"][0]["run"] == "kg"
    assert (report["dataset"], report["images"], report["coco_max_detections"]) == ("some", 3, 10000)


def test_training_minutes(tmp_path):
    metrics = tmp_path / "metrics.json"
    assert math.isnan(compare.training_minutes(metrics))
    metrics.write_text(
        '{"iteration": 19, "time": 3.0}\n{"iteration": 39, "time": 6.0}\n{"iteration": 39, "segm/AP": NaN}\n'
        '{"iteration": 39, "time": 9.0}\n{"iteration": 49, "time": 6.0}\n{"iteration": 59, "ti'
    )
    assert compare.training_minutes(metrics) == pytest.approx((20 * 3 + 20 * 9 + 10 * 6) / 60)
    metrics.write_text('{"iteration": 39, "segm/AP": 1.0}\n')
    assert math.isnan(compare.training_minutes(metrics))


def test_the_minutes_of_a_confidence_head_count(tmp_path):
    assert compare.fit_minutes(tmp_path) == 0
    (tmp_path / "confidence.json").write_text('{"boxes": 7, "minutes": 2.5}\n')
    assert compare.fit_minutes(tmp_path) == 2.5


def touch(folder: Path, *files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()
    return str(folder)


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    one = touch(tmp_path / "kg" / "seed1", "config.yaml", "model_final.pth")
    two = touch(tmp_path / "mask_rcnn" / "seed1", "config.yaml", "model_final.pth", "model_best.pth")
    assert [run.name for run in compare.find_runs([one, two])] == ["kg/seed1", "mask_rcnn/seed1"]
    assert [run.name for run in compare.find_runs([one])] == ["seed1"]
    assert [run.weights.name for run in compare.find_runs([one, two])] == ["model_final.pth", "model_best.pth"]
    assert [run.weights.name for run in compare.find_runs([two], "model_final.pth")] == ["model_final.pth"]


# End to end


@pytest.fixture
def dataset(tmp_path):
    """Three images of 48 x 64 with two bright cells each, registered as `NAME`."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for image_id in (1, 2, 3):
        image = np.full((48, 64, 3), 20, np.uint8)
        for x, y in ((5, 8), (30, 6 * image_id)):
            mask = np.zeros((48, 64), np.uint8, order="F")
            mask[y : y + 14, x : x + 18] = 1
            image[mask > 0] = 200
            rle = coco_mask.encode(mask)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 7, "iscrowd": 0})
            annotations[-1] |= {"bbox": [x, y, 18, 14], "area": 18 * 14}
            annotations[-1]["segmentation"] = rle | {"counts": rle["counts"].decode()}
        cv2.imwrite(str(tmp_path / "images" / f"{image_id}.png"), image)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 48, "width": 64})
    categories = [{"id": 7, "name": "cell"}]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    register_cells(NAME, str(file), str(tmp_path / "images"))
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(file: str, options: list) -> CfgNode:
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / file), allow_unsafe=False)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.SIZE", (64, 64), *options])
    return cfg


def write_run(folder: Path, cfg: CfgNode) -> str:
    """A run that was never trained: the config and the weights that the model starts with."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict(), "iteration": 39}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text('{"iteration": 39, "time": 1.5}\n')
    return str(folder)


def mask_rcnn(folder: Path) -> str:
    small = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 8]
    small += ["MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]
    small += ["MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    return write_run(folder, config("parts/method/mask_rcnn_fpn.yaml", small))


def keypoint_graph(folder: Path) -> str:
    small = ["MODEL.CELLS.BACKBONE", "resnet18", "MODEL.CELLS.C0_CHANNELS", 4]
    small += ["MODEL.CELLS.WIDTHS", [4, 4, 8, 8], "MODEL.KEYPOINT_GRAPH.HEAD_KERNEL", 3]
    # Weights that a finished run has no use for; building the model for real would download them.
    run = Path(write_run(folder, config("parts/method/kg.yaml", [*small, "MODEL.CELLS.BACKBONE_WEIGHTS", ""])))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("BACKBONE_WEIGHTS: ''", "BACKBONE_WEIGHTS: no such weights"))
    return str(run)


def test_both_models_end_to_end(tmp_path, dataset, capsys):
    runs = [keypoint_graph(tmp_path / "kg"), mask_rcnn(tmp_path / "mask_rcnn")]
    compare.main([*runs, "--dataset", dataset, "--output", str(tmp_path / "out"), "--device", "cpu", "--report"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="card"') == 3 and 'MODELS = ["kg", "mask_rcnn"]' in page
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.startswith(f"Dataset {dataset}, 3 images; timed on cpu")

    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [found["run"] for found in report["runs"]] == ["kg", "mask_rcnn"]
    for found in report["runs"]:
        assert set(found) == {"run", "weights", *compare.HEADINGS}
        assert 0 <= found["mask_AP@0.5"] <= 100 and found["training_minutes"] == 1
        assert 0 < found["dense_GMACs"] <= found["GMACs"] and found["seconds_per_image"] > 0
        assert 0 < found["parameters_M"] < 20
    rcnn = report["runs"][1]
    assert rcnn["dense_GMACs"] < rcnn["GMACs"]  # its ROI heads work on proposals whatever the weights

    predictions = json.loads((tmp_path / "out" / "mask_rcnn" / "predictions.json").read_text())
    assert {found["image_id"] for found in predictions} == {1, 2, 3}
    assert {found["category_id"] for found in predictions} == {7}  # the dataset's id, not the model's class 0
    for found in predictions:
        assert coco_mask.decode(found["segmentation"]).shape == (48, 64)
        assert len(found["bbox"]) == 4 and 0 <= found["score"] <= 1


class Perfect(torch.nn.Module):
    """A detector that knows the dataset."""

    def forward(self, inputs):
        (given,) = inputs
        (record,) = [r for r in DatasetCatalog.get(NAME) if r["image_id"] == given["image_id"]]
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        boxes[:, 2:] += boxes[:, :2]
        masks = np.stack([coco_mask.decode(a["segmentation"]) for a in record["annotations"]])
        instances = Instances((record["height"], record["width"]), pred_boxes=Boxes(boxes))
        instances.pred_masks = torch.from_numpy(masks).bool()
        instances.scores = torch.linspace(0.9, 0.5, len(boxes))
        instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
        return [{"instances": instances}]


def test_perfect_detector_on_some_of_the_images(tmp_path, dataset, monkeypatch):
    run = mask_rcnn(tmp_path / "run")
    load = compare.load_model
    monkeypatch.setattr(compare, "load_model", lambda run, device: (load(run, device)[0], Perfect()))
    compare.main([run, "--dataset", dataset, "--output", str(tmp_path / "out"), "--limit", "2", "--device", "cpu"])
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    percent = [*compare.TABLES["Instance segmentation"], *compare.TABLES["Detection"], "COCO_mask_AP", "COCO_box_AP"]
    assert report["images"] == 2
    assert {key: report["runs"][0][key] for key in percent} == pytest.approx(dict.fromkeys(percent, 100))
    predictions = json.loads((tmp_path / "out" / "run" / "predictions.json").read_text())
    assert [p["bbox"] for p in predictions] == [[5, 8, 18, 14], [30, 6, 18, 14], [5, 8, 18, 14], [30, 12, 18, 14]]


class Classifier(Perfect):
    """A detector that knows the dataset, with the classes long, dark, round."""

    def forward(self, inputs):
        (output,) = super().forward(inputs)
        output["instances"].pred_classes = torch.tensor([1, 2])  # dark, round, as the dataset has them
        return [output]


@pytest.fixture
def classified(dataset):
    """The dataset with the categories round, 7, and dark, 900: of each image the first cell is dark."""
    metadata = MetadataCatalog.get(dataset)
    file, folder = metadata.json_file, metadata.image_root
    content = json.loads(Path(file).read_text())
    content["categories"] = [{"id": 7, "name": "round"}, {"id": 900, "name": "dark"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 900 if annotation["id"] % 2 else 7
    Path(file).write_text(json.dumps(content))
    DatasetCatalog.remove(dataset)
    MetadataCatalog.remove(dataset)
    register_cells(dataset, file, folder)
    return dataset


def test_classes_of_a_run_are_those_of_the_dataset_by_name(tmp_path, classified, monkeypatch, capsys):
    small = ["MODEL.CELLS.BACKBONE", "resnet18", "MODEL.CELLS.C0_CHANNELS", 4, "MODEL.CELLS.WIDTHS", [4, 4, 8, 8]]
    small += ["MODEL.KEYPOINT_GRAPH.HEAD_KERNEL", 3, "MODEL.CELLS.BACKBONE_WEIGHTS", ""]
    cfg = config("parts/method/kg.yaml", [*small, "MODEL.CELLS.CLASSES.NAMES", ["long", "dark", "round"]])
    run, one_class = write_run(tmp_path / "run", cfg), keypoint_graph(tmp_path / "one")
    rest = ["--dataset", classified, "--output", str(tmp_path / "out"), "--device", "cpu"]
    message = fails(capsys, one_class, *rest)
    assert "run one knows the classes cell, and dataset compare_test has cells of round, dark; kg-detectron" in message
    load = compare.load_model
    monkeypatch.setattr(compare, "load_model", lambda run, device: (load(run, device)[0], Classifier()))
    compare.main([run, *rest])
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["runs"][0]["COCO_mask_AP"] == pytest.approx(100)
    predictions = json.loads((tmp_path / "out" / "run" / "predictions.json").read_text())
    assert [found["category_id"] for found in predictions] == [900, 7] * 3


def test_on_one_category_all_classes_count_as_it(tmp_path, dataset, monkeypatch):
    small = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.CELLS.CLASSES.NAMES", ["long", "dark", "round"]]
    run = write_run(tmp_path / "run", config("parts/method/mask_rcnn_fpn_r18.yaml", small))
    load = compare.load_model
    monkeypatch.setattr(compare, "load_model", lambda run, device: (load(run, device)[0], Classifier()))
    compare.main([run, "--dataset", dataset, "--output", str(tmp_path / "out"), "--device", "cpu"])
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["runs"][0]["COCO_mask_AP"] == report["runs"][0]["mask_AP@0.5"] == pytest.approx(100)


# Errors name what is wrong


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        compare.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_faulty_runs_are_named(tmp_path, dataset, capsys):
    rest = ["--dataset", dataset, "--output", str(tmp_path / "out"), "--device", "cpu"]
    empty = touch(tmp_path / "empty")
    assert f"{empty}/config.yaml is missing" in fails(capsys, empty, *rest)
    assert f"{tmp_path}/nowhere/config.yaml is missing" in fails(capsys, str(tmp_path / "nowhere"), *rest)
    bare = touch(tmp_path / "bare", "config.yaml")
    assert f"no weights in {bare}: model_best.pth and model_final.pth missing" in fails(capsys, bare, *rest)
    assert f"no weights in {bare}: mine.pth missing" in fails(capsys, bare, *rest, "--weights", "mine.pth")

    run = mask_rcnn(tmp_path / "run")
    assert f"run {run} is given twice" in fails(capsys, run, run, *rest)
    (tmp_path / "run" / "model_best.pth").write_text("not weights")
    assert f"cannot load {run}/model_best.pth" in fails(capsys, run, *rest)
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "run" / "model_best.pth")
    assert "weights are missing or have another shape" in fails(capsys, run, *rest)
    (tmp_path / "run" / "config.yaml").write_text("VERSION: 2\nMODEL:\n  NO_SUCH_KEY: 1\n")
    message = fails(capsys, run, *rest)
    assert f"cannot use {run}/config.yaml" in message and "NO_SUCH_KEY" in message


def test_faulty_datasets_are_named(tmp_path, capsys):
    run = touch(tmp_path / "run", "config.yaml", "model_final.pth")
    rest = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    message = fails(capsys, run, "--dataset", "dsb2018_vall", *rest)
    assert "unknown dataset 'dsb2018_vall'" in message and "dsb2018_val," in message
    register_cells(NAME, str(tmp_path / "absent.json"), str(tmp_path))
    try:
        assert f"{tmp_path}/absent.json" in fails(capsys, run, "--dataset", NAME, *rest)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    assert "does not go with --limit" in fails(capsys, run, "--dataset", NAME, "--limit", "2", "--report", *rest)
    assert "--limit must be at least 1, got 0" in fails(capsys, run, "--dataset", NAME, "--limit", "0", *rest)

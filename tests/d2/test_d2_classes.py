"""Several classes in Detectron2: names from the data, one number for all models, predictions of the right category."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import load_config, small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from kg_detectron.cells import MaskCrops
from kg_detectron.d2 import CellMapper, register_cells
from kg_detectron.d2.classes import classes_from_datasets, put_classes
from kg_detectron.d2.evaluators import CropCOCOEvaluator
from kg_detectron.io.coco import coco_annotation, write_coco
from kg_detectron.io.images import write_png
from kg_detectron.synthetic import nuclei_image

NAMES = ["round", "dark", "long"]


def write_dataset(folder: Path, categories: list[tuple[int, str]], seed: int = 0) -> str:
    """Two images of drawn nuclei, whose categories come in turn; an id of None is a cell without a category."""
    folder.mkdir()
    rng, records, annotations = np.random.default_rng(seed), [], []
    for image_id in (1, 2):
        image, masks = nuclei_image(rng, 64, 96, 6)
        write_png(folder / f"{image_id}.png", image)
        records.append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 96})
        for mask in masks:
            number = len(annotations) + 1
            id, _ = categories[number % len(categories)]
            annotations.append(coco_annotation(mask, image_id=image_id, annotation_id=number, category_id=id))
    named = [{"id": id, "name": name} for id, name in categories if id is not None]
    write_coco(folder / "cells.json", records, annotations, named, "made by a test")
    return str(folder / "cells.json")


@pytest.fixture
def datasets(tmp_path):
    """A training set of three classes; a test set in other ids and another order, which lacks one."""
    files = {
        "classes_train": write_dataset(tmp_path / "a", [(3, "round"), (7, "dark"), (900, "long"), (None, "")]),
        "classes_test": write_dataset(tmp_path / "b", [(1, "dark"), (2, "round")], seed=1),
    }
    for name, file in files.items():
        register_cells(name, file, str(Path(file).parent))
    yield files
    for name in files:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def configured(*options: object):
    cfg = small_config("DATASETS.TRAIN", ("classes_train",), "DATASETS.TEST", ("classes_test",), *options)
    cfg.DATASETS.VALIDATION = ()
    return cfg


def test_names_come_from_the_data_and_count_for_all_datasets(datasets):
    cfg = configured()
    classes_from_datasets(cfg)
    classes = cfg.MODEL.CELLS.CLASSES
    assert list(classes.NAMES) == NAMES and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert classes.CELLS_OF_CLASS == [3, 3, 3]
    DatasetCatalog.get("classes_test")
    metadata = MetadataCatalog.get("classes_test")
    assert metadata.thing_classes == NAMES and metadata.thing_dataset_id_to_contiguous_id == {1: 1, 2: 0, 3: 2}
    file = json.loads(Path(datasets["classes_test"]).read_text())
    cells = [cell for record in DatasetCatalog.get("classes_test") for cell in record["annotations"]]
    assert [cell["category_id"] for cell in cells] == [{1: 1, 2: 0}[one["category_id"]] for one in file["annotations"]]
    with pytest.raises(ValueError, match=r"MODEL.ROI_HEADS.NUM_CLASSES: expected 3, .* got 5"):
        classes_from_datasets(configured("MODEL.ROI_HEADS.NUM_CLASSES", 5))
    with pytest.raises(ValueError, match="method dcan tells no classes apart, and the data have 3"):
        classes_from_datasets(
            configured("MODEL.META_ARCHITECTURE", "CellInstanceSegmentation", "MODEL.CELLS.METHOD", "dcan")
        )


@pytest.mark.parametrize("method", ["stardist", "cornernet"])
def test_other_methods_train_and_predict_classes(datasets, method):
    small = ["INPUT.SIZE", (64, 96), "MODEL.CELLS.C0_CHANNELS", 4, "MODEL.CELLS.WIDTHS", [4, 6, 8, 8]]
    small += [f"MODEL.{method.upper()}.CHANNELS", 8, "DATASETS.TRAIN", ("classes_train",)]
    small += ["DATASETS.TEST", ("classes_test",), "MODEL.STARDIST.PROBABILITY_THRESHOLD", 0.1]
    cfg = load_config(f"{method}_synthetic_cpu", *small)
    cfg.DATASETS.VALIDATION = ()
    classes_from_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    assert model.network.classes.names == tuple(NAMES) and model.network.classes.cells_of_class == (3, 3, 3)
    records = DatasetCatalog.get("classes_train")
    batch = [CellMapper(cfg, is_train=False, with_targets=True)(record) for record in records]
    losses = model(batch)  # with cells of no known class
    sum(losses.values()).backward()
    of_classes = [p for name, p in model.network.named_parameters() if model.network.of_classes(name)]
    assert of_classes and all(p.grad.abs().sum() > 0 for p in of_classes)
    if method == "stardist":  # whose stars would be smaller than pixels
        torch.nn.init.constant_(model.network.heads.distance.bias, 6.0)
    (output,) = model.eval()([CellMapper(cfg, is_train=False)(records[0])])
    labels = output["instances"].pred_classes
    assert len(labels) > 0 and set(labels.tolist()) <= {0, 1, 2}


def test_the_keypoint_graph_trains_and_predicts_classes(datasets):
    cfg = configured()
    classes_from_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    records = DatasetCatalog.get("classes_train")
    batch = [CellMapper(cfg, is_train=False, with_targets=True)(record) for record in records]
    assert {-1, 0, 1, 2} == {int(label) for mapped in batch for label in mapped["instances"].gt_classes}
    losses = model(batch)
    assert float(losses["loss_class"].detach()) > 0
    sum(losses.values()).backward()
    (output,) = model.eval()([CellMapper(cfg, is_train=False)(records[0])])
    labels = output["instances"].pred_classes
    assert len(labels) > 3 and set(labels.tolist()) <= {0, 1, 2}
    assert model.network.description()["settings"]["classes"]["names"] == NAMES


def test_mask_rcnn_has_as_many_classes_and_needs_one_of_each_cell(datasets):
    options = ["DATASETS.TRAIN", ("classes_test",), "DATASETS.TEST", ("classes_test",), "INPUT.SIZE", (64, 96)]
    cfg = load_config("mask_rcnn_fpn_r18_dsb2018_cpu", *options)
    cfg.DATASETS.VALIDATION = ()
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    classes_from_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    model = build_model(cfg).train()
    mapper = CellMapper(cfg, is_train=False, with_targets=True)
    with EventStorage():
        losses = model([mapper(DatasetCatalog.get("classes_test")[0])])
    assert all(loss.isfinite() for loss in losses.values())
    with pytest.raises(ValueError, match="some of its cells have no category"):
        [mapper(record) for record in DatasetCatalog.get("classes_train")]


def test_perfect_predictions_have_an_ap_of_100(datasets, tmp_path):
    """Also of a file whose ids, and order, are not those of the model, and which lacks one of its classes."""
    cfg = configured()
    classes_from_datasets(cfg)
    records = DatasetCatalog.get("classes_test")
    evaluator = CropCOCOEvaluator("classes_test", ("bbox", "segm"), output_dir=str(tmp_path), max_dets_per_image=1000)

    def figures(shift: int) -> dict:
        evaluator.reset()
        for record in records:
            masks = MaskCrops.from_rle([cell["segmentation"] for cell in record["annotations"]])
            labels = torch.tensor([(cell["category_id"] + shift) % 2 for cell in record["annotations"]])
            fields = {"pred_boxes": Boxes(masks.windows.float()), "scores": torch.ones(len(masks))}
            found = Instances(masks.size, **fields, pred_classes=labels, pred_masks=masks)
            evaluator.process([record], [{"instances": found}])
        return evaluator.evaluate()["segm"]

    right, wrong = figures(0), figures(1)
    assert right["AP"] == pytest.approx(100) and wrong["AP"] < 50
    assert right["AP-round"] == pytest.approx(100) and right["AP-dark"] == pytest.approx(100)
    assert np.isnan(right["AP-long"])


def test_a_number_without_names_is_refused():
    cfg = small_config("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NUM_CLASSES: expected 1, .* got 3"):
        build_model(cfg)
    put_classes(cfg, NAMES)
    assert len(build_model(cfg).network.classes) == 3

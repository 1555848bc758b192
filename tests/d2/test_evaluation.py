"""The evaluators on synthetic datasets: perfect, absent and imperfect detectors, with and without detectron2._C."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools import mask as coco_mask

from kg_detectron.cells.masks import MaskCrops
from kg_detectron.d2.config import add_kg_config
from kg_detectron.d2.evaluators import PaperEvaluator, build_evaluators, mask_rles

NAME = "evaluation_test"


def crowded_boxes(cells: int) -> list[list[int]]:
    """Boxes x, y, w, h of differing sizes on a grid of 20 columns, not touching."""
    return [[20 * (i % 20) + 1, 20 * (i // 20) + 1, 6 + i % 7, 6 + i % 5] for i in range(cells)]


def write_dataset(folder: Path, cells: list[int], size: tuple[int, int] = (320, 400), **extra) -> Path:
    """A COCO file of images (ids from 1) with so many rectangular cells each; `extra` goes into every annotation."""
    images, annotations = [], []
    for image_id, count in enumerate(cells, start=1):
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": size[0], "width": size[1]})
        for x, y, w, h in crowded_boxes(count):
            mask = np.zeros(size, np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            rle = coco_mask.encode(mask)
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": [x, y, w, h]}
            annotation |= {
                "area": w * h,
                "iscrowd": 0,
                "segmentation": rle | {"counts": rle["counts"].decode()},
            } | extra
            annotations.append(annotation)
    path = folder / "instances.json"
    categories = [{"id": 1, "name": "cell"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def register(path: Path) -> None:
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    register_coco_instances(NAME, {}, str(path), str(path.parent))


def detections(record: dict, shift: int = 0, limit: int | None = None) -> Instances:
    """Detections equal to an image's ground truth, moved to the right by `shift`, the first `limit` of them."""
    size = record["height"], record["width"]
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32).reshape(-1, 4)[:limit]
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] += shift
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    instances = Instances(size, pred_boxes=Boxes(boxes), pred_masks=masks)
    instances.scores = torch.linspace(0.9, 0.1, len(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return instances


def evaluate(evaluator, shift: int = 0, limit: int | None = None, **arguments) -> dict:
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [{"instances": detections(record, shift, limit)}])
    return evaluator.evaluate(**arguments)


def config(cap: int = 10000):
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.TEST.COCO_MAX_DETECTIONS = cap
    return cfg


def perfect_on_300_cells(folder: str, cap: int) -> dict:
    """AP of boxes and masks; also called in a process without detectron2._C."""
    register(write_dataset(Path(folder), [300, 0, 3]))
    results = evaluate(build_evaluators(config(cap), NAME, folder))
    return {task: results[task]["AP"] for task in ("bbox", "segm")} | dict(results["paper"])


def check_perfect_on_300_cells(results: dict) -> None:
    assert results == pytest.approx(dict.fromkeys(results, 100.0))
    assert len(results) == 8


@pytest.mark.parametrize("cap", [300, 10000])
def test_perfect_detector_on_300_cells(tmp_path, cap):
    check_perfect_on_300_cells(perfect_on_300_cells(str(tmp_path), cap))


def test_perfect_detector_on_300_cells_without_the_compiled_part(tmp_path):
    script = (
        "import sys, json; sys.modules['detectron2._C'] = None\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]\n"
        "from detectron2.evaluation import coco_evaluation\n"
        "assert coco_evaluation.COCOeval_opt is coco_evaluation.COCOeval\n"
        "import test_evaluation\n"
        f"print(json.dumps(test_evaluation.perfect_on_300_cells({str(tmp_path)!r}, 10000)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_perfect_on_300_cells(json.loads(done.stdout.splitlines()[-1]))


def test_cap_at_detectron2s_default_is_what_we_avoid(tmp_path):
    results = perfect_on_300_cells(str(tmp_path), 100)
    assert results["bbox"] < 40 and results["segm"] < 40  # 103 of the 303 cells
    assert results["box_AP@0.5"] == results["mask_AP@0.7"] == 100


def test_cap_below_ten_is_an_error(tmp_path):
    register(write_dataset(tmp_path, [1]))
    with pytest.raises(ValueError, match="COCO_MAX_DETECTIONS must be at least 10, got 5"):
        build_evaluators(config(5), NAME)


def test_half_found(tmp_path):
    register(write_dataset(tmp_path, [10]))
    results = evaluate(build_evaluators(config(), NAME), limit=5)
    assert results["paper"]["box_AP@0.5"] == results["paper"]["mask_AP@0.7"] == pytest.approx(50)
    assert results["paper"]["IOU@0.5"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100 * 51 / 101)  # COCO samples the curve at 101 recalls, 0 included


def test_shifted_by_one_pixel_is_measured_in_the_frame_of_the_ground_truth(tmp_path):
    register(write_dataset(tmp_path, [1]))  # one box of 6 x 6: IoU 5/7
    results = evaluate(PaperEvaluator(NAME, [0.5, 5 / 7, 0.75]), shift=1)["paper"]
    assert results["box_AP@0.5"] == results["mask_AP@0.5"] == 100
    assert results["box_AP@0.714286"] == results["mask_AP@0.714286"] == 100
    assert results["box_AP@0.75"] == results["mask_AP@0.75"] == 0
    assert results["IOU@0.5"] == pytest.approx(100 * 5 / 7)
    assert math.isnan(results["IOU@0.75"])


def test_no_detections_at_all(tmp_path):
    register(write_dataset(tmp_path, [4, 2]))
    results = evaluate(build_evaluators(config(), NAME), limit=0)
    assert math.isnan(results["bbox"]["AP"])
    assert results["paper"]["box_AP@0.5"] == results["paper"]["mask_AP@0.5"] == 0
    assert math.isnan(results["paper"]["IOU@0.5"])


def test_images_never_processed_count_unless_left_out(tmp_path):
    register(write_dataset(tmp_path, [6, 6]))
    record = DatasetCatalog.get(NAME)[0]

    def figures(**arguments):
        evaluators = build_evaluators(config(), NAME)
        evaluators.reset()
        evaluators.process([record], [{"instances": detections(record)}])
        results = evaluators.evaluate(**arguments)
        return results["paper"]["box_AP@0.5"], results["bbox"]["AP50"], results["segm"]["AP50"]

    assert figures() == pytest.approx((50, 100 * 51 / 101, 100 * 51 / 101))
    assert figures(img_ids=[record["image_id"]]) == pytest.approx((100, 100, 100))


def test_reset_forgets(tmp_path):
    register(write_dataset(tmp_path, [6]))
    evaluator = PaperEvaluator(NAME)
    evaluate(evaluator)
    evaluator.reset()
    assert evaluator.evaluate()["paper"]["box_AP@0.5"] == 0


def test_processes_together_give_what_one_gives(tmp_path, monkeypatch):
    register(write_dataset(tmp_path, [9, 4, 7]))
    records = DatasetCatalog.get(NAME)
    alone = evaluate(PaperEvaluator(NAME), shift=2)
    parts = [PaperEvaluator(NAME), PaperEvaluator(NAME)]
    for i, record in enumerate(records):
        parts[i % 2].process([record], [{"instances": detections(record, shift=2)}])
    monkeypatch.setattr(comm, "gather", lambda data, dst: [part._predictions for part in parts])
    assert parts[0].evaluate() == alone
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() == {}


class Crops(MaskCrops):
    """Crops of masks that would be too large to iterate."""

    def __iter__(self):
        raise AssertionError("whole masks were asked for")


def test_masks_that_encode_themselves_are_not_made_whole(tmp_path):
    register(write_dataset(tmp_path, [5]))
    record = DatasetCatalog.get(NAME)[0]
    instances = detections(record)
    instances.pred_masks = Crops.from_rle([a["segmentation"] for a in record["annotations"]])
    evaluator = PaperEvaluator(NAME)
    evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["paper"]["mask_AP@0.7"] == 100


def test_encoded_masks_decode_to_themselves():
    masks = torch.rand(3, 17, 23) > 0.5
    for kind in (masks, masks.numpy(), list(masks)):
        assert np.array_equal(np.stack([coco_mask.decode(r) for r in mask_rles(kind)]), masks.numpy().astype(np.uint8))
    assert mask_rles(masks[:0]) == []


POLYGONS = [[1, 1, 7, 1, 7, 7, 1, 7]]  # x 1, y 1, w 6, h 6
RUN_LENGTHS = {"size": [320, 400], "counts": [321, *[6, 314] * 5, 6, 320 * 400 - 321 - 6 * 6 - 5 * 314]}


@pytest.mark.parametrize("segmentation", [POLYGONS, RUN_LENGTHS], ids=["polygons", "run lengths"])
def test_every_spelling_of_a_mask(tmp_path, segmentation):
    register(write_dataset(tmp_path, [1], segmentation=segmentation))
    assert evaluate(PaperEvaluator(NAME, [0.999]))["paper"]["mask_AP@0.999"] == 100


def test_bad_ground_truth_is_named(tmp_path):
    register(write_dataset(tmp_path, [2], segmentation=None))
    with pytest.raises(ValueError, match=rf"annotation 0 of .*1\.png in '{NAME}' has no segmentation"):
        PaperEvaluator(NAME)
    register(write_dataset(tmp_path, [2], iscrowd=1))
    with pytest.raises(ValueError, match=rf"annotation 0 of .*1\.png in '{NAME}' is a crowd"):
        PaperEvaluator(NAME)


def test_bad_predictions_are_named(tmp_path):
    register(write_dataset(tmp_path, [2]))
    record = DatasetCatalog.get(NAME)[0]
    instances = detections(record)
    with pytest.raises(ValueError, match=rf"image_id 99 is not in the dataset '{NAME}'"):
        PaperEvaluator(NAME).process([record | {"image_id": 99}], [{"instances": instances}])
    instances.remove("pred_masks")
    with pytest.raises(ValueError, match="no pred_masks"):
        PaperEvaluator(NAME).process([record], [{"instances": instances}])


def test_annotation_ids_that_coco_cannot_take_are_numbered_anew(tmp_path):
    """An annotation of id 0 counts as missed in COCO's evaluation."""
    path = write_dataset(tmp_path, [5])
    data = json.loads(path.read_text())
    for annotation in data["annotations"]:
        annotation["id"] -= 1
    path.write_text(json.dumps(data))
    register(path)
    assert evaluate(build_evaluators(config(), NAME))["segm"]["AP"] == pytest.approx(100)

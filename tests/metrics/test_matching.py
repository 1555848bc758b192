"""Matching at IoU thresholds, DSB score, panoptic quality, AJI, Dice and COCO AP: stored figures and plain loops."""

import doctest
import importlib
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kg_detectron.metrics import DSB_IOUS, AreaMetrics, CocoMetrics, MatchingMetrics, match

FIGURES = json.loads((Path(__file__).parent / "stardist_figures.json").read_text())


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def encoded_cells(labels: np.ndarray) -> list[dict]:
    return [encode(labels == label) for label in np.unique(labels[labels > 0])]


def drawn_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two label images (96,96): discs, and the same discs shifted, resized, some left out and some made up."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    pair = np.zeros((2, 96, 96), np.int64)
    for label in range(1, int(rng.integers(8, 26))):
        centre, radius = rng.integers(5, 91, 2), int(rng.integers(3, 10))
        shift, growth, fate = rng.integers(-2, 3, 2), int(rng.integers(-1, 2)), int(rng.integers(10))
        if fate != 0:
            pair[0][(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = label
        if fate != 1:
            centre, radius = centre + shift, radius + growth
            pair[1][(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = label
    return pair[0], pair[1]


def measured(metrics, pairs: list[tuple[list[dict], list[dict]]]) -> dict:
    for gt, found in pairs:
        metrics.update(gt, found)
    return metrics.compute()


def test_figures_equal_those_of_stardist():
    """stardist_figures.json: stardist.matching.matching_dataset on `drawn_pair` of the seeds, pooled and by image."""
    pairs = [drawn_pair(seed) for seed in FIGURES["seeds"]]
    assert zlib.crc32(np.array(pairs, dtype="<i8").tobytes()) == FIGURES["crc32"], "other images than those evaluated"
    ious = [float(iou) for iou in FIGURES["pooled"]]
    figures = measured(MatchingMetrics(ious), [(encoded_cells(gt), encoded_cells(found)) for gt, found in pairs])
    assert figures.keys() == FIGURES["pooled"].keys()
    names = {
        "precision": "precision",
        "recall": "recall",
        "f1": "f1",
        "accuracy": "accuracy",
        "sq": "mean_matched_score",
        "pq": "panoptic_quality",
    }
    for iou, own in figures.items():
        pooled = FIGURES["pooled"][iou]
        assert (own["tp"], own["fp"], own["fn"]) == (pooled["tp"], pooled["fp"], pooled["fn"]), iou
        for name, theirs in names.items():
            assert own[name] == pytest.approx(pooled[theirs], abs=1e-6), (iou, name)
        assert own["dsb_score"] == pytest.approx(FIGURES["by_image"][iou]["accuracy"], abs=1e-6), iou


# The matching


def all_matchings(overlap: np.ndarray, iou: float):
    """Every one-to-one set of pairs that overlap enough, by trying all."""
    rows, columns = overlap.shape
    for partners in itertools.product(range(-1, columns), repeat=rows):
        chosen = [(r, c) for r, c in enumerate(partners) if c >= 0]
        if len({c for _, c in chosen}) == len(chosen) and all(overlap[r, c] >= iou for r, c in chosen):
            yield chosen


@given(
    st.tuples(st.integers(0, 4), st.integers(0, 4)).flatmap(
        lambda shape: arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.61, 0.9, 1.0]))
    ),
    st.sampled_from([0.3, 0.5, 0.6]),
)
def test_matching_is_the_best_of_all(overlap, iou):
    rows, columns = match(overlap, iou)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert pairs == sorted(pairs) and pairs in [sorted(chosen) for chosen in all_matchings(overlap, iou)]
    worth = max((len(m), round(sum(overlap[p] for p in m), 9)) for m in all_matchings(overlap, iou))
    assert (len(pairs), round(sum(overlap[p] for p in pairs), 9)) == worth


def test_thousands_of_cells_with_rivals():
    count = 3000
    overlap = np.zeros((2 * count, count))
    overlap[np.arange(2 * count), np.arange(2 * count) // 2] = np.tile([0.6, 0.8], count)
    rows, columns = match(overlap, 0.5)
    assert rows.tolist() == list(range(1, 2 * count, 2)) and columns.tolist() == list(range(count))


def test_thresholds_are_inclusive_decimals():
    assert DSB_IOUS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    line = np.zeros((1, 20), bool)
    gt, found = line.copy(), line.copy()
    gt[0, :10], found[0, :7] = True, True  # IoU 7/10
    figures = measured(MatchingMetrics(DSB_IOUS), [([encode(gt)], [encode(found)])])
    assert [figures[f"{iou:g}"]["tp"] for iou in (0.65, 0.7, 0.75)] == [1, 1, 0]


def test_figures_without_base_are_nan_and_empty_images_do_not_count():
    cell = np.zeros((4, 4), bool)
    cell[1:3, 1:3] = True
    nothing = measured(MatchingMetrics([0.5]), [([], [])])["0.5"]
    assert nothing["tp"] == nothing["fp"] == nothing["fn"] == 0
    assert all(math.isnan(nothing[name]) for name in ("precision", "recall", "f1", "accuracy", "sq", "pq", "dsb_score"))
    missed = measured(MatchingMetrics([0.5]), [([encode(cell)], []), ([], [])])["0.5"]
    assert missed["recall"] == missed["f1"] == missed["pq"] == missed["dsb_score"] == 0
    assert math.isnan(missed["precision"]) and math.isnan(missed["sq"])
    both = measured(MatchingMetrics([0.5]), [([encode(cell)], [encode(cell)]), ([], []), ([], [encode(cell)])])["0.5"]
    assert both["dsb_score"] == 0.5 and both["accuracy"] == 0.5 and both["precision"] == 0.5 and both["recall"] == 1
    assert all(math.isnan(value) for value in measured(AreaMetrics(), [([], [])]).values())
    assert measured(AreaMetrics(), [([], [encode(cell)])]) == {"aji": 0, "foreground_dice": 0}
    with pytest.raises(ValueError, match="ious"):
        MatchingMetrics([0.5, 0.5])
    with pytest.raises(ValueError, match="one size"):
        MatchingMetrics().update([encode(cell)], [encode(cell[:2])])


# Areas


def aji_by_loops(gt: np.ndarray, found: np.ndarray) -> float:
    """Kumar et al. 2017, algorithm 1, on masks (M,H,W) and (D,H,W)."""
    common = union = 0
    used = set()
    for cell in gt:
        best, best_iou = None, 0.0
        for k, other in enumerate(found):
            iou = (cell & other).sum() / max((cell | other).sum(), 1)
            if iou > best_iou:
                best, best_iou = k, iou
        if best is None:
            union += cell.sum()
        else:
            common += (cell & found[best]).sum()
            union += (cell | found[best]).sum()
            used.add(best)
    union += sum(other.sum() for k, other in enumerate(found) if k not in used)
    return common / union if union else math.nan


masks_5x6 = st.integers(0, 4).flatmap(lambda n: arrays(bool, (n, 5, 6)))


@given(st.lists(st.tuples(masks_5x6, masks_5x6), max_size=3))
def test_aji_and_dice_of_any_masks_equal_plain_loops(images):
    figures = measured(AreaMetrics(), [([encode(m) for m in gt], [encode(m) for m in found]) for gt, found in images])
    ajis = [aji_by_loops(gt, found) for gt, found in images]
    ajis = [aji for aji in ajis if not math.isnan(aji)]
    expected = sum(ajis) / len(ajis) if ajis else math.nan
    assert figures["aji"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    foregrounds = [(gt.any(axis=0), found.any(axis=0)) for gt, found in images]
    common = sum((g & p).sum() for g, p in foregrounds)
    total = sum(g.sum() + p.sum() for g, p in foregrounds)
    assert figures["foreground_dice"] == pytest.approx(2 * common / total if total else math.nan, nan_ok=True)


def test_more_than_255_cells_and_large_areas():
    """pycocotools counts lists of masks in 8 bits; the sum of these areas does not fit 32."""
    rows = np.zeros((300, 300), bool)
    cells = []
    for row in range(300):
        rows[:] = False
        rows[row] = True
        cells.append(encode(rows))
    assert measured(AreaMetrics(), [(cells, cells)]) == {"aji": 1, "foreground_dice": 1}
    huge = {"size": [50000, 50000], "counts": [0, 2_500_000_000]}
    huge = coco_mask.frPyObjects(huge, 50000, 50000)
    assert measured(AreaMetrics(), [([huge], [huge])]) == {"aji": 1, "foreground_dice": 1}


# COCO


def scored_image(seed: int) -> tuple:
    """gt_boxes, gt_masks, boxes, scores, masks; boxes are not quite the masks'."""
    rng = np.random.default_rng(seed)
    gt, found = map(encoded_cells, drawn_pair(seed))
    boxes = np.array([coco_mask.toBbox(mask) for mask in found])
    boxes += rng.uniform(0, 0.5, boxes.shape)
    gt_boxes = np.array([coco_mask.toBbox(mask) for mask in gt])
    gt_boxes[:, 2:] += gt_boxes[:, :2]
    boxes[:, 2:] += boxes[:, :2]
    return gt_boxes, gt, boxes, rng.uniform(0, 1, len(found)), found


@pytest.mark.parametrize("cap", [3, 100])
def test_coco_ap_equals_pycocotools_on_json(cap, tmp_path):
    """The figures of pycocotools' own way: annotations and results from JSON files, its table of twelve."""
    images = [scored_image(seed) for seed in range(4)]
    metrics = CocoMetrics(cap)
    ground_truth, results = [], []
    for image_id, (gt_boxes, gt, boxes, scores, found) in enumerate(images, start=1):
        metrics.update(gt_boxes, gt, boxes, scores, found)
        common = {"image_id": image_id, "category_id": 1}
        for target, own_boxes, own in ((ground_truth, gt_boxes, gt), (results, boxes, found)):
            for (x1, y1, x2, y2), rle in zip(own_boxes.tolist(), own, strict=True):
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
                target.append({**common, "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": segmentation})
                target[-1] |= {"id": len(target), "area": int(coco_mask.area(rle)), "iscrowd": 0}
        for result, score in zip(results[-len(found) :], scores, strict=True):
            result["score"] = float(score)
    dataset = {
        "images": [{"id": image_id, "height": 96, "width": 96} for image_id in range(1, 5)],
        "annotations": ground_truth,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(dataset))
    (tmp_path / "results.json").write_text(json.dumps(results))
    figures = metrics.compute()
    reference = COCO(str(tmp_path / "gt.json"))
    for kind, own in (("bbox", figures["box"]), ("segm", figures["mask"])):
        evaluation = COCOeval(reference, reference.loadRes(str(tmp_path / "results.json")), kind)
        evaluation.params.maxDets = [1, cap, 100] if cap != 100 else [1, 10, 100]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, 0, 0, evaluation.params.maxDets.index(cap)]
        assert own["ap"] == pytest.approx(precision.mean(), abs=1e-9)
        assert own["ap50"] == pytest.approx(precision[0].mean(), abs=1e-9)
        assert own["ap75"] == pytest.approx(precision[5].mean(), abs=1e-9)
        if cap == 100:
            evaluation.summarize()
            assert [own["ap"], own["ap50"], own["ap75"]] == pytest.approx(evaluation.stats[:3].tolist(), abs=1e-9)
        assert 0 < own["ap"] < 1


def test_a_perfect_detector_has_coco_ap_1_on_200_cells():
    labels = np.arange(1, 201).reshape(10, 20).repeat(2, axis=0).repeat(2, axis=1)
    cells = encoded_cells(labels)
    boxes = np.array([coco_mask.toBbox(mask) for mask in cells])
    boxes[:, 2:] += boxes[:, :2]
    for cap, expected in ((10000, 1.0), (100, 0.505)):
        metrics = CocoMetrics(cap)
        metrics.update(boxes, cells, boxes, np.linspace(1, 0, 200), cells)
        assert metrics.compute()["mask"]["ap"] == pytest.approx(expected, abs=1e-3)


def test_coco_of_nothing_and_of_bad_input():
    empty = np.zeros((0, 4)), [], np.zeros((0, 4)), np.zeros(0), []
    metrics = CocoMetrics()
    metrics.update(*empty)
    assert all(math.isnan(value) for kind in metrics.compute().values() for value in kind.values())
    gt_boxes, gt, *_ = scored_image(0)
    metrics.update(gt_boxes, gt, *empty[2:])
    assert metrics.compute() == {kind: {"ap": 0, "ap50": 0, "ap75": 0} for kind in ("box", "mask")}
    with pytest.raises(ValueError, match="max_detections"):
        CocoMetrics(0)
    with pytest.raises(ValueError, match="one length"):
        metrics.update(gt_boxes, gt, gt_boxes, np.ones(1), gt)


@pytest.mark.parametrize("seed", range(3))
def test_coco_ap_of_equal_scores_equals_pycocotools_to_the_last_digit(seed):
    """faster-coco-eval ranks detections of equal scores as pycocotools does, and leaves nothing out."""
    metrics = CocoMetrics()
    for image in range(3):
        gt_boxes, gt, boxes, scores, detections = scored_image(3 * seed + image)
        metrics.update(gt_boxes, gt, boxes, scores.round(1), detections)
    figures = metrics.compute()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        sides = []
        for annotations in (metrics._ground_truths, metrics._detections):
            side = COCO()
            side.dataset = {
                "images": metrics._images,
                "annotations": [dict(one) for one in annotations],
                "categories": [{"id": 1, "name": "cell"}],
            }
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, kind)
        evaluation.params.useCats, evaluation.params.maxDets = 0, [10000]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"].reshape(10, -1)
        assert figures[name] == {"ap": precision.mean(), "ap50": precision[0].mean(), "ap75": precision[5].mean()}


@pytest.mark.parametrize("module", ["iou", "aji", "coco", "matching", "paper", "scoring"])
def test_the_examples_run(module):
    failures, _ = doctest.testmod(importlib.import_module(f"kg_detectron.metrics.{module}"))
    assert failures == 0

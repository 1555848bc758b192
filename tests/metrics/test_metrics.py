"""The paper's metrics against the published evaluation and against plain nested loops."""

import math
import re

import numpy as np
import pytest
from builders import golden_files, golden_id, read_json
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from kg_detectron.metrics import PaperMetrics, average_precision, box_iou, mask_iou

SIZE = 14, 16
IOUS = (0.25, 0.5, 0.8)


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


# Golden parity


@pytest.mark.parametrize("path", golden_files("evaluation_*.json"), ids=golden_id)
def test_figures_of_the_published_evaluation(path):
    golden = read_json(path)
    metrics = PaperMetrics([float(iou) for iou in golden["expected"]])
    for image in golden["images"]:
        gt, pred = image["gt"], image["pred"]
        metrics.update(
            [cell["box_y1x1y2x2"] for cell in gt],
            [cell["segmentation"] for cell in gt],
            [cell["box_y1x1y2x2"] for cell in pred],
            [cell["score"] for cell in pred],
            [cell["segmentation"] for cell in pred],
        )
    figures = metrics.compute()
    assert figures.keys() == golden["expected"].keys() and len(figures) == 10
    for iou, expected in golden["expected"].items():
        assert figures[iou] == pytest.approx(expected, abs=1e-6), iou


# Against an oracle of plain loops


@st.composite
def cells(draw, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` cells: boxes (n,4), some without area, and masks (n,H,W) that need not fill or keep to their box."""
    boxes, masks = [], []
    for _ in range(draw(st.integers(0, most))):
        x1, y1 = draw(st.integers(0, 10)), draw(st.integers(0, 8))
        x2, y2 = x1 + draw(st.integers(0, 6)), y1 + draw(st.integers(0, 6))
        mask = np.zeros(SIZE, bool)
        shift = draw(st.integers(0, 2))
        mask[y1 + shift : y2 + shift, x1:x2] = True
        boxes.append([x1, y1, x2, y2])
        masks.append(mask)
    return np.array(boxes, dtype=float).reshape(-1, 4), np.array(masks, dtype=bool).reshape(-1, *SIZE)


@st.composite
def images(draw, tied: bool) -> list[tuple]:
    """One to four images (gt_boxes, gt_masks, boxes, scores, masks); scores distinct over all, or of three values."""
    found = [(*draw(cells(5)), *draw(cells(6))) for _ in range(draw(st.integers(1, 4)))]
    total = sum(len(boxes) for _, _, boxes, _ in found)
    if tied:
        scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=total, max_size=total))
    else:
        scores = [rank / total for rank in draw(st.permutations(range(total)))]
    result = []
    for gt_boxes, gt_masks, boxes, masks in found:
        result.append((gt_boxes, gt_masks, boxes, np.array(scores[: len(boxes)]), masks))
        scores = scores[len(boxes) :]
    return result


def measure(found: list[tuple], ious=IOUS) -> dict:
    metrics = PaperMetrics(ious)
    for gt_boxes, gt_masks, boxes, scores, masks in found:
        metrics.update(gt_boxes, [encode(m) for m in gt_masks], boxes, scores, [encode(m) for m in masks])
    return metrics.compute()


def overlap_of_boxes(a, b) -> tuple[float, float]:
    """Intersection, and intersection over union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = width * height if width > 0 and height > 0 else 0
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both, both / either if either else 0


def overlap_of_masks(a, b) -> float:
    either = sum(1 for y in range(SIZE[0]) for x in range(SIZE[1]) if a[y, x] or b[y, x])
    both = sum(1 for y in range(SIZE[0]) for x in range(SIZE[1]) if a[y, x] and b[y, x])
    return both / either if either else 0


def oracle(found: list[tuple], threshold: float, kind: str) -> tuple[float, float]:
    """AP and the mean IoU of the true positives, detection by detection."""
    detections = []  # score, true positive, IoU
    positives = 0
    for gt_boxes, gt_masks, boxes, scores, masks in found:
        positives += len(gt_boxes)
        taken = set()
        for d in sorted(range(len(boxes)), key=lambda d: -scores[d]):  # sorted is stable
            best, best_iou = None, 0.0
            for g in range(len(gt_boxes)):
                both, iou = overlap_of_boxes(boxes[d], gt_boxes[g])
                if kind == "mask":
                    iou = overlap_of_masks(masks[d], gt_masks[g]) if both > 0 else 0.0
                if iou > best_iou:
                    best, best_iou = g, iou
            hit = best is not None and best_iou >= threshold and best not in taken
            if hit:
                taken.add(best)
            detections.append((scores[d], hit, best_iou))
    detections.sort(key=lambda detection: -detection[0])
    ious = [iou for _, hit, iou in detections if hit]
    mean = sum(ious) / len(ious) if ious else math.nan
    if positives == 0:
        return math.nan, mean
    curve = []  # recall, precision
    for n in range(1, len(detections) + 1):
        hits = sum(hit for _, hit, _ in detections[:n])
        curve.append((hits / positives, hits / n))
    area, before = 0.0, 0.0
    for n, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[n:])
        before = recall
    return area, mean


@pytest.mark.parametrize("tied", [False, True], ids=["distinct scores", "equal scores"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_figures_of_plain_loops(tied, data):
    found = data.draw(images(tied))
    figures = measure(found)
    for iou in IOUS:
        box_ap, _ = oracle(found, iou, "box")
        mask_ap, mean_mask_iou = oracle(found, iou, "mask")
        expected = {"box_ap": box_ap, "mask_ap": mask_ap, "mean_mask_iou": mean_mask_iou}
        assert figures[f"{iou:g}"] == pytest.approx(expected, nan_ok=True, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(found=images(tied=False), random=st.randoms())
def test_order_of_images_and_detections_does_not_matter(found, random):
    shuffled = []
    for gt_boxes, gt_masks, boxes, scores, masks in found:
        order = list(range(len(boxes)))
        random.shuffle(order)
        shuffled.append((gt_boxes, gt_masks, boxes[order], scores[order], masks[order]))
    random.shuffle(shuffled)
    before, after = measure(found), measure(shuffled)
    for iou in before:
        assert after[iou] == pytest.approx(before[iou], nan_ok=True, abs=1e-12)


# What the definitions say


def square(x: int, y: int, side: int = 4) -> tuple[list[int], np.ndarray]:
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return [x, y, x + side, y + side], mask


def test_perfect_detector_on_300_cells_gives_exactly_one():
    size = 320, 400
    boxes = np.array([[20 * (i % 20), 20 * (i // 20), 20 * (i % 20) + 9, 20 * (i // 20) + 7] for i in range(300)])
    masks = []
    for x1, y1, x2, y2 in boxes:
        mask = np.zeros(size, np.uint8)
        mask[y1:y2, x1:x2] = 1
        masks.append(encode(mask))
    metrics = PaperMetrics((0.5, 1.0))
    metrics.update(boxes, masks, boxes[::-1], np.linspace(0, 1, 300), masks[::-1])
    one = {"box_ap": 1.0, "mask_ap": 1.0, "mean_mask_iou": 1.0}
    assert metrics.compute() == {"0.5": one, "1": one}


def test_no_second_best():
    (left, left_mask), (right, right_mask), (between, between_mask) = square(0, 0), square(2, 0), square(0, 0)
    # Both detections overlap the left cell best, and the right one by 1/3.
    found = [([left, right], [left_mask, right_mask], [left, between], [0.9, 0.8], [left_mask, between_mask])]
    figures = measure(found, (0.3,))["0.3"]
    assert figures == {"box_ap": 0.5, "mask_ap": 0.5, "mean_mask_iou": 1.0}


def test_masks_compete_only_where_boxes_meet():
    box, mask = square(0, 0)
    far, _ = square(4, 0)  # touches the box with an intersection of no area
    figures = measure([([box], [mask], [far], [0.9], [mask])], (0.5,))["0.5"]
    assert figures["mask_ap"] == 0 and math.isnan(figures["mean_mask_iou"])


def test_images_without_detections_or_without_cells_count():
    box, mask = square(0, 0)
    nothing = [], []
    full = [box], [mask], [box], [0.5], [mask]
    missed = [box], [mask], [], [], []
    invented = *nothing, [box], [0.9], [mask]
    assert measure([full])["0.5"]["box_ap"] == 1
    assert measure([full, missed])["0.5"]["box_ap"] == 0.5
    assert measure([full, invented])["0.5"]["mask_ap"] == 0.5
    assert measure([full, (*nothing, [], [], [])])["0.5"]["mask_ap"] == 1


def test_undefined_figures_are_nan():
    box, mask = square(0, 0)
    empty = PaperMetrics((0.5,)).compute()["0.5"]
    assert all(math.isnan(value) for value in empty.values()) and len(empty) == 3
    only_missed = measure([([box], [mask], [], [], [])])["0.5"]
    assert only_missed["box_ap"] == only_missed["mask_ap"] == 0 and math.isnan(only_missed["mean_mask_iou"])
    only_invented = measure([([], [], [box], [0.9], [mask])])["0.5"]
    assert all(math.isnan(value) for value in only_invented.values())


def test_boxes_without_area_are_no_hits_and_no_nan():
    thin, mask = [3, 0, 3, 5], square(3, 0)[1]
    figures = measure([([thin], [mask], [thin], [0.9], [mask])], (0.5,))["0.5"]
    assert figures["box_ap"] == figures["mask_ap"] == 0
    assert box_iou([thin], [thin]).tolist() == [[0.0]]


def test_iou_of_empty_masks_is_zero():
    empty = encode(np.zeros(SIZE))
    assert mask_iou([empty], [empty]).tolist() == [[0.0]]
    assert mask_iou([], [empty]).shape == (0, 1)


def test_area_under_the_envelope():
    # Precisions 1, 1/2, 2/3, 1/2, 3/5 at hits 1, 3, 5 of four positives: the envelope there is 1, 2/3, 3/5.
    assert average_precision([0.5, 0.4, 0.3, 0.2, 0.1], [1, 0, 1, 0, 1], 4) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert average_precision([0.5, 0.5], [False, True], 1) == 0.5  # equal scores as given
    assert average_precision([0.5, 0.5], [True, False], 1) == 1


# Bad input

BOX, MASK = square(0, 0)
RLE = encode(MASK)
GOOD = {"gt_boxes": [BOX], "gt_masks": [RLE], "boxes": [BOX], "scores": [0.9], "masks": [RLE]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gt_boxes": [BOX[:3]]}, "gt_boxes must have the shape (number, 4), got (1, 3)"),
        ({"boxes": BOX}, "boxes must have the shape (number, 4), got (4,)"),
        ({"boxes": [[0, 0, math.nan, 4]]}, "boxes must be finite"),
        ({"gt_boxes": [[5, 0, 4, 4]]}, "number 0 is [5.0, 0.0, 4.0, 4.0]"),
        ({"gt_masks": []}, "gt_masks and gt_boxes must have one length, got 0 and 1"),
        ({"masks": [RLE, RLE]}, "masks and boxes must have one length, got 2 and 1"),
        ({"scores": [0.9, 0.1]}, "scores and boxes must have one length, got 2 and 1"),
        ({"scores": [[0.9]]}, "scores must have the shape (number,), got (1, 1)"),
        ({"scores": [-0.1]}, "scores must be finite and at least 0; number 0 is -0.1"),
        ({"scores": [math.nan]}, "scores must be finite and at least 0; number 0 is nan"),
        ({"masks": [encode(np.ones((3, 3)))]}, "masks of one image must have one size"),
        ({"masks": [MASK]}, "masks must be compressed run-length encodings"),
        ({"gt_masks": [{"size": [14, 16], "counts": [224]}]}, "gt_masks must be compressed run-length encodings"),
        ({"gt_masks": [{"counts": RLE["counts"]}]}, "gt_masks must be compressed run-length encodings"),
    ],
)
def test_bad_input_is_named_and_adds_nothing(bad, message):
    metrics = PaperMetrics((0.5,))
    metrics.update(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        metrics.update(**(GOOD | bad))
    assert metrics.compute()["0.5"] == {"box_ap": 1.0, "mask_ap": 1.0, "mean_mask_iou": 1.0}


@pytest.mark.parametrize("ious", [(), (0.5, 0.5), (0.0,), (1.5,), (math.nan,)])
def test_bad_thresholds(ious):
    with pytest.raises(ValueError, match="ious must be distinct numbers above 0 and at most 1"):
        PaperMetrics(ious)

"""Figures of several classes against plain loops, and from files."""

import itertools
import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from kg_detectron.cli import main
from kg_detectron.export.label_images import write_labels
from kg_detectron.io.coco import rle_annotation, write_coco
from kg_detectron.metrics import ClassMetrics
from kg_detectron.metrics.scoring import evaluate, report
from kg_detectron.report.tables import metric_tables

NAMES = ["round", "dark", "long"]


def encode(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def drawn(seed: int, empty: str = ""):
    """Masks and classes of truth and prediction: discs, some of them shifted, made up, left out or of another class."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    taken = np.zeros((2, 96, 96), bool)
    sides = ([], []), ([], [])
    for _ in range(20):
        centre, radius, label = rng.integers(6, 90, 2), int(rng.integers(3, 9)), int(rng.integers(1, 4))
        shift, fate = rng.integers(-1, 2, 2), int(rng.integers(10))
        for side, (place, kept) in enumerate(((centre, fate != 0), (centre + shift, fate != 1))):
            disc = ((y - place[0]) ** 2 + (x - place[1]) ** 2 <= radius**2) & ~taken[side]
            if kept and disc.any() and not (empty == "truth" and side == 0) and not (empty == "found" and side == 1):
                taken[side] |= disc
                sides[side][0].append(disc)
                sides[side][1].append(label if side == 0 or fate < 7 else label % 3 + 1)
    return sides


IMAGES = [drawn(0), drawn(1), drawn(2, "found"), drawn(3, "truth")]
# Of one image, classes that are not known.
IMAGES[1][0][1][0] = IMAGES[1][0][1][2] = 0


def boxes(masks):
    sides = [(mask.any(0), mask.any(1)) for mask in masks]
    return [[x.argmax(), y.argmax(), 96 - x[::-1].argmax(), 96 - y[::-1].argmax()] for x, y in sides]


def computed() -> dict:
    metrics = ClassMetrics(NAMES)
    for (masks, classes), (found, predicted) in IMAGES:
        scores = np.linspace(0.9, 0.1, len(found))
        rles = [encode(m) for m in masks], [encode(m) for m in found]
        metrics.update(boxes(masks), rles[0], boxes(found), scores, rles[1], classes, predicted)
    return metrics.compute()


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def known(image):
    """The cells of known class, and the detections that do not pair with others."""
    (masks, classes), (found, predicted) = image
    unknown = [mask for mask, label in zip(masks, classes, strict=True) if label == 0]
    left_out = {d for d, mask in enumerate(found) if any(iou(mask, other) > 0.5 for other in unknown)}
    truth = [(m, c) for m, c in zip(masks, classes, strict=True) if c]
    return truth, [(m, c) for d, (m, c) in enumerate(zip(found, predicted, strict=True)) if d not in left_out]


def quality(truth: list, found: list) -> tuple[int, int, int, float]:
    """TP, FP, FN, sum of IoU. Masks of one side do not overlap, so that those of an IoU above 0.5 pair."""
    overlaps = [value for one, other in itertools.product(truth, found) if (value := iou(one, other)) > 0.5]
    return len(overlaps), len(found) - len(overlaps), len(truth) - len(overlaps), sum(overlaps)


def pq(tp: int, fp: int, fn: int, overlap: float) -> float:
    return overlap / (tp + 0.5 * fp + 0.5 * fn) if tp + fp + fn else math.nan


def of_class(cells: list, c: int) -> list:
    return [mask for mask, label in cells if label == c]


def test_pq_of_conic_and_pannuke_by_plain_loops():
    figures = computed()
    images = [known(image) for image in IMAGES]
    of_conic = []
    per_image = [[] for _ in images]
    for c, name in enumerate(NAMES, start=1):
        total = np.zeros(4)
        values = []
        for i, (truth, found) in enumerate(images):
            counts = quality(of_class(truth, c), of_class(found, c))
            total += counts
            if of_class(truth, c):  # PanNuke: a class that the ground truth lacks is left out
                values.append(pq(*counts))
                per_image[i].append(pq(*counts))
        of_conic.append(pq(*total))
        one = figures["per_class"][name]
        assert (one["cells"], one["detections"]) == (total[0] + total[2], total[0] + total[1])
        assert one["pq"] == pytest.approx(of_conic[-1]) and one["pq_image"] == pytest.approx(np.mean(values))
        assert one["sq"] * one["rq"] == pytest.approx(one["pq"])
    assert 0.1 < figures["mpq_plus"] == pytest.approx(np.mean(of_conic))
    assert figures["mpq"] == pytest.approx(np.mean([np.mean(values) for values in per_image if values]))
    binary = [pq(*quality(masks, found)) for (masks, _), (found, _) in IMAGES if masks]
    assert figures["bpq"] == pytest.approx(np.mean(binary))


def test_confusion_and_accuracy_by_plain_loops():
    expected = np.zeros((4, 4), int)
    for image in IMAGES:
        truth, found = known(image)
        for mask, label in truth:
            partner = [c for m, c in found if iou(m, mask) > 0.5]
            expected[label - 1, partner[0] - 1 if partner else 3] += 1
        for mask, label in found:
            expected[3, label - 1] += not any(iou(mask, m) > 0.5 for m, _ in truth)
    figures = computed()
    assert figures["confusion"] == expected.tolist() and expected[:3, :3].sum() > np.trace(expected[:3, :3]) > 10
    assert figures["accuracy"] == pytest.approx(np.trace(expected[:3, :3]) / expected[:3, :3].sum())


def test_f1_of_hover_net_by_plain_loops():
    """Pairs of centroids within 12 pixels of the least sum of distances, by trying: here by SciPy on each image."""
    from scipy.optimize import linear_sum_assignment

    sums = {c: np.zeros(5) for c in (1, 2, 3)}
    pairs = alone = same = 0
    for image in IMAGES:
        truth, found = known(image)
        centres = [[np.argwhere(mask).mean(0) for mask, _ in side] for side in (truth, found)]
        distance = np.array([[math.dist(a, b) for b in centres[1]] for a in centres[0]]).reshape(len(truth), len(found))
        chosen = [(i, j) for i, j in zip(*linear_sum_assignment(distance), strict=True) if distance[i, j] <= 12]
        pairs += len(chosen)
        alone += len(truth) + len(found) - 2 * len(chosen)
        for i, j in chosen:
            one, other = truth[i][1], found[j][1]
            same += one == other
            for c in sums:
                sums[c] += (one == c == other, one != c == other, one == c != other, 0, 0)
        for c in sums:
            sums[c][3] += sum(label == c for j, (_, label) in enumerate(found) if j not in {j for _, j in chosen})
            sums[c][4] += sum(label == c for i, (_, label) in enumerate(truth) if i not in {i for i, _ in chosen})
    figures = computed()
    for c, name in enumerate(NAMES, start=1):
        tp, fp, fn, fp_d, fn_d = sums[c]
        assert figures["per_class"][name]["f1_type"] == pytest.approx(2 * tp / (2 * tp + 2 * fp + 2 * fn + fp_d + fn_d))
    assert figures["f1_detection"] == pytest.approx(2 * pairs / (2 * pairs + alone))
    assert figures["type_accuracy"] == pytest.approx(same / pairs)


def test_ap_of_a_class_is_that_of_its_cells_alone():
    from kg_detectron.metrics import PaperMetrics

    figures = computed()
    for c, name in enumerate(NAMES, start=1):
        metrics = PaperMetrics((0.5,))
        for image in IMAGES:
            truth, found = known(image)
            every = np.linspace(0.9, 0.1, len(image[1][0]))
            scores = [s for s, m in zip(every, image[1][0], strict=True) if any(m is one for one in of_class(found, c))]
            cells, ours = of_class(truth, c), of_class(found, c)
            metrics.update(boxes(cells), list(map(encode, cells)), boxes(ours), scores, list(map(encode, ours)))
        assert figures["per_class"][name]["mask_ap"] == pytest.approx(metrics.compute()["0.5"]["mask_ap"])
    mean = np.mean([one["mask_ap"] for one in figures["per_class"].values()])
    assert figures["mask_ap"] == pytest.approx(mean)


@pytest.mark.parametrize(("gt_classes", "classes"), [([4], [1]), ([-1], [1]), ([1], [0]), ([1, 1], [1])])
def test_classes_out_of_range_are_refused(gt_classes, classes):
    mask = [{"size": [2, 2], "counts": "02"}]
    with pytest.raises(ValueError, match="classes: expected 1 numbers of"):
        ClassMetrics(NAMES).update([[0, 0, 1, 2]], mask, [[0, 0, 1, 2]], [0.9], mask, gt_classes, classes)


def write_dataset(path, side: int, ids: dict[int, int], *, scores: bool = False) -> None:
    """One side of `IMAGES` as COCO; `ids` are those of the classes."""
    images, annotations = [], []
    for image_id, image in enumerate(IMAGES, start=1):
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 96, "width": 96})
        for mask, label in zip(*image[side], strict=True):
            number = len(annotations) + 1
            score = {"score": 1 / number} if scores else {}
            annotation = rle_annotation(encode(mask), image_id=image_id, annotation_id=number, **score)
            annotations.append(annotation | {"category_id": ids.get(label)})
    categories = [{"id": id, "name": NAMES[label - 1]} for label, id in ids.items()]
    write_coco(path, images, annotations, categories, "made by a test")


def test_files_with_other_ids_are_compared_by_name(tmp_path, capsys):
    write_dataset(tmp_path / "truth.json", 0, {1: 900, 2: 3, 3: 7})
    write_dataset(tmp_path / "found.json", 1, {3: 1, 1: 2, 2: 3}, scores=True)
    figures = evaluate(tmp_path / "truth.json", tmp_path / "found.json")
    expected = computed()
    by_name = figures["classes"]["per_class"]
    for name in NAMES:
        assert by_name[name]["pq"] == pytest.approx(expected["per_class"][name]["pq"])
    assert figures["classes"]["names"] == ["dark", "long", "round"]  # by the ids of the ground truth
    assert figures["classes"]["mpq"] == pytest.approx(expected["mpq"]) and by_name["dark"]["mask_ap"] > 0.1
    # Results, whose ids are those of the ground truth.
    results = json.loads((tmp_path / "found.json").read_text())["annotations"]
    for one in results:
        one["category_id"] = {1: 7, 2: 900, 3: 3}[one["category_id"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    again = evaluate(tmp_path / "truth.json", tmp_path / "results.json")
    assert again["classes"] == figures["classes"]
    assert main(["evaluate", str(tmp_path / "truth.json"), str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert "classes.mpq " in printed and "truth \\ predicted" in printed and "PanNuke's mPQ" in printed


def test_label_images_have_their_classes_beside_them(tmp_path):
    """As predict writes them; without scores there is no AP."""
    for side, folder in enumerate(("truth", "found")):
        (tmp_path / folder).mkdir()
        for image_id, image in enumerate(IMAGES, start=1):
            labels, rows = np.zeros((96, 96), np.uint16), ["id,class_id,class"]
            for number, (mask, label) in enumerate(zip(*image[side], strict=True), start=1):
                labels[mask] = 3 * number
                rows.append(f"{3 * number},{label},{NAMES[label - 1] if label else ''}")
            write_labels(tmp_path / folder / f"{image_id}_labels.tif", labels)
            (tmp_path / folder / f"{image_id}_classes.csv").write_text("\n".join(rows) + "\n")
    figures = evaluate(tmp_path / "truth", tmp_path / "found")
    expected = computed()
    assert figures["classes"]["mpq_plus"] == pytest.approx(expected["mpq_plus"])
    assert figures["classes"]["mask_ap"] is None and "n/a" in report(figures)
    (tables,) = [table for table in metric_tables({"kg": figures}) if table.title == "Confusion of classes: kg"]
    order = [NAMES.index(name) for name in figures["classes"]["names"]]
    assert [values[:3] for _, values in tables.rows[:3]] == [
        [str(expected["confusion"][i][j]) for j in order] for i in order
    ]
    assert tables.columns == [*figures["classes"]["names"], "missed"] and tables.rows[3][0] == "no cell"
    titles = [table.title for table in metric_tables({"kg": figures})]
    assert titles[-3:] == ["Over classes (%)", "By class (%)", "Confusion of classes: kg"]


def test_one_class_has_no_figures_by_class(tmp_path):
    labels = np.zeros((8, 8), int)
    labels[2:4, 2:4] = 1
    assert "classes" not in evaluate(labels, labels)

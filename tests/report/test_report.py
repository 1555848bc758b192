"""The page of a comparison: what becomes of cells, curves, outlines, files, and the page in a real browser."""

import json
import math
import re
import xml.etree.ElementTree as ET
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser
import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from kg_detectron.cli.main import _message, main
from kg_detectron.io.cell_sets import ImageCells
from kg_detectron.io.coco import coco_annotation, encode_mask
from kg_detectron.io.scene import ImageChoiceError
from kg_detectron.metrics import PaperMetrics
from kg_detectron.report import model_names, report_dataset
from kg_detectron.report.charts import count_axis
from kg_detectron.report.comparison import Pooled, compare
from kg_detectron.report.outcomes import judge, judge_class, match
from kg_detectron.report.strata import GAP, elongation, strata
from kg_detectron.report.svg_outlines import TOLERANCE, outline

SIZE = 40, 60


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def cells(*masks: np.ndarray, scores: list[float] | None = None, name: str = "a") -> ImageCells:
    boxes = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] for ys, xs in map(np.nonzero, masks)]
    scores = None if scores is None else np.array(scores, dtype=np.float64)
    return ImageCells(name, 1, SIZE, np.array(boxes, dtype=float).reshape(-1, 4), list(map(encode_mask, masks)), scores)


def verdict_of(truth: ImageCells, found: ImageCells, score: float | None = None):
    return judge(truth, found, match(truth, found, [0.5]), 0, score)


# What became of cells and instances

LEFT, RIGHT = rectangle(0, 0, 10, 10), rectangle(10, 0, 20, 10)


def test_one_instance_over_two_cells_is_merged() -> None:
    verdict = verdict_of(cells(LEFT, RIGHT), cells(LEFT | RIGHT))
    assert verdict.merged.tolist() == [True] and verdict.split.tolist() == [False, False]
    assert verdict.found.tolist() == [True]  # an IoU of exactly 0.5 with the first
    # 4 of 10 columns of the right cell are less than half of it.
    assert not verdict_of(cells(LEFT, RIGHT), cells(rectangle(0, 0, 14, 10))).merged.any()
    assert verdict_of(cells(LEFT, RIGHT), cells(rectangle(0, 0, 15, 10))).merged.all()


def test_two_instances_in_one_cell_split_it() -> None:
    verdict = verdict_of(cells(LEFT | RIGHT, rectangle(0, 20, 9, 30)), cells(LEFT, RIGHT))
    assert verdict.split.tolist() == [True, False] and not verdict.merged.any()
    # The second instance leaves the cell by more than half.
    assert not verdict_of(cells(LEFT), cells(rectangle(0, 0, 5, 10), rectangle(8, 0, 20, 10))).split.any()


def test_duplicates_do_not_split() -> None:
    assert not verdict_of(cells(LEFT | RIGHT), cells(LEFT | RIGHT, LEFT)).split.any()
    assert verdict_of(cells(LEFT | RIGHT), cells(LEFT, LEFT, RIGHT)).split.all()


def test_instances_below_the_score_do_not_count() -> None:
    truth, found = cells(LEFT, RIGHT), cells(LEFT, RIGHT, scores=[0.9, 0.2])
    assert verdict_of(truth, found, 0.2).missed.tolist() == [False, False]
    verdict = verdict_of(truth, found, 0.3)
    assert verdict.missed.tolist() == [False, True] and len(verdict.found) == 1
    assert verdict.f1 == pytest.approx(2 / 3)


def test_f1_of_an_image_with_nothing_to_find() -> None:
    assert verdict_of(cells(), cells()).f1 == 1
    assert verdict_of(cells(), cells(LEFT)).f1 == 0
    assert verdict_of(cells(LEFT), cells()).f1 == 0


@given(
    st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=5),
    st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=5),
)
def test_counts_of_any_rectangles(truths: list, founds: list) -> None:
    """Against masks compared pixel by pixel."""
    masks = [[rectangle(x, y, x + w + 1, y + h + 1) for x, y, w, h in own] for own in (truths, founds)]
    verdict = verdict_of(cells(*masks[0]), cells(*masks[1]))
    assert verdict.found.sum() == (~verdict.missed).sum()
    held = [sum(2 * (cell & own).sum() >= cell.sum() for cell in masks[0]) >= 2 for own in masks[1]]
    assert verdict.merged.tolist() == held
    for cell, split in zip(masks[0], verdict.split, strict=True):
        inside = [own for own in masks[1] if 2 * (cell & own).sum() >= own.sum()]
        apart: list[np.ndarray] = []
        for own in inside:
            if all(2 * (own & other).sum() < min(own.sum(), other.sum()) for other in apart):
                apart.append(own)
        assert split == (len(apart) >= 2)


# Curves and the score from which instances count


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12), st.integers(0, 3))
def test_best_score_maximises_f1(instances: list, missed: int) -> None:
    scores = np.array([score / 5 for score, _ in instances])
    hits = np.array([[hit for _, hit in instances]])
    positives = int(hits.sum()) + missed

    def f1(least: float) -> float:
        kept = scores >= least
        return 2 * int(hits[0, kept].sum()) / max(int(kept.sum()) + positives, 1)

    best = Pooled("a", scores, hits, positives).best_score(0)
    assert f1(best) == pytest.approx(max(f1(least) for least in scores))


def test_precision_and_recall() -> None:
    pooled = Pooled("a", np.array([0.5, 0.9, 0.5, 0.1]), np.array([[True, True, False, True]]), 4)
    recall, precision, scores = pooled.precision_recall(0)
    assert scores.tolist() == [0.9, 0.5, 0.1]  # equal scores are one point
    assert recall.tolist() == [0.25, 0.5, 0.75] and precision.tolist() == pytest.approx([1, 2 / 3, 3 / 4])


def test_ap_of_the_curve_is_the_papers(made: dict) -> None:
    """The chart's AP at an IoU is that of the table."""
    text = (made["folder"] / "page.html").read_text(encoding="utf-8")
    paper = PaperMetrics([0.5])
    for truth, found in zip(made["truths"], made["found"], strict=True):
        paper.update(truth.boxes, truth.masks, found.boxes, found.scores, found.masks)
    value = paper.compute()["0.5"]["mask_ap"]
    assert f"<td>{100 * value:.2f}</td>" in text
    (drawn,) = re.findall(r'AP against IoU.*?class="curve" d="M[\d.]+ ([\d.]+)L', text, re.DOTALL)[:1]
    assert float(drawn) == pytest.approx(222 - 210 * value, abs=0.06)


@pytest.mark.parametrize("high", [0, 0.0064, 0.3, 1, 7, 99, 1234])
def test_ticks_reach_the_highest_value(high: float) -> None:
    axis = count_axis("n", high)
    assert axis.high >= high and 2 <= len(axis.ticks) <= 7


# Outlines


def filled(path: str) -> np.ndarray:
    """The pixels inside an SVG path, by the even-odd rule at pixel centres."""
    inside = np.zeros(SIZE, dtype=bool)
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for ring in re.findall(r"M(-?\d+) (-?\d+)l([-\d ]+)z", path):
        steps = np.array(ring[2].split(), dtype=int).reshape(-1, 2)
        points = np.vstack(([int(ring[0]), int(ring[1])], steps)).cumsum(axis=0)
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crosses = (y1 > ys) != (y2 > ys)
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= crosses & (xs < (x2 - x1) * (ys - y1) / (y2 - y1) + x1)
    return inside


def test_outline_encloses_the_pixels() -> None:
    assert outline(np.ones((1, 1), bool), 7, 5).count("l") == 1
    np.testing.assert_array_equal(filled(outline(np.ones((1, 1), bool), 7, 5)), rectangle(7, 5, 8, 6))
    np.testing.assert_array_equal(filled(outline(np.ones((3, 20), bool), 2, 30)), rectangle(2, 30, 22, 33))
    assert outline(np.zeros((4, 4), bool), 0, 0) == ""


@pytest.mark.parametrize("seed", range(5))
def test_outline_of_a_blob_with_a_hole_keeps_to_the_tolerance(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(random.standard_normal(SIZE), (0, 0), 3)
    mask = noise > 0
    mask[[0, -1]] = mask[:, [0, -1]] = False
    wrong = filled(outline(mask, 0, 0)) != mask
    edge = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    assert not wrong[~edge].any() and wrong.sum() < 0.12 * edge.sum()
    assert TOLERANCE < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_class_is_judged_as_by_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    squares = [rectangle(x, y, x + 9, y + 9) for y in range(0, 40, 10) for x in range(0, 60, 10)]
    truths, founds = rng.permutation(24)[:12], rng.permutation(24)[:12]
    truth = replace(cells(*(squares[i] for i in truths)), classes=tuple(rng.choice(["a", "b", ""], 12)))
    scores = np.sort(rng.random(12))[::-1].tolist()
    found = replace(cells(*(squares[i] for i in founds), scores=scores), classes=tuple(rng.choice(["a", "b"], 12)))
    matches = match(truth, found, [0.5])
    verdict = judge(truth, found, matches, 0, scores[9])  # the last two do not count
    for name in ("a", "b", "c"):
        of_class = judge_class(truth, found, matches, 0, verdict, name)
        instances, right, wrong = [], [], []
        for i, place in enumerate(founds[:10]):
            true = truth.classes[list(truths).index(place)] if place in truths else None
            if found.classes[i] == name and true != "":
                instances.append(i)
                (right if true == name else wrong).append(i)
        assert of_class.instances.tolist() == instances
        assert of_class.instances[of_class.verdict.found].tolist() == right
        assert of_class.instances[~of_class.verdict.found].tolist() == wrong
        assert of_class.cells.tolist() == [m for m in range(12) if truth.classes[m] == name]
        taken = [founds[i] for i in right]
        assert of_class.cells[of_class.verdict.missed].tolist() == [m for m in of_class.cells if truths[m] not in taken]


# Strata


def test_elongation_is_length_over_width() -> None:
    assert elongation(np.ones((6, 6), bool)) == pytest.approx(1)
    assert elongation(np.ones((3, 12), bool)) == pytest.approx(4)
    y, x = np.indices((80, 80)) - 40
    along, across = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2)
    assert elongation((along / 30) ** 2 + (across / 10) ** 2 <= 1) == pytest.approx(3, rel=0.02)
    assert elongation(np.ones((1, 1), bool)) == 1 == elongation(np.zeros((2, 2), bool))


def test_strata_are_those_of_plain_loops() -> None:
    near, far = rectangle(21, 0, 25, 30), rectangle(50, 30, 54, 34)
    masks = [LEFT, RIGHT, near, far]
    found = strata([cells(*masks), cells(far)])
    expected = []
    for index, mask in enumerate(masks):
        pixels = [tuple(p) for p in np.argwhere(mask)]
        others = [tuple(p) for i, m in enumerate(masks) if i != index for p in np.argwhere(m)]
        outline = [
            (y, x)
            for y, x in pixels
            if any(
                0 <= a < SIZE[0] and 0 <= b < SIZE[1] and not mask[a, b]
                for a, b in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            )
        ]
        close = [p for p in outline if any(max(abs(p[0] - a), abs(p[1] - b)) <= GAP for a, b in others)]
        expected.append(100 * len(close) / len(outline))
    assert found.crowding.tolist() == pytest.approx([*expected, 0]) and min(expected[:3]) > 10 and expected[3] == 0
    assert found.diameter.tolist() == pytest.approx([math.sqrt(4 * m.sum() / math.pi) for m in (*masks, far)])
    assert found.elongation.tolist() == pytest.approx([1, 1, 7.5, 1, 1])


# From files to the page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Three images: one perfect, one with one error of each kind, one empty; a model with scores and label images."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    lost, apart = rectangle(40, 25, 55, 38), rectangle(0, 20, 20, 30)
    truths = {"good": [LEFT, lost], "bad <b>": [LEFT, RIGHT, apart, lost], "empty": []}
    found = {
        "good": [(LEFT, 0.9), (lost, 0.8)],
        "bad <b>": [(LEFT | RIGHT, 0.7), (rectangle(0, 20, 9, 30), 0.6), (rectangle(9, 20, 20, 30), 0.55)],
        "empty": [],
    }
    images, annotations, results = [], [], []
    for image_id, (name, masks) in enumerate(truths.items(), start=1):
        picture = np.full((*SIZE, 3), 20, np.uint8)
        labels = np.zeros(SIZE, np.uint8)
        for number, mask in enumerate(masks, start=1):
            picture[mask] = 40 * number
            labels[mask] = number
            annotations.append(coco_annotation(mask, image_id=image_id, annotation_id=len(annotations) + 1))
        cv2.imwrite(str(folder / "images" / f"{name}.png"), picture)
        cv2.imwrite(str(folder / "labels" / f"{name}.png"), labels)
        images.append({"id": image_id, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]})
        for mask, score in found[name]:
            entry = coco_annotation(mask, image_id=image_id, annotation_id=1)
            results.append(
                {key: entry[key] for key in ("image_id", "category_id", "segmentation", "bbox")} | {"score": score}
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "model.json").write_text(json.dumps(results))
    predictions = {"mine": folder / "model.json", "perfect": folder / "labels"}
    report_dataset(folder / "truth.json", predictions, folder / "images", folder / "page.html", details=2)
    return {
        "folder": folder,
        "predictions": predictions,
        "truths": [cells(*masks, name=name) for name, masks in truths.items()],
        "found": [cells(*(m for m, _ in own), scores=[s for _, s in own]) for own in found.values()],
    }


def test_same_bytes_twice(made: dict) -> None:
    folder = made["folder"]
    again = folder / "again.html"
    report_dataset(folder / "truth.json", made["predictions"], folder / "images", again, details=2)
    assert again.read_bytes() == (folder / "page.html").read_bytes()
    assert not list(folder.glob(".*"))


def test_page_needs_nothing_else_and_escapes_names(made: dict) -> None:
    text = (made["folder"] / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "bad &lt;b&gt;" in text and "bad <b>" not in text
    assert text.count('class="card"') == 3 and text.count("application/json") == 2


def test_worst_image_first(made: dict) -> None:
    text = (made["folder"] / "page.html").read_text(encoding="utf-8")
    assert re.findall(r'data-name="([^"]*)"', text) == ["bad &lt;b&gt;", "empty", "good"]
    numbers = re.findall(r'data-missed="(\d+)" data-false="(\d+)" data-merged="(\d+)" data-split="(\d+)"', text)
    # LEFT is found by the merged instance at an IoU of 0.5, and the cell below by its larger half.
    assert numbers == [("2", "1", "1", "1"), ("0", "0", "0", "0"), ("0", "0", "0", "0")]


def test_curves_are_sound_svg(made: dict) -> None:
    text = (made["folder"] / "page.html").read_text(encoding="utf-8")
    charts = re.findall(r'<figure class="chart">.*?(<svg viewBox="0 0 380.*?</svg>)', text, re.DOTALL)
    assert len(charts) == 6  # precision and recall, AP, three strata, scores of the model that has some
    for chart in charts:
        assert not re.search(r"\b(nan|inf)\b", chart)
        ET.fromstring(chart)


def test_predictions_without_scores_alone(made: dict, tmp_path: Path) -> None:
    folder = made["folder"]
    page = tmp_path / "page.html"
    report_dataset(folder / "labels", {"labels": folder / "labels"}, folder / "images", page)
    text = page.read_text(encoding="utf-8")
    assert "labels (no scores)" in text and "n/a" in text and "AP against IoU" not in text


def test_command(made: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = made["folder"], tmp_path / "page.html"
    arguments = [str(folder / "truth.json"), str(folder / "model.json"), str(folder / "labels"), "-o", str(page)]
    arguments += ["--images", str(folder / "images"), "--names", "mine", "perfect", "--details", "2"]
    assert main(["report", *arguments]) == 0
    assert page.read_bytes() == (folder / "page.html").read_bytes()
    assert str(page) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--details", "-1"], "--details: expected at least 0, got -1"),
        (["--names", "a", "b"], "--names: expected 1 different names"),
        (["--iou", "2"], "--iou: expected a number above 0 and at most 1, got"),
        (["--iou", "0.5", "0.5"], "got"),
        (["--score", "nan"], "--score: expected a number of 0..1, got nan"),
        (["--score", "2"], "--score: expected a number of 0..1, got 2.0"),
        (["-m", "x.pth"], "--model: needed with --explain only"),
    ],
)
def test_command_names_what_is_wrong(made: dict, tmp_path: Path, capsys, extra: list[str], message: str) -> None:
    folder, page = made["folder"], tmp_path / "page.html"
    arguments = [str(folder / "truth.json"), str(folder / "model.json"), "--images", str(folder / "images")]
    assert main(["report", *arguments, "-o", str(page), *extra]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_option_is_advised_that_the_command_has_not(made: dict, tmp_path: Path, capsys) -> None:
    folder, stack = made["folder"], tmp_path / "stack.tif"
    tifffile.imwrite(stack, np.zeros((2, *SIZE), np.uint8), photometric="minisblack", metadata={"axes": "CYX"})
    foreign = json.loads((folder / "model.json").read_text())
    foreign[0]["image_id"] = 9
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    (tmp_path / "labels").mkdir()
    tifffile.imwrite(tmp_path / "labels" / "good.tif", np.zeros((2, *SIZE), np.uint8), photometric="minisblack")
    arguments = ["--images", str(folder / "images"), "-o", str(tmp_path / "page.html")]
    for command, message in (
        (["report", str(folder / "truth.json"), str(tmp_path / "foreign.json"), *arguments], "by id: 9\n"),
        (["evaluate", str(folder / "truth.json"), str(tmp_path / "labels")], "expected one whole number a pixel"),
    ):
        assert main(command) == 2
        shown = capsys.readouterr().err
        assert message in shown and not re.search("use --|with --|--only-common", shown)
    assert main(["explain", str(stack), "-o", str(tmp_path / "e.png")]) == 2
    assert "choose one with --channels 1\n" in capsys.readouterr().err  # which explain has
    error = ImageChoiceError("a.tif: it has 2 channels", "choose one with --channels 1", "--channels")
    assert _message(error, Namespace(image="a.tif")) == "a.tif: it has 2 channels, and this command has no --channels"


def test_missing_images_are_named(made: dict, tmp_path: Path) -> None:
    folder = made["folder"]
    with pytest.raises(FileNotFoundError, match="3 of 3 images are missing: good, bad <b>, empty"):
        report_dataset(folder / "truth.json", made["predictions"], tmp_path, tmp_path / "page.html")
    cv2.imwrite(str(folder / "images" / "good.tif"), np.zeros(SIZE, np.uint8))
    try:
        with pytest.raises(ValueError, match="both called good"):
            report_dataset(folder / "truth.json", made["predictions"], folder / "images", tmp_path / "page.html")
    finally:
        (folder / "images" / "good.tif").unlink()


def test_some_scores_only() -> None:
    found = [cells(LEFT, scores=[0.5]), cells(LEFT)]
    with pytest.raises(ValueError, match="some images have scores and others have none"):
        compare([cells(LEFT), cells(LEFT)], {"a": found})


def test_names_of_models() -> None:
    assert model_names(["out/comparison/kg/predictions.json", "out/comparison/rcnn/predictions.json"]) == ["kg", "rcnn"]
    assert model_names(["a/kg.json", "a/labels"]) == ["kg", "labels"]
    assert model_names(["a/kg.json"]) == ["kg"]


def test_images_without_cells() -> None:
    comparison = compare([cells(), cells()], {"a": [None, cells(scores=[])]})
    assert [one.f1 for one in comparison.images] == [1, 1]
    assert math.isclose(comparison.pooled[0].positives, 0)


# In a real browser


@pytest.fixture(scope="module")
def window(made: dict) -> Iterator[browser.Browser]:
    reason = browser.missing_browser()
    if reason:
        pytest.skip(reason)
    with browser.Browser() as window:
        yield window


@pytest.fixture
def page(window: browser.Browser, made: dict) -> Iterator[browser.Browser]:
    """The page freshly loaded from disk; no message may be left in the console."""
    window.open(made["folder"] / "page.html")
    yield window
    assert window.errors() == []


PANELS = "return document.querySelectorAll('.card .panel svg').length"
DISPLAY = "return getComputedStyle(document.querySelector(arguments[0])).display"
FIRST = "#cards .card:first-child"
CHOOSE = (
    "const box = document.getElementById(arguments[0]); box.value = arguments[1];box.dispatchEvent(new Event('change'))"
)
SCROLL = "document.documentElement.style.scrollBehavior = 'auto'; document.getElementById('images').scrollIntoView()"


def scroll_to_images(page: browser.Browser) -> None:
    page.run(SCROLL)
    page.wait_for("return document.querySelectorAll('.card .panel svg').length === 8")


def test_panels_are_drawn_when_they_come_near(page: browser.Browser) -> None:
    scroll_to_images(page)
    captions = page.run(f"return [...document.querySelectorAll('{FIRST} figcaption')].map((c) => c.textContent)")
    assert captions == ["Input", "Ground truth, 4 cells", "mine, 3 instances", "perfect, 4 instances"]
    marks = page.run(
        "const model = document.querySelector(arguments[0] + ' [data-model=\"0\"]');"
        "const rings = (kind) => [...model.querySelectorAll('.' + kind + ' .halo')]"
        ".map((path) => path.getAttribute('d').split('M').length - 1);"
        "return ['found', 'false', 'missed', 'merged', 'split'].map(rings)",
        FIRST,
    )
    assert marks == [[2], [1], [2], [1], [1]]
    shown = page.run("return document.querySelector('.card image').getBoundingClientRect().width")
    assert shown > 200


def test_layers_by_mouse_and_by_key(page: browser.Browser) -> None:
    scroll_to_images(page)
    missed, truth = f"{FIRST} .layer.missed", f"{FIRST} [data-model] .layer.truth"
    assert page.run(DISPLAY, missed) == "inline" and page.run(DISPLAY, truth) == "none"
    page.click("[data-layer=missed]")
    assert page.run(DISPLAY, missed) == "none"
    page.type("3")
    assert page.run(DISPLAY, missed) == "inline"
    page.type("7")
    assert page.run(DISPLAY, truth) == "inline"
    page.type("1")
    assert page.run(DISPLAY, f"{FIRST} .layer.image") == "none"
    # A digit typed into the field for names is text.
    page.click("#name")
    page.type("3")
    assert page.run(DISPLAY, missed) == "inline" and page.run("return document.getElementById('name').value") == "3"


def test_order_and_choice(page: browser.Browser) -> None:
    names = "return [...document.querySelectorAll('.card:not([hidden])')].map((card) => card.dataset.name)"
    page.run(CHOOSE, "order", "f1 down")
    assert page.run(names) == ["empty", "good", "bad <b>"]
    page.run(CHOOSE, "order", "cells down")
    assert page.run(names) == ["bad <b>", "good", "empty"]
    page.run(CHOOSE, "only", "merged")
    assert page.run(names) == ["bad <b>"]
    page.click("#name")
    page.type(*"goo")
    assert page.run(names) == [] and page.run("return document.getElementById('count').textContent") == "0 of 3 images"
    assert page.run("return !document.getElementById('none').hidden")


VIEW = "return document.querySelector('#viewer .panel:last-child svg').getAttribute('viewBox').split(' ').map(Number)"


def test_zoom_by_mouse_and_by_key(page: browser.Browser) -> None:
    scroll_to_images(page)
    page.click(f"{FIRST} .enlarge")
    assert page.run("return document.getElementById('viewer').open")
    assert page.run(VIEW) == [0, 0, 60, 40]
    page.type("+")
    assert page.run(VIEW) == pytest.approx([10, 6.67, 40, 26.67], abs=0.02)
    page.type("ArrowRight")
    assert page.run(VIEW)[0] == pytest.approx(14, abs=0.02)
    page.drag("#viewer .panel svg", 50, 0)
    dragged = page.run(VIEW)
    assert dragged[0] < 13 and dragged[2] == pytest.approx(40, abs=0.02)
    page.type("0")
    assert page.run(VIEW) == [0, 0, 60, 40]
    page.wheel("#viewer .panel svg", -200)
    assert 10 < page.run(VIEW)[2] < 50
    page.click("[data-do=whole]")
    assert page.run(VIEW) == [0, 0, 60, 40]
    page.type("4")
    assert page.run(DISPLAY, "#viewer .panels .layer.false") == "none"
    page.type("j")
    assert page.run("return document.getElementById('viewer-title').textContent") == "empty"
    page.type("Escape")
    assert not page.run("return document.getElementById('viewer').open")
    assert page.run("return document.activeElement.className") == "enlarge"


def test_instance_under_the_mouse_is_described(page: browser.Browser) -> None:
    scroll_to_images(page)
    page.click(f"{FIRST} .enlarge")
    page.run(
        "const svg = document.querySelector('#viewer [data-model=\"0\"]');"
        "const at = new DOMPoint(5, 5).matrixTransform(svg.getScreenCTM());"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: at.x, clientY: at.y, bubbles: true}))"
    )
    text = page.run("return document.getElementById('readout').textContent")
    assert text == "mine: score 0.7, IoU 0.5, found, merged"


def test_everything_that_can_be_operated_has_a_name(page: browser.Browser) -> None:
    nameless = page.run(
        "return [...document.querySelectorAll('button, input, select, a, summary, svg[role=img], img')]"
        ".filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('alt') || e.labels?.[0]?.textContent.trim()"
        " || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert nameless == []


def test_nothing_sticks_out_of_a_narrow_window(made: dict) -> None:
    reason = browser.missing_browser()
    if reason:
        pytest.skip(reason)
    with browser.Browser(width=500) as window:
        window.open(made["folder"] / "page.html")
        scroll_to_images(window)
        assert window.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert window.errors() == []


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two images and one model, with the classes round and dark.

    In one image a dark cell is taken for a round one, and a cell of no known class is found.
    """
    folder = tmp_path_factory.mktemp("classes")
    lost = rectangle(40, 25, 55, 38)
    truths = {"both": [(LEFT, 3), (RIGHT, 900), (lost, None)], "round": [(LEFT, 3)], "empty": []}
    found = {"both": [(LEFT, 3, 0.9), (RIGHT, 3, 0.8), (lost, 900, 0.7)], "round": [(LEFT, 3, 0.9)], "empty": []}
    images, annotations, results = [], [], []
    for image_id, (name, own) in enumerate(truths.items(), start=1):
        cv2.imwrite(str(folder / f"{name}.png"), np.full((*SIZE, 3), 90, np.uint8))
        images.append({"id": image_id, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]})
        for mask, category in own:
            entry = coco_annotation(mask, image_id=image_id, annotation_id=len(annotations) + 1)
            annotations.append(entry | {"category_id": category})
        for mask, category, score in found[name]:
            entry = coco_annotation(mask, image_id=image_id, annotation_id=1)
            results.append(entry | {"category_id": category, "score": score})
    categories = [{"id": 3, "name": "round"}, {"id": 900, "name": "dark <i>"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "model.json").write_text(json.dumps(results))
    report_dataset(folder / "truth.json", {"mine": folder / "model.json"}, folder, folder / "page.html", score=0.5)
    return folder / "page.html"


def test_a_class_is_chosen(window: browser.Browser, classified: Path, made: dict) -> None:
    window.open(classified)
    names = "return [...document.querySelectorAll('.card:not([hidden])')].map((card) => card.dataset.name)"
    counts = (
        "return [...document.querySelectorAll('.card[data-name=both] tbody td')].map((cell) => cell.textContent)"
        ".concat(document.querySelector('.card[data-name=both] .cells').textContent)"
    )
    outlines = (
        "const card = document.querySelector('.card[data-name=both]');"
        "return ['found', 'false', 'missed'].map((kind) => "
        "[...card.querySelectorAll(`[data-model] .${kind} .stroke`)]"
        ".map((path) => path.getAttribute('d').split('M').length - 1)[0] ?? 0)"
    )
    captions = "return [...document.querySelectorAll('.card[data-name=both] figcaption')].map((c) => c.textContent)"
    drawn = "return document.querySelectorAll('.card[data-name=both] .panel svg').length === 3"
    window.run(SCROLL)
    window.wait_for(drawn)
    everything = ["1.000", "3", "0", "0", "0", "0", "3"]
    assert window.run(counts) == everything and window.run(outlines) == [3, 0, 0]

    window.run(CHOOSE, "class", "0")
    window.wait_for(drawn)
    assert window.run(names) == ["both", "round"]
    # An instance of the dark cell calls it round: one found, one false.
    assert window.run(counts) == ["0.667", "1", "0", "1", "0", "0", "1"]
    assert window.run(outlines) == [1, 1, 0]
    assert window.run(captions) == ["Input", "Ground truth, 1 round cell", "mine, 2 round instances"]
    window.run(CHOOSE, "only", "missed")
    assert window.run(names) == []
    window.run(CHOOSE, "class", "1")
    window.wait_for(drawn)
    # The dark cell is missed; the instance of the cell of no class is neither found nor false.
    assert window.run(names) == ["both"]
    assert window.run(counts) == ["0.000", "0", "1", "0", "0", "0", "1"] and window.run(outlines) == [0, 0, 1]
    window.run(CHOOSE, "class", "")
    window.run(CHOOSE, "only", "")
    window.wait_for(drawn)
    assert len(window.run(names)) == 3
    assert window.run(counts) == everything and window.run(outlines) == [3, 0, 0]
    window.click(".card[data-name=both] .enlarge")
    window.run(
        "const svg = document.querySelector('#viewer [data-model=\"0\"]');"
        "const at = new DOMPoint(15, 5).matrixTransform(svg.getScreenCTM());"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: at.x, clientY: at.y, bubbles: true}))"
    )
    assert window.run("return document.getElementById('readout').textContent") == "mine: round, score 0.8, IoU 1, found"
    assert window.errors() == []
    text = classified.read_text(encoding="utf-8")
    assert "dark &lt;i&gt;" in text and "dark <i>" not in text
    assert 'id="class"' not in (made["folder"] / "page.html").read_text(encoding="utf-8")

"""tools/figures.py: which rows it shows, and that it draws."""

import json
from pathlib import Path

import cv2
import figures
import numpy as np
import pytest

from kg_detectron.io.cell_sets import ImageCells
from kg_detectron.io.coco import coco_annotation, encode_mask
from kg_detectron.report.comparison import compare

SIZE = 40, 50


def square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


TRUTH = {"a": [square(5, 5, 12), square(25, 20, 12)], "b": [square(10, 10, 10)], "c": []}
FIRST = {"a": [square(5, 5, 10)], "b": [square(10, 10, 9)]}
LAST = {"a": [square(5, 5, 12), square(25, 20, 12)], "b": [square(11, 11, 8)]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three images, and two models as folders of label images."""
    folder = tmp_path_factory.mktemp("figures")
    images, annotations = [], []
    for name in ("images", "first", "last"):
        (folder / name).mkdir()
    for image_id, (name, masks) in enumerate(TRUTH.items(), start=1):
        images.append({"id": image_id, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]})
        cv2.imwrite(str(folder / "images" / f"{name}.png"), np.full((*SIZE, 3), 30 * image_id, np.uint8))
        for mask in masks:
            annotations.append(coco_annotation(mask, image_id=image_id, annotation_id=len(annotations) + 1))
        for model, found in (("first", FIRST), ("last", LAST)):
            labels = sum((i * mask for i, mask in enumerate(found.get(name, []), 1)), np.zeros(SIZE, np.uint8))
            cv2.imwrite(str(folder / model / f"{name}.png"), labels.astype(np.uint8))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "truth.json").write_text(json.dumps(content))
    return {"folder": folder, "truth": folder / "truth.json", "images": folder / "images"}


def run(files: dict[str, Path], figure: str, output: Path, *extra: str) -> None:
    models = [str(files["folder"] / name) for name in ("first", "last")]
    figures.main([figure, str(files["truth"]), *models, "--images", str(files["images"]), "-o", str(output), *extra])


@pytest.mark.parametrize("figure", ["comparison", "cells"])
def test_draws_the_same_bytes(files: dict[str, Path], tmp_path: Path, figure: str) -> None:
    run(files, figure, tmp_path / "one.png", "--count", "2")
    run(files, figure, tmp_path / "two.png", "--count", "2")
    drawn = cv2.imread(str(tmp_path / "one.png"))
    assert drawn.shape[1] > drawn.shape[0] > 300  # two rows of four panels
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def cells(masks: list[np.ndarray], name: str) -> ImageCells:
    boxes = np.zeros((len(masks), 4))
    return ImageCells(name, None, SIZE, boxes, [encode_mask(mask) for mask in masks], None)


def test_rows_stand_at_even_ranks() -> None:
    """Of five images with 0 to 4 of 4 cells found and one without cells."""
    squares = [square(12 * i, 0, 10) for i in range(4)]
    truths = [cells(squares, f"{found} found") for found in range(5)] + [cells([], "none")]
    found = [cells(squares[:number], f"{number} found") for number in range(5)] + [None]
    comparison = compare(truths, {"model": found})
    assert figures.even_choice(comparison, 5) == [f"{number} found" for number in range(5)]
    assert figures.even_choice(comparison, 1) == ["2 found"]
    assert len(figures.even_choice(comparison, 9)) == 5


def test_cells_show_gain_and_loss(files: dict[str, Path]) -> None:
    names = list(TRUTH)
    comparison = compare(
        [cells(TRUTH[name], name) for name in names],
        {key: [cells(of.get(name, []), name) for name in names] for key, of in (("first", FIRST), ("last", LAST))},
    )
    found = {name: files["images"] / f"{name}.png" for name in names}
    figure = figures.cells_figure(comparison, found, 2)
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert labels == ["IoU 0.69", "IoU 1.00", "IoU 0.81", "IoU 0.64"]


@pytest.mark.parametrize(
    ("figure", "extra", "message"),
    [
        ("comparison", ["--show", "zebra"], "no image zebra"),
        ("comparison", ["--count", "0"], "expected at least 1, got 0"),
        ("cells", ["--names", "one"], "expected 2 different names"),
    ],
)
def test_names_what_is_wrong(files, tmp_path, capsys, figure: str, extra: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(files, figure, tmp_path / "x.png", *extra)
    assert stop.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_curves_of_a_training(tmp_path: Path) -> None:
    lines = [{"iteration": i, "loss_mask": 1 / (i + 1), "total_loss": 2 / (i + 1), "lr": 1e-3} for i in range(30)]
    lines += [{"iteration": 30, "validation/total_loss": 0.5, "paper/box_AP@0.5": 60.0}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    losses, rate, aps = figures.training_figure(tmp_path / "metrics.json").axes
    drawn = {line.get_label(): line for line in losses.lines}
    assert drawn.keys() == {"loss_mask", "total_loss", "validation/total_loss"}
    np.testing.assert_allclose(drawn["total_loss"].get_ydata(), [line["total_loss"] for line in lines[:30]])
    assert drawn["total_loss"].get_color() == drawn["validation/total_loss"].get_color()
    assert len(rate.lines[0].get_xdata()) == 30 and aps.lines[0].get_ydata() == [60.0]
    figures.main(["training", str(tmp_path), "-o", str(tmp_path / "curves.png")])
    assert cv2.imread(str(tmp_path / "curves.png")).shape[1] > 1000


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": 1}', '{"iteration": 1, "lr": 1}'])
def test_metrics_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match="metrics.json"):
        figures.training_figure(tmp_path / "metrics.json")

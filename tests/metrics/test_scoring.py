"""``kg-detectron evaluate`` and the function behind it, from files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from builders import golden_files, golden_id, read_json
from pycocotools import mask as coco_mask

from kg_detectron.cli.main import main
from kg_detectron.io.labels import write_label_image
from kg_detectron.metrics.scoring import DEFINITIONS, evaluate

SIZE = 40, 50


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


TRUTH = {"a": [disc(10, 10, 6), disc(30, 12, 5), disc(20, 30, 7)], "b": [disc(25, 20, 9)], "c": []}
FOUND = {"a": [disc(11, 10, 6), disc(30, 12, 5), disc(42, 32, 4)], "b": [disc(25, 22, 8)], "c": []}
SCORES = {"a": [0.9, 0.8, 0.7], "b": [0.6], "c": []}


def annotation(mask: np.ndarray, **more: object) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "bbox": coco_mask.toBbox(rle).tolist(),
        "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
        "category_id": 1,
        **more,
    }


def dataset(cells: dict[str, list[np.ndarray]], scores: dict | None = None, folder: str = "", first: int = 1) -> dict:
    images = [
        {"id": id, "file_name": f"{folder}{name}.png", "height": SIZE[0], "width": SIZE[1]}
        for id, name in enumerate(cells, start=first)
    ]
    annotations = [
        annotation(mask, image_id=image["id"], **({"score": scores[name][i]} if scores else {}))
        for image, name in zip(images, cells, strict=True)
        for i, mask in enumerate(cells[name])
    ]
    for id, one in enumerate(annotations, start=1):
        one |= {"id": id, "area": 1, "iscrowd": 0}
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}


def results(cells: dict[str, list[np.ndarray]], scores: dict) -> list[dict]:
    names = list(TRUTH)
    return [
        annotation(mask, image_id=names.index(name) + 1, score=score)
        for name in cells
        for mask, score in zip(cells[name], scores[name], strict=True)
    ]


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_labels(folder: Path, cells: dict[str, list[np.ndarray]], ending: str = "") -> Path:
    for name, masks in cells.items():
        labels = np.zeros(SIZE, np.uint16)
        for i, mask in enumerate(masks, start=1):
            labels[mask] = 3 * i  # gaps between the numbers
        path = folder / f"{name}{ending}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label_image(path, labels)
    return folder


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    return write_json(tmp_path / "truth.json", dataset(TRUTH))


def figures_only(report: dict) -> dict:
    return {key: report[key] for key in ("paper", "coco", "matching", "dsb", "aji", "foreground_dice")}


# Figures


@pytest.mark.parametrize("path", golden_files("evaluation_*.json"), ids=golden_id)
def test_golden_figures_of_the_paper_with_boxes_as_given(path, tmp_path):
    golden = read_json(path)
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    found = []
    for id, image in enumerate(golden["images"], start=1):
        truth["images"].append({"id": id, "file_name": f"{id}.png", "height": image["height"], "width": image["width"]})
        for target, cells in ((truth["annotations"], image["gt"]), (found, image["pred"])):
            for cell in cells:
                y1, x1, y2, x2 = cell["box_y1x1y2x2"]
                target.append({"image_id": id, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], **cell})
    ious = [float(iou) for iou in golden["expected"]]
    report = evaluate(write_json(tmp_path / "gt.json", truth), write_json(tmp_path / "pred.json", found), ious=ious)
    assert report["paper"].keys() == golden["expected"].keys()
    for iou, expected in golden["expected"].items():
        values = {name: float("nan") if value is None else value for name, value in report["paper"][iou].items()}
        assert values == pytest.approx(expected, abs=1e-6, nan_ok=True), iou


def test_figures_by_hand(truth, tmp_path):
    """Image a: an exact hit, a near one, a false one, and a cell missed; b: a near one; c: nothing on either side."""
    report = evaluate(truth, write_json(tmp_path / "found.json", results(FOUND, SCORES)))
    ious = [
        (t & f).sum() / (t | f).sum()
        for t, f in ((TRUTH["a"][0], FOUND["a"][0]), (TRUTH["a"][1], FOUND["a"][1]), (TRUTH["b"][0], FOUND["b"][0]))
    ]
    assert 0.7 < min(ious[0], ious[2]) and max(ious[0], ious[2]) < 0.85
    at = report["matching"]["0.5"]
    assert (at["tp"], at["fp"], at["fn"]) == (3, 1, 1)
    assert [at[name] for name in ("precision", "recall", "f1", "accuracy")] == [0.75, 0.75, 0.75, 0.6]
    assert at["sq"] == pytest.approx(np.mean(ious)) and at["pq"] == pytest.approx(sum(ious) / 4)
    assert report["dsb"]["0.5"] == pytest.approx((2 / 4 + 1) / 2)
    assert report["dsb"]["0.95"] == pytest.approx((1 / 5 + 0) / 2)
    assert report["dsb"]["score"] == pytest.approx(np.mean([report["dsb"][f"{i / 100:g}"] for i in range(50, 100, 5)]))
    # Ranked hit, hit, miss, hit: precision 1, 1, then 3/4 at a recall of 3/4.
    assert report["paper"]["0.5"]["mask_ap"] == pytest.approx((1 + 1 + 3 / 4) / 4)
    assert report["paper"]["0.5"]["mean_mask_iou"] == pytest.approx(np.mean(ious))
    # COCO reads the same curve at the recalls 0, 0.01, .. 1.
    assert report["coco"]["mask"]["ap50"] == pytest.approx((51 + 25 * 0.75) / 101)
    common = [(t & f).sum() for t, f in zip(TRUTH["a"][:2] + TRUTH["b"], FOUND["a"][:2] + FOUND["b"], strict=True)]
    areas = sum(mask.sum() for cells in (TRUTH, FOUND) for masks in cells.values() for mask in masks)
    assert report["foreground_dice"] == pytest.approx(2 * sum(common) / areas)
    of_a = (common[0] + common[1]) / (
        (TRUTH["a"][0] | FOUND["a"][0]).sum() + TRUTH["a"][1].sum() + TRUTH["a"][2].sum() + FOUND["a"][2].sum()
    )
    assert report["aji"] == pytest.approx((of_a + ious[2]) / 2)
    assert (report["images"], report["cells"], report["detections"]) == (3, 4, 4)


def test_a_least_score_leaves_the_aps_alone(truth, tmp_path):
    found = write_json(tmp_path / "found.json", results(FOUND, SCORES))
    every, some = evaluate(truth, found), evaluate(truth, found, min_score=0.8)
    assert some["paper"] == every["paper"] and some["coco"] == every["coco"]
    assert (some["matching"]["0.5"]["tp"], some["matching"]["0.5"]["fp"], some["matching"]["0.5"]["fn"]) == (2, 0, 2)
    assert some["dsb"]["score"] != every["dsb"]["score"] and some["aji"] != every["aji"]


def test_more_than_100_detections_an_image_count(tmp_path):
    labels = np.arange(1, 241).reshape(12, 20).repeat(3, axis=0).repeat(2, axis=1)
    cells = {"a": [np.pad(labels == i, ((0, 4), (0, 10))) for i in range(1, 241)]}
    truth = write_json(tmp_path / "truth.json", dataset(cells))
    found = write_json(tmp_path / "found.json", results(cells, {"a": np.linspace(1, 0, 240).tolist()}))
    assert evaluate(truth, found)["coco"]["mask"]["ap"] == pytest.approx(1)
    assert evaluate(truth, found, max_detections=100)["coco"]["mask"]["ap"] < 0.5


# Forms of the input


def test_all_forms_of_predictions_give_the_same_figures(truth, tmp_path):
    expected = figures_only(evaluate(truth, write_json(tmp_path / "results.json", results(FOUND, SCORES))))
    # As one dataset, with other ids, its images in another order and folder.
    backwards = {name: FOUND[name] for name in reversed(FOUND)}
    one = write_json(tmp_path / "one.json", dataset(backwards, SCORES, folder="plate/", first=7))
    assert figures_only(evaluate(truth, one)) == expected
    # As predict writes them: a file an image, beside label images.
    folder = tmp_path / "predicted"
    for name, masks in FOUND.items():
        write_json(folder / f"{name}_coco.json", dataset({name: masks}, {name: SCORES[name]}))
    write_labels(folder, TRUTH, "_labels")  # would be perfect, were they taken
    assert figures_only(evaluate(truth, folder)) == expected
    # Label images as ground truth.
    for ending in ("", "_labels"):
        labels = write_labels(tmp_path / f"truth{ending}", TRUTH, ending)
        assert figures_only(evaluate(labels, folder)) == expected


def test_label_images_have_no_ranking(truth, tmp_path, capsys):
    folder = write_labels(tmp_path / "labels", FOUND, "_labels")
    scored = evaluate(truth, write_json(tmp_path / "results.json", results(FOUND, SCORES)))
    report = evaluate(truth, folder)
    assert not report["has_scores"] and scored["has_scores"]
    assert set(report["coco"]["mask"].values()) == set(report["coco"]["box"].values()) == {None}
    for iou, values in report["paper"].items():
        assert values["mask_ap"] is None and values["box_ap"] is None
        assert values["mean_mask_iou"] == scored["paper"][iou]["mean_mask_iou"]
    for name in ("matching", "dsb", "aji", "foreground_dice"):
        assert report[name] == scored[name]
    assert main(["evaluate", str(truth), str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "no scores" in shown and "paper.0.5.mask_ap" in shown and "n/a" in shown
    with pytest.raises(ValueError, match="min_score"):
        evaluate(truth, folder, min_score=0.5)


def test_an_exchanged_truth_and_prediction_are_noticed(tmp_path, capsys):
    truth = write_labels(tmp_path / "gt", TRUTH)
    found = write_labels(tmp_path / "found", FOUND, "_labels")
    write_json(found / "run.json", {})
    assert main(["evaluate", str(found), str(truth)]) == 0
    assert "holds results of kg-detectron predict (run.json)" in capsys.readouterr().err
    assert main(["evaluate", str(truth), str(found)]) == 0
    assert main(["evaluate", str(found), str(found)]) == 0
    assert not capsys.readouterr().err


def test_boxes_of_label_images_are_the_extent_of_their_pixels(tmp_path):
    report = evaluate(
        write_labels(tmp_path / "gt", TRUTH), write_json(tmp_path / "p.json", dataset(TRUTH, {**SCORES, "b": [1]}))
    )
    assert report["paper"]["0.7"]["box_ap"] == 1 and report["coco"]["box"]["ap"] == pytest.approx(1)


def test_masks_without_boxes_have_those_of_their_pixels(truth, tmp_path):
    boxed, bare, bare_truth = results(FOUND, SCORES), results(FOUND, SCORES), dataset(TRUTH)
    for one in (*bare, *bare_truth["annotations"]):
        del one["bbox"]
    expected = evaluate(truth, write_json(tmp_path / "boxed.json", boxed))
    found = write_json(tmp_path / "bare.json", bare)
    assert evaluate(truth, found) == expected
    assert evaluate(write_json(tmp_path / "bare_truth.json", bare_truth), found) == expected


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path):
    truth = write_labels(tmp_path / "gt", {"p1/a": TRUTH["a"], "p2/a": TRUTH["b"]})
    found = write_labels(tmp_path / "found", {"p2/a": TRUTH["b"], "p1/a": TRUTH["a"]}, "_labels")
    assert evaluate(truth, found)["dsb"]["score"] == 1
    with pytest.raises(ValueError, match="two images are called a"):
        again = write_labels(tmp_path / "again", {"a": TRUTH["a"]})
        write_labels(again, {"a": TRUTH["a"]}, "_labels")
        (again / "a.png").write_bytes((again / "a.tif").read_bytes())
        (again / "a_labels.tif").unlink()
        evaluate(again, again)


def test_images_without_prediction_count_and_are_said(truth, tmp_path, capsys):
    folder = write_labels(tmp_path / "labels", {"a": FOUND["a"]})
    report = evaluate(truth, folder)
    assert report["images_without_prediction"] == ["b", "c"]
    assert report["matching"]["0.5"]["fn"] == 2  # one in a, one in b
    main(["evaluate", str(truth), str(folder)])
    assert "no prediction for 2 images, which count as without detections: b, c" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: found[0].update(image_id=9), "the ground truth lacks 1 of its images, by id: 9 .*--only-common"),
        (lambda found: found[1].update(bbox=[1, 2, 3]), r"results\[1\]: bbox must be .* 4 finite numbers"),
        (lambda found: found[1].update(bbox=[1, 2, -3, 4]), r"results\[1\]: bbox"),
        (lambda found: found[1].update(segmentation={"size": [40, 51], "counts": "0"}), r"results\[1\]: its mask has"),
        (lambda found: found[1].pop("segmentation"), r"results\[1\]: it has no mask"),
        (lambda found: [found[1].pop(key) for key in ("bbox", "segmentation")], r"results\[1\]: it has no mask"),
        (lambda found: found[2].pop("score"), "2 of 3 cells have a score"),
        (lambda found: found[2].update(score="high"), r"results\[2\]: score must be"),
        (lambda found: [one.pop("score") for one in found[:3]], "some images have scores and others have none"),
        (lambda found: found.append(5), r"results\[4\]: expected an object, got 5"),
    ],
)
def test_bad_results_are_named(truth, tmp_path, spoil, message):
    found = results(FOUND, SCORES)
    spoil(found)
    path = write_json(tmp_path / "found.json", found)
    with pytest.raises(ValueError, match=rf"found\.json: .*{message}"):
        evaluate(truth, path)


@pytest.mark.parametrize("score", ["nan", "inf", "2", "-3"])
def test_a_lowest_score_is_a_number_of_0_to_1(truth, capsys, score):
    with pytest.raises(ValueError, match=rf"min_score: expected a number of 0\.\.1, got {float(score)}"):
        evaluate(truth, truth, min_score=float(score))
    assert main(["evaluate", str(truth), str(truth), "--min-score", score]) == 2
    assert f"--min-score: expected a number of 0..1, got {float(score)}" in capsys.readouterr().err


def test_bad_input_is_named(truth, tmp_path, capsys):
    unknown = write_labels(tmp_path / "unknown", {"z": TRUTH["a"]})
    with pytest.raises(ValueError, match="lacks 1 of its images, by name: z .*--only-common"):
        evaluate(truth, unknown)
    small = tmp_path / "small"
    small.mkdir()
    tifffile.imwrite(small / "a.tif", np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match=r"a has \(4, 5\) pixels"):
        evaluate(truth, small)
    with pytest.raises(ValueError, match="ground truth is none"):
        evaluate(write_labels(tmp_path / "gt", TRUTH), write_json(tmp_path / "r.json", results(FOUND, SCORES)))
    crowd = dataset(TRUTH)
    crowd["annotations"][1]["iscrowd"] = 1
    with pytest.raises(ValueError, match=r"crowd\.json: annotation 2 is a crowd"):
        evaluate(write_json(tmp_path / "crowd.json", crowd), truth)
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(truth), str(tmp_path / "empty")]) == 2
    assert "neither a label image" in capsys.readouterr().err
    assert main(["evaluate", str(truth), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


# The command


def test_the_command_prints_and_saves_what_the_function_returns(truth, tmp_path, capsys):
    found = write_json(tmp_path / "found.json", results(FOUND, SCORES))
    output = tmp_path / "figures.json"
    command = ["evaluate", str(truth), str(found), "--iou", "0.5", "0.75", "--min-score", "0.65", "--json", str(output)]
    assert main(command) == 0
    saved = json.loads(output.read_text())
    assert saved == evaluate(truth, found, ious=(0.5, 0.75), min_score=0.65)
    assert list(saved["paper"]) == ["0.5", "0.75"] and saved["coco"]["max_detections"] == 10000
    shown = capsys.readouterr().out
    values = {line.split()[0]: line.split()[1] for line in shown.splitlines() if len(line.split()) == 2}
    assert values["paper.0.75.box_ap"] == f"{saved['paper']['0.75']['box_ap']:.4f}"
    assert values["dsb.score"] == f"{saved['dsb']['score']:.4f}" and values["matching.0.5.fn"] == "2"
    for name in DEFINITIONS:  # every figure has a formula, and every formula a figure
        assert f"{name}: " in shown
        place = saved
        for part in name.split("."):
            place = place["0.5" if part == "t" else part]
        assert isinstance(place, float), name
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_real_ground_truth_agrees_with_itself(shared, tmp_path):
    whole = json.loads((shared / "dsb2018" / "instances_val.json").read_text())
    part = {image["id"] for image in whole["images"][:20]}
    whole["images"] = whole["images"][:20]
    whole["annotations"] = [one for one in whole["annotations"] if one["image_id"] in part]
    found = [{**one, "score": 1 - i / 10000} for i, one in enumerate(whole["annotations"])]
    report = evaluate(write_json(tmp_path / "truth.json", whole), write_json(tmp_path / "found.json", found))
    assert report["images"] == 20 and report["cells"] == report["detections"] > 500
    assert report["dsb"]["score"] == report["matching"]["0.7"]["pq"] == report["aji"] == report["foreground_dice"] == 1
    assert report["coco"]["mask"]["ap"] == pytest.approx(1) and report["coco"]["box"]["ap"] == pytest.approx(1)


# What people really have


def test_arrays_give_the_figures_of_files(tmp_path):
    one = write_labels(tmp_path / "gt", TRUTH), write_labels(tmp_path / "found", FOUND)
    arrays = [[tifffile.imread(folder / f"{name}.tif") for name in TRUTH] for folder in one]
    assert figures_only(evaluate(*arrays)) == figures_only(evaluate(*one))
    assert evaluate(arrays[0][0], arrays[0][0])["matching"]["0.7"]["f1"] == 1
    with pytest.raises(ValueError, match="ground_truth: expected a label image or a list of them"):
        evaluate(one[0], arrays[1])
    with pytest.raises(ValueError, match="predictions: expected label images of the sizes"):
        evaluate(arrays[0], arrays[1][:2])


def test_a_foreground_mask_is_refused(truth, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    foreground = sum(TRUTH["a"]).astype(np.uint8) * 255
    write_label_image(folder / "a.tif", foreground)
    for arguments in ((truth, folder), (folder, folder)):
        with pytest.raises(ValueError, match=r"a\.tif: its only label, 255, has 3 pieces: a foreground mask"):
            evaluate(*arguments)
    with pytest.raises(ValueError, match="ground_truth: its only label, 255"):
        evaluate(foreground, foreground)
    speck = TRUTH["b"][0].astype(np.uint8)
    speck[0, 0] = 1  # of one cell
    assert evaluate(speck, speck)["matching"]["0.5"]["tp"] == 1


def test_evaluating_the_images_that_both_have(truth, tmp_path, capsys):
    folder = write_labels(tmp_path / "found", {"a": FOUND["a"], "z": TRUTH["a"], "y": TRUTH["b"]})
    with pytest.raises(ValueError, match=r"lacks 2 of its images, by name: y, z \(--only-common"):
        evaluate(truth, folder)
    for options, message in (
        (["--iou", "2"], "ious must be distinct numbers above 0 and at most 1, at least one, got [2.0]"),
        (["--max-detections", "0"], "--max-detections: expected at least 1, got 0"),
    ):
        assert main(["evaluate", str(truth), str(truth), *options]) == 2
        assert message in capsys.readouterr().err
    figures = evaluate(truth, folder, only_common=True)
    assert figures["images"] == 1
    assert figures["images_left_out"] == {"ground_truth": ["b", "c"], "predictions": ["y", "z"]}
    assert main(["evaluate", str(truth), str(folder), "--only-common"]) == 0
    shown = capsys.readouterr().out
    assert "only in the ground truth: b, c" in shown and "only in the predictions: y, z" in shown
    with pytest.raises(ValueError, match="none of its images is in the ground truth"):
        evaluate(truth, write_labels(tmp_path / "other", {"z": TRUTH["a"]}), only_common=True)


def test_figures_of_every_image(truth, tmp_path):
    found = write_json(tmp_path / "found.json", results(FOUND, SCORES)[:-1])
    report = evaluate(truth, found, min_score=0.75)
    a, b, c = report["per_image"]
    assert (a["name"], a["has_prediction"], a["cells"], a["detections"]) == ("a", True, 3, 2)
    assert (b["name"], b["has_prediction"], b["cells"], b["detections"]) == ("b", False, 1, 0)
    assert a["matching"]["0.5"] == {"tp": 2, "fp": 0, "fn": 1, "f1": 0.8}
    assert c["matching"]["0.5"]["f1"] is c["aji"] is c["foreground_dice"] is None and b["aji"] == 0
    for key in ("tp", "fp", "fn"):
        assert report["matching"]["0.7"][key] == sum(one["matching"]["0.7"][key] for one in report["per_image"])


def test_a_reader_that_has_seen_enough_is_no_error(truth, tmp_path):
    code = "import sys; from kg_detectron.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "evaluate", str(truth), str(truth)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 141)  # as shells name the end by a closed pipe

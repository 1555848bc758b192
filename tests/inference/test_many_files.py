"""`kg-detectron predict` and `kg-detectron rerun`: many files, interruptions, repetition."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import roifile
import tifffile
import torch
from builders import tiny_network
from PIL import Image

from kg_detectron import load_model, predict
from kg_detectron.cells.separation import separate_cells
from kg_detectron.cli.main import main
from kg_detectron.export.kinds import KINDS
from kg_detectron.inference import save_model
from kg_detectron.inference.area import regions_of
from kg_detectron.inference.many_files import predict_files, rerun
from kg_detectron.inference.run_settings import Settings
from kg_detectron.inference.run_tables import is_parquet_installed
from kg_detectron.io.images import open_image, read_image
from kg_detectron.io.lock import LOCK_FILE, locked
from kg_detectron.io.metadata import tiff_metadata
from kg_detectron.io.ome_zarr import is_zarr_installed

ROOT = Path(__file__).parents[2]


def saved(path: Path, seed: int = 0, **changes) -> Path:
    """Random weights find "cells" everywhere, and other ones where a single level of the image changes."""
    save_model(tiny_network(seed, size=(32, 48), radius=2.0, smooth_sigma=1.0, **changes), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    percentile = {"normalisation": "percentile", "percentiles": (2.0, 99.0)}
    return {
        "fixed": saved(folder / "fixed.pth"),
        "percentile": saved(folder / "percentile.pth", **percentile),
        "other": saved(folder / "other.pth", seed=1),
    }


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["fixed"]


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / f"good{i}.png")
    return folder


def labels(path: Path) -> np.ndarray:
    return tifffile.imread(path)


def contents(folder: Path) -> dict[str, bytes]:
    """All results, hidden files included, less the manifest and the table of images, which hold times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", "images.csv"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_all_results_of_one_image_are_those_of_python(images: Path, model: Path, tmp_path: Path):
    out = tmp_path / "new" / "out"
    assert main(["predict", str(images / "good0.png"), "-m", str(model), "-o", str(out), "--save", "all"]) == 0
    (record,) = manifest(out)["files"]
    cells = separate_cells(predict(load_model(model), read_image(images / "good0.png")))
    assert record["cells"] == len(cells.scores) > 10
    np.testing.assert_array_equal(labels(out / "good0_labels.tif"), cells.masks.label_image())
    assert len(record["outputs"]) == len(KINDS)
    assert {*record["outputs"], "cells.csv"} == contents(out).keys()


def test_the_manifest_tells_what_was_done(images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    command = ["predict", str(images), "-m", str(model), "-o", str(out), "--pixel-size", "0.5", "--save", "csv,labels"]
    assert main(command) == 0
    written, printed = manifest(out), capsys.readouterr().out
    assert written["command"] == " ".join(["kg-detectron", *command])
    assert written["versions"]["torch"] == torch.__version__
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert (written["model"], written["model_sha256"]) == (str(model), digest)
    assert written["settings"]["pixel_size"] == 0.5 and written["settings"]["save"] == ["csv", "labels"]
    for i, record in enumerate(written["files"]):
        path = images / f"good{i}.png"
        assert (record["input"], record["size"], record["error"]) == (str(path), [40, 60], None)
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["seconds"] > 0 and record["cells"] == labels(out / f"good{i}_labels.tif").max()
        assert (record["pixel_size"], record["pixel_size_source"]) == (0.5, "given")
        assert [plane["cells"] for plane in record["planes"]] == [record["cells"]]
        assert record["planes"][0]["scale"] == pytest.approx([0.8, 0.8]) and record["planes"][0]["scale_source"]
        assert (
            f"{path}: 40 x 60 pixels, network saw scale 0.8 (" in printed and f"), {record['cells']} cells" in printed
        )
    assert written["command"] in printed and digest in printed and torch.__version__ in printed
    total = sum(record["cells"] for record in written["files"])
    assert printed.splitlines()[-1] == f"3 files: 3 done, 0 done before, 0 failed; {total} cells"


def test_bad_files_do_not_stop_the_rest(images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    tifffile.imwrite(images / "cut.tif", picture(height=300, width=300))
    (images / "cut.tif").write_bytes((images / "cut.tif").read_bytes()[:-5000])
    (images / "a text.png").write_text("no image")
    (images / "empty.tif").touch()
    (images / "folder.png").mkdir()
    (images / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    out = tmp_path / "out"
    assert main(["predict", str(images), "-m", str(model), "-o", str(out)]) == 1
    errors = {Path(record["input"]).name: record["error"] for record in manifest(out)["files"]}
    bad = ["a text.png", "cut.tif", "dangling.png", "empty.tif", "folder.png"]
    assert sorted(name for name, error in errors.items() if error) == bad
    assert sorted(name for name, error in errors.items() if not error) == ["good0.png", "good1.png", "good2.png"]
    kinds = ("labels.tif", "overlay.png", "cells.csv")
    assert contents(out).keys() == {"cells.csv", *(f"good{i}_{kind}" for i in range(3) for kind in kinds)}
    printed = capsys.readouterr()
    assert "8 files: 3 done, 0 done before, 5 failed" in printed.out
    for name in bad:
        (line,) = [line for line in (printed.out + printed.err).splitlines() if name in line]
        assert line.split("failed: ")[1] == f"{images / name}: {errors[name]}" and line.count(name) == 1
        assert f"failed: {images / name}: " in printed.err
    assert main(["predict", *(str(images / name) for name in bad), "-m", str(model), "-o", str(tmp_path / "bad")]) == 2


def test_any_failure_is_of_its_file_alone(images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails_once(*arguments, **keywords):
        monkeypatch.setattr("kg_detectron.inference.file_prediction.predict", predict)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("kg_detectron.inference.file_prediction.predict", fails_once)
    summary = predict_files([images], model, tmp_path / "out")
    assert [record.error for record in summary.failed] == ["RuntimeError: out of memory"]
    assert len(summary.done) == 2
    again = predict_files([images], model, tmp_path / "out")
    assert (len(again.done), len(again.skipped), len(again.failed)) == (1, 2, 0)


def test_what_is_done_is_skipped(images: Path, models: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"

    def done(model: str = "fixed", inputs: Path = images, **options) -> list[str]:
        settings = Settings(**{"save": ("labels",), **options.pop("settings", {})})
        summary = predict_files([inputs], models[model], out, settings, **options)
        assert not summary.failed
        return [Path(record.input).stem for record in summary.done]

    assert done() == ["good0", "good1", "good2"]
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    assert done() == []
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tif")} == times
    (out / "good1_labels.tif").unlink()
    assert done() == ["good1"]
    Image.fromarray(picture(9)).save(images / "good2.png")  # another image under the same name
    assert done() == ["good2"]
    assert done(inputs=images / "good0.png", overwrite=True) == ["good0"]
    assert done() == []  # the others are still known
    assert done(settings={"scale": 1.0, "tile": 64}) == ["good0", "good1", "good2"]
    assert done(settings={"scale": 1.0, "tile": 64}) == []
    before = contents(out)
    assert done("other") == ["good0", "good1", "good2"]
    assert all(data != before[name] for name, data in contents(out).items())


def test_a_second_command_into_a_folder_is_refused(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with locked(tmp_path / "out"):
        assert main(["predict", str(images), "-m", str(model), "-o", str(tmp_path / "out")]) == 2
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]
    assert "another command is writing into this folder; wait until it has ended" in capsys.readouterr().err


def test_a_foreign_run_json_is_left_alone(images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for content in ("{}", "[1]", "no JSON", '{"files": [{"colour": 1}]}'):
        (tmp_path / "run.json").write_text(content)
        assert main(["predict", str(images), "-m", str(model), "-o", str(tmp_path)]) == 2
        assert "run.json: not the manifest" in capsys.readouterr().err
        assert (tmp_path / "run.json").read_text() == content
    assert not list(tmp_path.glob("*_labels.tif"))


# Processes that share their imports, each killed when result number N, of which half is written, should get its name.
KILLED = """
import os, signal, sys
from kg_detectron.export.kinds import KINDS
from kg_detectron.inference import file_prediction  # before the first of them is made
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.area import regions_of
from kg_detectron.inference.run_settings import Settings

real, count = os.replace, 0
def dying(source, target):
    global count
    count += target.name not in ("run.json", "cells.csv", "images.csv")
    if count == moment:
        data = open(source, "rb").read()
        open(source, "wb").write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = dying
images, model, *runs = sys.argv[1:]
for moment, out in zip(map(int, runs[::2]), runs[1::2]):
    child = os.fork()
    if child == 0:
        predict_files([images], model, out, Settings(save=KINDS))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_run_leaves_whole_files_and_is_finished_by_the_next(
    images: Path, model: Path, tmp_path: Path, one_thread: None
):
    whole, moments = tmp_path / "whole", (0, 4, 8)  # the manifest, in the first image, in the second
    predict_files([images], model, whole, Settings(save=KINDS))
    runs = [str(part) for moment in moments for part in (moment, tmp_path / str(moment))]
    command = [sys.executable, "-c", KILLED, str(images), str(model), *runs]
    # One thread, here as there, for threads do not survive a fork, and their number shows in the last digit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    for moment in moments:
        out = tmp_path / str(moment)
        left = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        assert "cells.csv" not in left
        assert len(left) == max(0, moment - 1)
        assert left.items() <= contents(whole).items()
        assert not predict_files([images], model, out, Settings(save=KINDS)).failed
        assert contents(out) == contents(whole)


def test_an_interrupted_run_keeps_its_manifest(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    calls = []

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(*arguments, **keywords)

    monkeypatch.setattr("kg_detectron.inference.file_prediction.predict", interrupted)
    assert main(["predict", str(images), "-m", str(model), "-o", str(tmp_path / "out")]) == 130
    assert "interrupted; give the same command again to go on" in capsys.readouterr().err
    assert [record["name"] for record in manifest(tmp_path / "out")["files"]] == ["good0"]
    assert len(predict_files([images], model, tmp_path / "out").skipped) == 1


@pytest.mark.parametrize("kind", ["fixed", "percentile"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_16_bits_give_the_labels_of_8_bits(models: dict[str, Path], tmp_path: Path, kind: str, scale: float | None):
    eight = np.random.default_rng(5).integers(20, 200, (45, 70, 3), dtype=np.uint8)
    for image, name in ((eight, "eight"), (eight.astype(np.uint16) * 257, "sixteen")):
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric="rgb")
    tifffile.imwrite(tmp_path / "changed.tif", np.where(eight == 20, 190, eight).astype(np.uint8), photometric="rgb")
    settings = Settings(save=("labels",), scale=scale, tile=64)
    predict_files(sorted(tmp_path.glob("*.tif")), models[kind], tmp_path / "out", settings)
    first, second, changed = (labels(tmp_path / "out" / f"{n}_labels.tif") for n in ("eight", "sixteen", "changed"))
    assert first.max() > 10
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, changed), "the labels do not depend on the image at all"


def test_images_of_any_range_need_percentiles(models: dict[str, Path], tmp_path: Path):
    image = picture()
    for name, values in (
        ("deep", image.astype(np.uint16) * 16),
        ("wild", image * 3.7 - 90),
        ("long", image.astype(np.int32)),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", values)
    Image.fromarray(image).save(tmp_path / "plain.png")
    inputs = [*sorted(tmp_path.glob("*.tif")), tmp_path / "plain.png"]
    summary = predict_files(inputs, models["fixed"], tmp_path / "fixed")
    assert [Path(record.input).stem for record in summary.failed] == ["deep", "long", "wild"]
    assert all("--normalise percentile" in record.error for record in summary.failed)
    for model, settings in (("fixed", Settings(normalise="percentile")), ("percentile", Settings())):
        out = tmp_path / model / "percentile"
        assert not predict_files(inputs, models[model], out, settings).failed
        expected = labels(out / "plain_labels.tif")
        assert expected.max() > 10
        for name in ("deep", "long"):
            np.testing.assert_array_equal(labels(out / f"{name}_labels.tif"), expected)


def test_pages_are_predicted_one_by_one(model: Path, tmp_path: Path):
    stack = np.stack([picture(1), picture(2), picture(3)])
    tifffile.imwrite(tmp_path / "stack.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "unnamed.tif", stack, photometric="minisblack")
    tifffile.imwrite(tmp_path / "channels.tif", stack, imagej=True, metadata={"axes": "CYX"})
    for i in (1, 2, 3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    run = ["predict", "-m", str(model), "-o", str(tmp_path / "out"), "--save", "labels"]
    assert main([*run[:1], str(tmp_path), *run[1:]]) == 1
    failed = {record["name"]: record["error"] for record in manifest(tmp_path / "out")["files"] if record["error"]}
    assert failed.keys() == {"unnamed", "channels"}
    assert "--axes" in failed["unnamed"] and "--channels" in failed["channels"]
    again = ["predict", str(tmp_path / "unnamed.tif"), str(tmp_path / "channels.tif"), *run[1:]]
    assert main([*again, "--axes", "cyx", "--channels", "2"]) == 0
    expected = [labels(tmp_path / "out" / f"{i}_labels.tif") for i in (1, 2, 3)]
    assert min(page.max() for page in expected) > 10
    stacked = labels(tmp_path / "out" / "stack_labels.tif")
    np.testing.assert_array_equal(stacked, np.stack(expected))
    for name in ("unnamed", "channels"):
        np.testing.assert_array_equal(labels(tmp_path / "out" / f"{name}_labels.tif"), expected[1])


def test_pages_do_not_overwrite_another_file(model: Path, tmp_path: Path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([picture(1), picture(2)]), metadata={"axes": "ZYX"})
    Image.fromarray(picture(3)).save(tmp_path / "a_page0002.png")
    summary = predict_files([tmp_path], model, tmp_path / "out")
    assert [record.name for record in summary.failed] == ["a"] and "a_page0002" in summary.failed[0].error
    expected = separate_cells(predict(load_model(model), read_image(tmp_path / "a_page0002.png")))
    np.testing.assert_array_equal(labels(tmp_path / "out" / "a_page0002_labels.tif"), expected.masks.label_image())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"run.json", "images.csv", "cells.csv"}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (
            "auto",
            {"s_labels.tif", "s_page000{}.geojson", "s_rois.zip", "s_page000{}_rois.zip", "s_page000{}_cells.csv"},
        ),
        ("one", {"s_labels.tif", "s.geojson", "s_rois.zip", "s_cells.csv"}),
        ("pages", {f"s_page000{{}}{end}" for end in ("_labels.tif", ".geojson", "_rois.zip", "_cells.csv")}),
    ],
)
def test_files_of_a_stack(model: Path, tmp_path: Path, option: str, expected: set[str]):
    stack = np.stack([picture(i) for i in range(6)]).reshape(3, 2, 40, 60)
    tifffile.imwrite(tmp_path / "s.tif", stack, imagej=True, metadata={"axes": "TZYX"})
    out = tmp_path / "out"
    settings = Settings(save=("labels", "geojson", "roi"), stack=option)
    assert not predict_files([tmp_path / "s.tif"], model, out, settings).failed
    assert files(out) == {name.format(page) for name in expected for page in range(1, 7)}
    if option == "pages":
        read = np.stack([labels(out / f"s_page000{page}_labels.tif") for page in range(1, 7)]).reshape(3, 2, 40, 60)
    else:
        with tifffile.TiffFile(out / "s_labels.tif") as file:
            assert file.series[0].axes == "TZYX"
            read = file.asarray()
    rows = list(csv.DictReader(open(out / "cells.csv", newline="")))
    for page, (t, z) in enumerate(np.ndindex(3, 2), 1):
        ids = [
            row["id"]
            for row in rows
            if (row["image"], row["page"], row["t"], row["z"]) == ("s.tif", str(page), str(t + 1), str(z + 1))
        ]
        assert ids == [str(id) for id in range(1, read[t, z].max() + 1)]
    rois = "s_page0004_rois.zip" if option == "pages" else "s_rois.zip"
    positions = {(roi.z_position, roi.t_position) for roi in roifile.roiread(out / rois)}
    assert positions == ({(2, 2)} if option == "pages" else {(z, t) for z in (1, 2) for t in (1, 2, 3)})
    images = list(csv.DictReader(open(out / "images.csv", newline="")))
    assert [int(row["cells"]) for row in images] == [plane.max() for plane in read.reshape(6, 40, 60)]
    assert [(row["t"], row["z"]) for row in images] == [(str(t + 1), str(z + 1)) for t, z in np.ndindex(3, 2)]


def test_one_table_of_all_cells_and_one_of_all_images(images: Path, model: Path, tmp_path: Path):
    (images / "sub").mkdir()
    Image.fromarray(np.stack([picture(i) for i in (3, 4, 5)], axis=2)).save(images / "sub" / "colour.png")
    (images / "broken.png").write_text("no image")
    out = tmp_path / "out"
    pattern = str(images / "**" / "*.png")
    predict_files([pattern], model, out, Settings(save=("labels",), pixel_size=0.5))
    cells = list(csv.DictReader(open(out / "cells.csv", newline="")))
    rows = {row["image"]: row for row in csv.DictReader(open(out / "images.csv", newline=""))}
    assert list(rows) == ["broken.png", "good0.png", "good1.png", "good2.png", "sub/colour.png"]
    assert rows["broken.png"]["error"] and not rows["broken.png"]["cells"]
    for record in manifest(out)["files"]:
        if record["error"]:
            continue
        image = record["name"] + ".png"
        read = labels(out / f"{record['name']}_labels.tif")
        chosen = [row for row in cells if row["image"] == image]
        assert len(chosen) == record["cells"] == int(rows[image]["cells"]) == read.max()
        assert [int(row["area_px"]) for row in chosen] == np.bincount(read.ravel())[1:].tolist()
        assert float(rows[image]["area_share"]) == pytest.approx((read > 0).mean(), rel=1e-5)
        assert (rows[image]["height_px"], rows[image]["pixel_size_um"]) == ("40", "0.5")
        assert {bool(row["mean_intensity"]) for row in chosen} == {"good" in image}
        assert {bool(row["max_intensity_red"]) for row in chosen} == {"good" not in image}
    before = (out / "cells.csv").read_bytes()
    predict_files([pattern], model, out, Settings(save=("labels",), pixel_size=0.5))  # nothing new but the failure
    assert (out / "cells.csv").read_bytes() == before


def test_other_settings_leave_nothing_of_the_former_results(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    run = ["predict", "-m", str(model), "-o", str(out), "--save"]
    assert main([*run, "labels", "roi", "geojson", str(images / "good0.png"), str(images / "good1.png")]) == 0
    first = contents(out)
    assert main([*run, "labels", str(images / "good0.png"), "--min-score", "0.1"]) == 0
    assert "other settings" in capsys.readouterr().out
    assert files(out) == {"good0_labels.tif", "good0_cells.csv"} | {
        f"good1{end}" for end in ("_labels.tif", "_cells.csv", "_rois.zip", ".geojson")
    }
    with open(out / "good0_cells.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == labels(out / "good0_labels.tif").max()
    written = manifest(out)
    assert sorted(written["removed"]) == ["good0.geojson", "good0_rois.zip"]
    assert [record["name"] for record in written["files"]] == ["good0"] and len(written["former"]) == 1
    assert [record["superseded"] for record in written["former"][0]["files"]] == [True, False]
    assert "removed of an earlier run: good0" in written["files"][0]["notes"][0]
    images_in_table = {row["image"] for row in csv.DictReader(open(out / "images.csv", newline=""))}
    assert images_in_table == {"good0.png", "good1.png"}

    # Both runs can be repeated: together, which gives this folder again, and each alone.
    assert main(["rerun", str(out)]) == 0
    assert contents(tmp_path / "out_rerun") == contents(out)
    assert main(["rerun", str(out / "run.json"), "--run", "1", "-o", str(tmp_path / "first")]) == 0
    assert contents(tmp_path / "first") == first
    assert main(["rerun", str(out), "--run", "3"]) == 2
    assert "--run: expected a number of 1..2" in capsys.readouterr().err

    # The first settings again: what was replaced is made again, the rest is known.
    summary = predict_files(
        [images / "good0.png", images / "good1.png"], model, out, Settings(save=("labels", "roi", "geojson"))
    )
    assert [record.name for record in summary.done] == ["good0"]
    assert contents(out) == first and len(manifest(out)["former"]) == 1


def test_a_stack_that_became_one_page_leaves_no_pages(model: Path, tmp_path: Path):
    out, settings = tmp_path / "out", Settings(save=("labels", "roi"), stack="pages")
    tifffile.imwrite(tmp_path / "a.tif", np.stack([picture(1), picture(2)]), metadata={"axes": "ZYX"})
    predict_files([tmp_path / "a.tif"], model, out, settings)
    assert "a_page0002_rois.zip" in files(out)
    tifffile.imwrite(tmp_path / "a.tif", picture(1))
    predict_files([tmp_path / "a.tif"], model, out, settings)
    assert files(out) == {"a_labels.tif", "a_rois.zip", "a_cells.csv"}


def test_a_run_that_fails_with_other_settings_keeps_the_former_results(images: Path, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    predict_files([images / "good0.png"], model, out)
    before = contents(out)
    summary = predict_files([images / "good0.png"], model, out, Settings(max_pixels=100))
    assert len(summary.failed) == 1 and contents(out) == before
    assert predict_files([images / "good0.png"], model, out).skipped


def test_a_manifest_of_before_is_read(images: Path, model: Path, tmp_path: Path):
    """That of version 0.1.0 had no former runs and another word for the scale."""
    out = tmp_path / "out"
    predict_files([images / "good0.png"], model, out, Settings(save=("labels",), scale=1.0))
    written = manifest(out)
    for name in ("former", "removed", "started", "threshold"):
        del written[name]
    settings = {name: written["settings"][name] for name in ("save", "axes", "channels", "tile", "overlap")}
    written["settings"] = {**settings, "size": "native", "min_score": 0.0}
    (record,) = written["files"]
    for name in ("planes", "notes", "superseded", "pixel_size", "pixel_size_source"):
        del record[name]
    record["network_input"] = "own pixels"
    (out / "run.json").write_text(json.dumps(written))
    assert not rerun(out).failed
    assert contents(tmp_path / "out_rerun") == contents(out)


def test_overlaps_can_be_kept_in_coco_alone(images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = ["predict", str(images / "good0.png"), "-m", str(model), "-o", str(tmp_path / "out"), "--keep-overlaps"]
    assert main([*run, "--save", "coco", "labels"]) == 2
    assert "only coco" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*run, "--save", "coco"]) == 0
    found = json.loads((tmp_path / "out" / "good0_coco.json").read_text())["annotations"]
    expected = predict(load_model(model), read_image(images / "good0.png"))
    assert [a["segmentation"]["counts"] for a in found] == [rle["counts"] for rle in expected.masks.rle()]
    assert [a["score"] for a in found] == expected.scores.tolist()
    assert len(found) > len(separate_cells(expected).scores)
    rows = list(csv.DictReader(open(tmp_path / "out" / "good0_cells.csv", newline="")))
    assert [int(row["area_px"]) for row in rows] == [int(mask.sum()) for mask in expected.masks]
    assert tables_of(tmp_path / "out")["cells.csv"] == ["good0.png"] * len(found)


def test_overlaps_of_a_stack_are_measured_too(model: Path, tmp_path: Path):
    tifffile.imwrite(tmp_path / "s.tif", np.stack([picture(0), picture(1)]), imagej=True, metadata={"axes": "ZYX"})
    settings = Settings(save=("coco",), keep_overlaps=True, stack="one")
    (record,) = predict_files([tmp_path / "s.tif"], model, tmp_path / "out", settings).done
    assert record.outputs == ["s_page0001_coco.json", "s_page0002_coco.json", "s_cells.csv"]
    assert len(tables_of(tmp_path / "out")["cells.csv"]) == record.cells > 0


def test_doubtful_cells_can_be_left_out(images: Path, model: Path, tmp_path: Path):
    image = images / "good0.png"
    scores = predict(load_model(model), read_image(image)).scores
    limit = float(scores[len(scores) // 2])
    predict_files([image], model, tmp_path / "out", Settings(save=("coco",), keep_overlaps=True, min_score=limit))
    found = json.loads((tmp_path / "out" / "good0_coco.json").read_text())["annotations"]
    assert 0 < len(found) == int((scores >= limit).sum()) < len(scores)


def test_rerun_gives_the_same_labels(images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (images / "broken.png").write_text("no image")
    tifffile.imwrite(images / "stack.tif", np.stack([picture(7), picture(8)]))
    out = tmp_path / "out"
    run = ["predict", str(images), str(images.parent / "i*" / "good?.png"), "-m", str(model), "-o", str(out)]
    assert main([*run, "--normalise", "percentile", "--axes", "ZYX", "--save", "labels", "csv"]) == 1
    assert main(["rerun", str(out / "run.json")]) == 0
    assert contents(tmp_path / "out_rerun") == contents(out) and len(contents(out)) == 10
    assert main(["rerun", str(out / "run.json"), "-o", str(tmp_path / "other")]) == 0
    assert contents(tmp_path / "other") == contents(out)
    assert manifest(tmp_path / "other")["settings"] == manifest(out)["settings"]
    # Of a rerun too.
    assert main(["rerun", str(tmp_path / "other" / "run.json"), "-o", str(tmp_path / "third")]) == 0
    assert contents(tmp_path / "third") == contents(out)
    assert "may differ" not in capsys.readouterr().out
    written = manifest(out)
    written["versions"]["torch"] = "1.0"
    (out / "run.json").write_text(json.dumps(written))
    assert main(["rerun", str(out / "run.json"), "-o", str(tmp_path / "fourth")]) == 0
    assert f"torch is {torch.__version__}, was 1.0: the labels may differ" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["model", "input", "missing"])
def test_rerun_refuses_what_has_changed(images: Path, tmp_path: Path, changed: str, capsys: pytest.CaptureFixture):
    model, out = saved(tmp_path / "model.pth"), tmp_path / "out"
    predict_files([images], model, out)
    if changed == "model":
        saved(model, seed=1)
    elif changed == "input":
        Image.fromarray(picture(9)).save(images / "good1.png")
    else:
        (images / "good1.png").unlink()
    before = contents(out)
    assert main(["rerun", str(out / "run.json"), "-o", str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert ("SHA-256" in error) == (changed != "missing")
    assert str(model if changed == "model" else images / "good1.png") in error
    assert not (tmp_path / "again").exists() and contents(out) == before


def test_rerun_writes_nothing_outside_its_folder(images: Path, model: Path, tmp_path: Path):
    predict_files([images / "good0.png"], model, tmp_path / "out")
    written = manifest(tmp_path / "out")
    written["files"][0]["name"] = "../elsewhere"
    (tmp_path / "out" / "run.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"\.\./elsewhere"):
        rerun(tmp_path / "out" / "run.json")


def test_rerun_of_nothing(tmp_path: Path, images: Path, model: Path):
    with pytest.raises(FileNotFoundError):
        rerun(tmp_path / "run.json")
    (images / "bad.tif").touch()
    predict_files([images / "bad.tif"], model, tmp_path / "out")
    with pytest.raises(ValueError, match="no file that succeeded"):
        rerun(tmp_path / "out" / "run.json")


def test_absurd_sizes_are_refused(images: Path, model: Path, tmp_path: Path):
    summary = predict_files([images], model, tmp_path / "out", Settings(max_pixels=2399))
    assert len(summary.failed) == 3 and "60 x 40 pixels, more than the limit of 2399" in summary.failed[0].error


def test_the_table_of_all_cells_comes_as_parquet_too(images: Path, model: Path, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    Image.fromarray(np.stack([picture(7)] * 2 + [picture(8)], axis=2)).save(images / "colour.png")
    out = tmp_path / "out"
    predict_files([images], model, out, Settings(save=("csv",), parquet=True))
    table = parquet.read_table(out / "cells.parquet").to_pydict()
    rows = list(csv.DictReader(open(out / "cells.csv", newline="")))
    assert table.keys() == rows[0].keys() and len(rows) == len(table["image"]) > 40
    for i, row in enumerate(rows):
        assert (row["image"], int(row["id"])) == (table["image"][i], table["id"][i])
        for name in ("score", "mean_intensity", "mean_intensity_red"):
            assert table[name][i] == (float(row[name]) if row[name] else None)


def tables_of(folder: Path) -> dict[str, list[str]]:
    """The column ``image`` of both tables."""
    found = {}
    for name in ("images.csv", "cells.csv"):
        with open(folder / name, encoding="utf-8", newline="") as file:
            found[name] = [row["image"] for row in csv.DictReader(file)]
    return found


def with_semicolons(text: str) -> bytes:
    return text.replace(",", ";").encode()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (with_semicolons, "the first are id;score;area_px;"),
        (lambda text: with_semicolons(text.replace(".", ",")), "the first are id;score;area_px;"),
        (lambda text: text.encode("utf-16"), "can't decode byte"),
        (lambda text: b"", "the first are none"),
        (lambda text: None, "No such file"),
        (lambda text: text.replace("\n1,", "\n1,0,").encode(), "values for"),
        (lambda text: text.replace("\n1,", "\nJan 1,").encode(), "has 'Jan 1' as its id"),
        (lambda text: text.splitlines()[0].encode(), "it has 0 rows, where"),
    ],
    ids=["semicolons", "commas", "utf-16", "emptied", "deleted", "shifted", "date", "rows"],
)
def test_a_table_that_somebody_changed_is_named(
    images: Path, model: Path, tmp_path: Path, change, fault: str, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    settings = Settings(save=("labels",), parquet=is_parquet_installed())
    run = partial(predict_files, model=model, output=out, settings=settings, say=print)
    run([images])
    whole, table = tables_of(out)["cells.csv"], out / "good0_cells.csv"
    text = table.read_text()
    table.unlink()
    if (content := change(text)) is not None:
        table.write_bytes(content)
    capsys.readouterr()
    run([images / "good1.png", images / "good2.png"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert str(table) in line and fault in line and "delete it" in line
    assert tables_of(out)["cells.csv"] == [name for name in whole if name != "good0.png"]
    rows = {row["image"]: row for row in csv.DictReader(open(out / "images.csv", newline=""))}
    assert fault in rows["good0.png"]["notes"] and not rows["good1.png"]["notes"]
    header = (out / "good1_cells.csv").read_text().splitlines()[0]
    assert (out / "cells.csv").read_text().splitlines()[0] == f"image,{header}"
    table.unlink(missing_ok=True)
    run([images])  # which writes it anew
    assert table.read_text() == text and tables_of(out)["cells.csv"] == whole
    assert "note: " not in capsys.readouterr().out


def test_where_no_table_is_left_there_is_none_of_all_cells(images: Path, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    predict_files([images / "good0.png"], model, out, Settings(save=("labels",)))
    (out / "good0_cells.csv").write_bytes(b"")
    predict_files([images / "good0.png"], model, out, Settings(save=("labels",)))
    assert not (out / "cells.csv").exists() and "good0_cells.csv" in (out / "images.csv").read_text()


def test_an_image_has_one_name_whatever_else_is_given(model: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(1)).save(tmp_path / "in" / "a.png")
    first = predict_files([tmp_path / "in"], model, tmp_path / "out")
    assert [record.name for record in first.done] == ["a"]
    Image.fromarray(picture(2)).save(tmp_path / "in" / "a.bmp")
    both = predict_files([tmp_path / "in"], model, tmp_path / "out")
    assert [record.name for record in both.done] == ["a_bmp", "a_png"]
    assert not (tmp_path / "out" / "a_labels.tif").exists()
    tables = tables_of(tmp_path / "out")
    assert tables["images.csv"] == ["a.bmp", "a.png"]
    assert [tables["cells.csv"].count(record.image) for record in both.done] == [record.cells for record in both.done]
    by_pattern = predict_files([f"{tmp_path}/*/*.png"], model, tmp_path / "out")
    assert [record.name for record in by_pattern.done] == ["in/a"]
    assert tables_of(tmp_path / "out")["images.csv"] == ["a.bmp", "in/a.png"]


def test_another_image_does_not_replace_results_unasked(model: Path, tmp_path: Path):
    for folder, number in (("p1", 1), ("p2", 2)):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture(number)).save(tmp_path / folder / "w.png")
    shutil.copytree(tmp_path / "p1", tmp_path / "moved")
    out = tmp_path / "out"
    predict_files([tmp_path / "p1"], model, out)
    before = contents(out)
    for settings in (Settings(), Settings(min_score=0.5)):
        with pytest.raises(ValueError, match=r"p2/w\.png would have the same names .* --overwrite to replace"):
            predict_files([tmp_path / "p2"], model, out, settings)
    assert contents(out) == before
    assert [record.input for record in predict_files([tmp_path / "moved"], model, out).done] == [
        str(tmp_path / "moved" / "w.png")
    ]
    assert len(predict_files([tmp_path / "p2"], model, out, overwrite=True).done) == 1
    assert tables_of(out)["images.csv"] == ["w.png"]


def test_pages_of_a_stack_and_images_of_other_runs_do_not_clash(model: Path, tmp_path: Path):
    tifffile.imwrite(tmp_path / "st.tif", np.stack([picture(1), picture(2)]), imagej=True, metadata={"axes": "ZYX"})
    Image.fromarray(picture(3)).save(tmp_path / "st_page0001.png")
    predict_files([tmp_path / "st.tif"], model, tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"st_page0001\.png would have the same names"):
            predict_files([tmp_path / "st_page0001.png"], model, tmp_path / "out", overwrite=overwrite)
    predict_files([tmp_path / "st_page0001.png"], model, tmp_path / "other")
    (failed,) = predict_files([tmp_path / "st.tif"], model, tmp_path / "other").failed
    assert "page 1 would have the same names of results as another file, st_page0001" in failed.error


def test_what_a_setting_came_to_is_said(model: Path, images: Path, tmp_path: Path):
    settings = Settings(fast=True, regions=regions_of(["1000,1000,5,5"]), scale=10.0)
    image = images / "good0.png"
    for _ in range(2):  # the second run has nothing to do
        assert not predict_files([image], model, tmp_path / "out", settings).failed
        written = manifest(tmp_path / "out")
        assert written["speed"].startswith(("float32: ", "bfloat16: ")) and "here" in written["speed"]
    (record,) = written["files"]
    assert record["cells"] == 0 and record["notes"] == ["No cell was looked for, for the region is outside of it."]
    (plane,) = record["planes"]
    assert plane["scale"] == [8, 8] and plane["scale_source"] == "given, which asks for 10; the scale is 0.0625 to 8"


@pytest.mark.parametrize("settings", [Settings(save=("labels",)), Settings(save=("labels",), min_score=0.5)])
def test_a_file_that_fails_keeps_its_earlier_results_in_the_tables(model: Path, tmp_path: Path, settings: Settings):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(picture(ord(name))).save(tmp_path / "in" / f"{name}.png")
    predict_files([tmp_path / "in"], model, tmp_path / "out", Settings(save=("labels",)))
    rows, whole = tables_of(tmp_path / "out")["cells.csv"].count("b.png"), (tmp_path / "in" / "b.png").read_bytes()
    assert rows > 0
    (tmp_path / "in" / "b.png").write_bytes(whole[:50])
    assert len(predict_files([tmp_path / "in"], model, tmp_path / "out", settings).failed) == 1
    assert (tmp_path / "out" / "b_labels.tif").is_file()
    assert tables_of(tmp_path / "out")["cells.csv"].count("b.png") == rows
    (tmp_path / "in" / "b.png").write_bytes(whole)
    (done,) = predict_files([tmp_path / "in"], model, tmp_path / "out", settings).done
    assert tables_of(tmp_path / "out")["cells.csv"].count("b.png") == done.cells


@pytest.mark.parametrize("form", ["imagej", "ome", "time"])
def test_the_labels_of_a_z_stack_have_its_spacing(model: Path, tmp_path: Path, form: str):
    stack = np.stack([picture(0), picture(1)])
    if form == "ome":
        sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2000.0, "PhysicalSizeZUnit": "nm"}
        tifffile.imwrite(tmp_path / "s.ome.tif", stack, ome=True, metadata={"axes": "ZYX", **sizes})
    else:  # of ImageJ, along z and along time
        metadata = {"axes": "ZYX" if form == "imagej" else "TYX", "unit": "um", "spacing": 2.0}
        tifffile.imwrite(tmp_path / "s.tif", stack, imagej=True, resolution=(2, 2), metadata=metadata)
    kinds = ("labels", "ome-tiff", *(("zarr",) if is_zarr_installed() else ()))
    (record,) = predict_files([tmp_path / "s*.tif"], model, tmp_path / "out", Settings(save=kinds)).done
    spacing = None if form == "time" else 2.0
    for output in record.outputs:
        if output.endswith("labels.tif"):
            with tifffile.TiffFile(tmp_path / "out" / output) as file:
                assert file.imagej_metadata.get("spacing") == spacing and file.imagej_metadata["unit"] == "um"
                assert tiff_metadata(file)[0].z_spacing == spacing
        elif output.endswith("ome.tif"):
            with tifffile.TiffFile(tmp_path / "out" / output) as file:
                assert (tiff_metadata(file)[0].pixel_size, tiff_metadata(file)[0].z_spacing) == (0.5, spacing)
        elif output.endswith("zarr"):
            (page, _) = open_image(tmp_path / "out" / output).pages
            assert (page.pixel_size, page.z_spacing) == (0.5, spacing)

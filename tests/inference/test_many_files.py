"""`kg-detectron predict` and `kg-detectron rerun`: many files, interruptions, repetition."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from kg_detectron import load_model, predict
from kg_detectron.cells.separation import separate_cells
from kg_detectron.cli.main import main
from kg_detectron.export.results import KINDS
from kg_detectron.inference import save_model
from kg_detectron.inference.many_files import Settings, predict_files, rerun
from kg_detectron.inference.tiling import predict_tiled
from kg_detectron.io.images import read_image
from kg_detectron.modeling import KeypointGraphNet

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
# Random weights find "cells" everywhere, and other ones where a single level of the image changes.
TINY = {"depth": 18, "c0_channels": 4, "widths": (4, 6, 8, 8), "head_kernel": 3, "segmentation": "s1"}
TINY |= {"radius": 2.0, "smooth_sigma": 1.0, "peak_threshold": 0.0, "input_size": (32, 48)}


def saved(path: Path, seed: int = 0, **changes) -> Path:
    torch.manual_seed(seed)
    save_model(KeypointGraphNet(**TINY | changes), path)
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
    """All results, hidden files included, less the manifest, which holds times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_all_results_of_one_image_are_those_of_python(images: Path, model: Path, tmp_path: Path):
    out = tmp_path / "new" / "out"
    assert main(["predict", str(images / "good0.png"), "-m", str(model), "-o", str(out), "--save", "all"]) == 0
    (record,) = manifest(out)["files"]
    cells = separate_cells(predict(load_model(model), read_image(images / "good0.png")))
    assert record["cells"] == len(cells["scores"]) > 10
    np.testing.assert_array_equal(labels(out / "good0_labels.tif"), cells["masks"].label_image())
    assert len(record["outputs"]) == len(KINDS)
    assert set(record["outputs"]) == contents(out).keys()


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
        assert record["network_input"] == "32 x 48"
        assert f"{path}: 40 x 60 pixels, network saw 32 x 48, {record['cells']} cells" in printed
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
    assert main(["predict", str(images), str(images / "missing.png"), "-m", str(model), "-o", str(out)]) == 1
    errors = {Path(record["input"]).name: record["error"] for record in manifest(out)["files"]}
    bad = ["a text.png", "cut.tif", "dangling.png", "empty.tif", "folder.png", "missing.png"]
    assert sorted(name for name, error in errors.items() if error) == bad
    assert sorted(name for name, error in errors.items() if not error) == ["good0.png", "good1.png", "good2.png"]
    assert contents(out).keys() == {f"good{i}_{kind}" for i in range(3) for kind in ("labels.tif", "overlay.png")}
    printed = capsys.readouterr()
    assert "9 files: 3 done, 0 done before, 6 failed" in printed.out
    for name in bad:
        assert f"failed: {images / name}: " in printed.err and name in errors[name]
    assert main(["predict", *(str(images / name) for name in bad), "-m", str(model), "-o", str(tmp_path / "bad")]) == 2


def test_any_failure_is_of_its_file_alone(images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails_once(*arguments, **keywords):
        monkeypatch.setattr("kg_detectron.inference.many_files.predict", predict)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("kg_detectron.inference.many_files.predict", fails_once)
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
    assert done(settings={"size": "native", "tile": 64}) == ["good0", "good1", "good2"]
    assert done(settings={"size": "native", "tile": 64}) == []
    before = contents(out)
    assert done("other") == ["good0", "good1", "good2"]
    assert all(data != before[name] for name, data in contents(out).items())


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
from kg_detectron.inference import batch

real, count = os.replace, 0
def dying(source, target):
    global count
    count += target.name != "run.json"
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
        batch.predict_files([images], model, out, batch.Settings(save=batch.KINDS))
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
        assert len(left) == max(0, moment - 1)
        assert left.items() <= contents(whole).items()
        assert not predict_files([images], model, out, Settings(save=KINDS)).failed
        assert contents(out) == contents(whole)


def test_an_interrupted_run_keeps_its_manifest(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(*arguments)

    monkeypatch.setattr("kg_detectron.inference.many_files.predict", interrupted)
    assert main(["predict", str(images), "-m", str(model), "-o", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [record["name"] for record in manifest(tmp_path / "out")["files"]] == ["good0"]
    assert len(predict_files([images], model, tmp_path / "out").skipped) == 1


@pytest.mark.parametrize("kind", ["fixed", "percentile"])
@pytest.mark.parametrize("size", ["training", "native"])
def test_16_bits_give_the_labels_of_8_bits(models: dict[str, Path], tmp_path: Path, kind: str, size: str):
    eight = np.random.default_rng(5).integers(20, 200, (45, 70, 3), dtype=np.uint8)
    for image, name in ((eight, "eight"), (eight.astype(np.uint16) * 257, "sixteen")):
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric="rgb")
    tifffile.imwrite(tmp_path / "changed.tif", np.where(eight == 20, 190, eight).astype(np.uint8), photometric="rgb")
    settings = Settings(save=("labels",), size=size, tile=64)
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
    for i in (1, 2, 3):
        np.testing.assert_array_equal(labels(tmp_path / "out" / f"stack_page000{i}_labels.tif"), expected[i - 1])
    for name in ("unnamed", "channels"):
        np.testing.assert_array_equal(labels(tmp_path / "out" / f"{name}_labels.tif"), expected[1])


def test_pages_do_not_overwrite_another_file(model: Path, tmp_path: Path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([picture(1), picture(2)]), metadata={"axes": "ZYX"})
    Image.fromarray(picture(3)).save(tmp_path / "a_page0002.png")
    summary = predict_files([tmp_path], model, tmp_path / "out")
    assert [record.name for record in summary.failed] == ["a"] and "a_page0002" in summary.failed[0].error
    expected = separate_cells(predict(load_model(model), read_image(tmp_path / "a_page0002.png")))
    np.testing.assert_array_equal(labels(tmp_path / "out" / "a_page0002_labels.tif"), expected["masks"].label_image())


def test_the_size_that_the_network_sees(model: Path, tmp_path: Path):
    """Trained on 32 x 48: up to twice that an image is resized, above it is not."""
    for name, height, width in (("small", 64, 96), ("high", 65, 30), ("wide", 30, 97)):
        Image.fromarray(picture(0, height, width)).save(tmp_path / f"{name}.png")
    inputs = sorted(tmp_path.glob("*.png"))

    def seen(**settings) -> dict[str, str]:
        summary = predict_files(inputs, model, tmp_path / "out", Settings(save=("labels",), **settings))
        return {record.name: record.network_input for record in summary.done}

    assert seen(tile=64) == {"high": "tiles of 64", "small": "32 x 48", "wide": "tiles of 64"}
    image, network = read_image(tmp_path / "wide.png"), load_model(model)
    expected = separate_cells(predict_tiled(network, image.astype(np.float32), tile=64, overlap=256))
    assert len(expected["scores"]) > 10
    np.testing.assert_array_equal(labels(tmp_path / "out" / "wide_labels.tif"), expected["masks"].label_image())
    assert seen(size="native", tile=96) == {"high": "own pixels", "small": "own pixels", "wide": "tiles of 96"}
    assert set(seen(size="training").values()) == {"32 x 48"}


def test_overlaps_can_be_kept_in_coco_alone(images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = ["predict", str(images / "good0.png"), "-m", str(model), "-o", str(tmp_path / "out"), "--keep-overlaps"]
    assert main([*run, "--save", "coco", "labels"]) == 2
    assert "only coco" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*run, "--save", "coco"]) == 0
    found = json.loads((tmp_path / "out" / "good0_coco.json").read_text())["annotations"]
    expected = predict(load_model(model), read_image(images / "good0.png"))
    assert [a["segmentation"] for a in found] == expected["masks"].rle()
    assert [a["score"] for a in found] == expected["scores"].tolist()
    assert len(found) > len(separate_cells(expected)["scores"])


def test_doubtful_cells_can_be_left_out(images: Path, model: Path, tmp_path: Path):
    image = images / "good0.png"
    scores = predict(load_model(model), read_image(image))["scores"]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save", "labels", "video"], "video"),
        (["--channels", "1", "2"], "channels"),
        (["--pixel-size", "-1"], "pixel_size"),
        (["--size", "native", "--tile", "33"], "tile"),
        (["--device", "abacus"], "abacus"),
        (["--max-pixels", "0"], "max_pixels"),
        (["-m", "missing.pth"], "missing.pth"),
    ],
)
def test_bad_options_are_named_before_anything_is_done(
    images: Path, model: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert main(["predict", str(images), "-m", str(model), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absurd_sizes_are_refused(images: Path, model: Path, tmp_path: Path):
    summary = predict_files([images], model, tmp_path / "out", Settings(max_pixels=2399))
    assert len(summary.failed) == 3 and "60 x 40 pixels, more than the limit of 2399" in summary.failed[0].error


def test_help_names_every_kind_of_result(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)


def test_importing_the_package_is_light():
    code = "import sys, kg_detectron.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""What `kg-detectron predict` and its neighbours say before anything is computed: each bad option in a sentence."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kg_detectron.cli.main import main
from kg_detectron.export.kinds import KINDS
from kg_detectron.inference import model_names
from kg_detectron.inference.run_settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with an image, a text, and something that looks like a model."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("image.png")
    Path("README.md").write_text("# no model")
    Path("model.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(model_names, "KEPT_MODELS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "nuclei.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("image.png -m image.png", "image.png is no model file: expected a .safetensors file, or a checkpoint"),
        ("image.png -m README.md", "README.md is no model file: expected"),
        ("image.png -m kg_lite", "no model file kg_lite, and no kept model of that name (there are: nuclei)"),
        ("image.png -m kept", "kept is a folder, expected a model file"),
        ("image.png -m missing.pth", "there is no model file missing.pth"),
        ("image.png --device gpu", "--device: expected cpu, cuda, cuda:1 or mps, got 'gpu'"),
        ("image.png --min-score 50", "--min-score: expected a number of 0..1, got 50.0"),
        ("image.png --axes QQ", "--axes: expected different letters with Y and X, such as ZCYX, got 'QQ'"),
        ("image.png --axes zc", "got 'ZC'"),
        ("image.png -o README.md", "--output: expected a folder, but README.md is a file"),
        (
            "image.png --save labels video",
            "--save: expected some of labels, overlay, coco, geojson, roi, csv, classes, ome-tiff, zarr",
        ),
        ("image.png --save video", "got 'video'"),
        ("image.png --channels 1 2", "--channels: expected one or three, as names or numbers from 1, got 1 2"),
        ("image.png --channels 0", "--channels: expected one or three"),
        ("image.png --channels ''", "--channels: expected one or three, as names or numbers from 1, got ''"),
        ("image.png --channels ,", "--channels: expected one or three, as names or numbers from 1, got '' ''"),
        ("image.png --channels 'DAPI, ,2'", "--channels: expected one or three, as names or numbers from 1, got DAPI"),
        ("image.png --scene 0", "--scene: expected a name or a number from 1, got 0"),
        ("image.png --scene ''", "--scene: expected a name or a number from 1, got ''"),
        ("image.png --scale 1 --diameter 20", "--scale, --diameter: each sets the scale; expected one of them"),
        ("image.png --pixel-size -1", "--pixel-size: expected micrometres above 0, got -1.0"),
        ("image.png --diameter 0", "--diameter: expected pixels above 0, got 0.0"),
        ("image.png --tile 33", "--tile: expected a positive multiple of 32 pixels, got 33"),
        ("image.png --overlap -1", "--overlap: expected 0 or more pixels, got -1"),
        ("image.png --max-pixels 0", "--max-pixels: expected 1 or more, got 0"),
        ("image.png --keep-overlaps", "--keep-overlaps, --save: only coco can hold cells that overlap"),
        ("--save labels", "expected at least one FILE, DIR or GLOB"),
    ],
)
def test_bad_options_are_named_as_typed_before_anything_is_done(
    folder: Path, options: str, message: str, capsys: pytest.CaptureFixture
):
    before = sorted(folder.iterdir())
    assert main(["predict", "-o", "out", "-m", "model.pth", *shlex.split(options)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "command", ["check-data images masks", "convert images masks -o c.json", "explain i.png -o o.png"]
)
def test_a_choice_of_no_channel_is_the_options_fault_in_all_commands(
    folder: Path, command: str, capsys: pytest.CaptureFixture
):
    assert main([*command.split(), "--channels", ""]) == 2
    assert capsys.readouterr().err == (
        "kg-detectron: error: --channels: expected one or three, as names or numbers from 1, got ''\n"
    )


def test_images_behind_save_and_channels_are_images(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import kg_detectron.inference.many_files as many_files

    calls = []
    empty = many_files.Summary([], [], [])
    monkeypatch.setattr(many_files, "predict_files", lambda *a, **k: calls.append(a) or empty)
    for options in (
        "--save labels overlay image.png",
        "--save labels,overlay image.png",
        "image.png --save labels overlay",
        "--channels DAPI image.png --save labels overlay",
        "--save labels overlay *.png",
    ):
        assert main(["predict", "-o", "out", "-m", "model.pth", *options.split()]) == 0
        inputs, _, _, settings = calls.pop()
        assert inputs in (["image.png"], ["*.png"]) and settings.save == ("labels", "overlay")
        assert settings.channels == (("DAPI",) if "DAPI" in options else None)


def test_a_wrong_option_is_answered_without_pytorch(folder: Path):
    code = "import sys; from kg_detectron.cli import main; status = main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = ["predict", "image.png", "-o", "out", "-m", "model.pth", "--min-score", "50"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)
    assert run.stdout.strip() == "False" and "--min-score: expected" in run.stderr


def test_a_prediction_does_not_import_the_compiler_of_pytorch(folder: Path):
    code = (
        "import sys; from kg_detectron.cli import main; main(sys.argv[1:])\n"
        "print(sorted({'torch._dynamo', 'torchvision', 'matplotlib', 'sympy'} & set(sys.modules)))"
    )
    arguments = ["predict", folder / "image.png", "-o", folder / "out"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "1 done" in run.stdout and run.stdout.splitlines()[-1] == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("command", ["predict", "rerun", "models", "explain", "evaluate", "report", "train", "doctor"])
def test_help_is_light(command: str):
    code = (
        "import sys; from kg_detectron.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "False"


def test_help_tells_kinds_defaults_and_an_example(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(kind in printed for kind in (*KINDS, "or all"))
    for text in (
        f"(default: {Settings.tile})",
        f"(default: {Settings.overlap})",
        "(default: nuclei)",
        "Example: kg-detectron predict",
    ):
        assert text in printed


def test_models_are_listed(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["models"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nuclei") and "the default" in line
    (folder / "kept" / "nuclei.safetensors").unlink()
    assert main(["models"]) == 2


def test_rerun_of_what_is_no_run(folder: Path, capsys: pytest.CaptureFixture):
    for given, message in (
        ("nowhere", "nowhere: no such folder or file"),
        ("kept", "run.json: there is no such file; expected the run.json of a prediction, or its folder"),
        ("README.md", "not the manifest of a prediction"),
    ):
        assert main(["rerun", given]) == 2
        assert message in capsys.readouterr().err


def test_a_picture_of_an_explanation_is_a_png(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["explain", "image.png", "-m", "model.pth", "-o", "e.jpg"]) == 2
    assert "--output: expected a name that ends in .png" in capsys.readouterr().err
    assert not Path("e.jpg").exists()


def test_a_reader_that_has_seen_enough_ends_it_quietly(folder: Path):
    code = "import sys, os; from kg_detectron.cli import main; sys.exit(main(sys.argv[1:]))"
    read, write = subprocess.os.pipe()
    subprocess.os.close(read)
    run = subprocess.run(
        [sys.executable, "-c", code, "models"],
        env={"PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    subprocess.os.close(write)
    assert run.stderr == "" and run.returncode in (0, 141)

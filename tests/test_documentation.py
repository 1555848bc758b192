"""What README and docs show: every command is one that the program takes, and those of README's first pages run."""

import argparse
import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from kg_detectron.cli.main import build_parser, main
from kg_detectron.synthetic import nuclei_image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]
PAGES.append(ROOT / "kg_detectron" / "models" / "README.md")


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for name, block in fences if name == language]


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, split into words as a shell does."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("kg-detectron ", "python "))]


SHOWN = [
    (page.relative_to(ROOT).as_posix(), words) for page in PAGES for block in blocks(page) for words in commands(block)
]
OURS = [(name, words[1:]) for name, words in SHOWN if words[0] == "kg-detectron"]
SCRIPTS = [(name, words[1:]) for name, words in SHOWN if words[0] == "python" and words[1].endswith(".py")]


def test_commands_are_found() -> None:
    assert len(OURS) > 20 and len(SCRIPTS) > 10


@pytest.mark.parametrize(("page", "words"), OURS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_the_program_takes_the_command(page: str, words: list[str]) -> None:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = build_parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{page}: kg-detectron {shlex.join(words)}: {errors.getvalue()}")
    assert isinstance(arguments, argparse.Namespace) and callable(arguments.run)


@pytest.mark.parametrize(("page", "words"), SCRIPTS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_the_script_has_the_options(page: str, words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"{page} shows {words[0]}"
    # Of what it imports too: Detectron2's own options are in its argument parser.
    source = script.read_text(encoding="utf-8") + '"--config-file" "--num-gpus" "--num-machines" "--resume"'
    source += '"--eval-only" "--machine-rank" "--dist-url"' * (script.name == "train_net.py")
    source += "".join(p.read_text(encoding="utf-8") for p in script.with_suffix("").glob("*.py"))
    source += (ROOT / "datasets" / "preparation.py").read_text(encoding="utf-8")
    missing = [word for word in words if word.startswith("--") and f'"{word.split("=")[0]}"' not in source]
    assert not missing, f"{page}: {shlex.join(words)}"
    configs = [word for word in words if word.startswith("configs/")]
    assert all((ROOT / config).is_file() for config in configs), f"{page}: {configs}"


def test_the_program_has_the_messages() -> None:
    """What docs/messages.md explains is what the program says."""
    rows = (ROOT / "docs" / "messages.md").read_text(encoding="utf-8").splitlines()
    shown = [match[1] for row in rows if (match := re.match(r"\| `([^`]+)` \|", row))]
    assert len(shown) > 15
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kg_detectron").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # sentences that go on in the next line
    assert not [message for message in shown if message not in source]


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the commands of README and docs name."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for images, masks, names in (("images", "masks", "abcd"), ("new_images", "new_masks", "e")):
        for name in names:
            image, labels = drawn_cells(rng)
            write_png(f"{images}/{name}.png", image)
            write_png(f"{masks}/{name}.png", labels)
    write_png("examples/a.png", image)  # in place of the checkout's own, which take longer
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite("plate.ome.tif", np.stack((grey, grey[::-1])), metadata=metadata)
    return tmp_path


def drawn_cells(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of six nuclei, (96, 96, 3), and its label image."""
    image, cells = nuclei_image(rng, 96, 96, 6)
    labels = np.zeros((96, 96), np.uint8)
    for number, mask in enumerate(cells, start=1):
        labels[np.asarray(mask, bool)] = number
    return image, labels


def write_png(path: str, image: np.ndarray) -> None:
    """Write an image, and make its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(path, image)


def run_commands(page: str, *left_out: str) -> set[str]:
    """Run the commands of a page but those of some names. Trainings get two iterations instead of twenty minutes."""
    shown = [words for name, words in OURS if name == page and words[0] not in left_out]
    for words in shown:
        short = ["--iterations", "2"] if words[0] == "train" else []
        assert main([*words, *short]) == 0, f"{page}: {shlex.join(words)}"
    return {words[0] for words in shown}


def test_commands_of_the_readme_run(laboratory: Path) -> None:
    """Prediction, and training on one's own data. `doctor` judges this machine; tests/cli/test_doctor.py runs it."""
    ran = run_commands("README.md", "doctor")
    assert {"predict", "explain", "check-data", "train", "evaluate"} <= ran
    assert (laboratory / "new_cells" / "e_labels.tif").exists() and (laboratory / "run" / "model.safetensors").exists()
    assert (laboratory / "explained.png").exists() and (laboratory / "cells" / "cells.csv").exists()
    (program,) = blocks(ROOT / "README.md", "python")
    exec(compile(program, "README.md", "exec"), {})


def test_commands_of_prediction_and_evaluation_run(laboratory: Path) -> None:
    """Those of predict.md and evaluate.md; `export` needs packages of its own and has tests of its own."""
    image = cv2.imread("images/a.png")
    assert image is not None
    Path("plates/1").mkdir(parents=True)
    tifffile.imwrite("plates/1/well_1.tif", image, photometric="rgb")
    for name in "bcd":  # one image is enough
        Path(f"images/{name}.png").unlink()
        Path(f"masks/{name}.png").unlink()
    assert {"predict", "rerun", "models"} <= run_commands("docs/predict.md", "export")
    assert main(["convert", "images", "masks", "-o", "instances_val.json"]) == 0
    assert main(["predict", "images", "-o", "predicted", "--save", "labels,coco"]) == 0
    for run in ("kg", "mask_rcnn", "output/comparison/kg_dsb2018"):
        Path(run).mkdir(parents=True)
        shutil.copy("predicted/a_coco.json", f"{run}/predictions.json")
    Path("masks").rename("truth")
    shutil.copytree("images", "val")
    assert {"evaluate", "report"} <= run_commands("docs/evaluate.md")
    assert (laboratory / "report.html").stat().st_size > 1000 and (laboratory / "figures.json").exists()


def test_commands_of_classes_run(laboratory: Path) -> None:
    """Those of classes.md: a table, folders of classes and QuPath's GeoJSON give data that a network learns from."""
    rows = [f"{name}.png,{cell},{'AB'[cell % 2]}" for name in "abcd" for cell in range(1, 7)]
    Path("classes.csv").write_text("\n".join(["image,id,class", *rows]), encoding="utf-8")
    for name in "abcd":
        labels = cv2.imread(f"masks/{name}.png", cv2.IMREAD_GRAYSCALE)
        assert labels is not None
        for parity, folder in enumerate(("B", "A")):
            write_png(f"by_class/{folder}/{name}.png", np.where(labels % 2 == parity, labels, 0).astype(np.uint8))
    assert main(["predict", "images", "-o", "qupath", "--save", "geojson"]) == 0
    assert {"convert", "check-data", "train", "predict"} <= run_commands("docs/classes.md")
    assert (laboratory / "cells" / "e.geojson").exists()

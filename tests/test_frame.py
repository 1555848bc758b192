"""The frame of the project: versions, licence, pins, commands."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tomli
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kg_detectron

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12")
# Distributions whose import name is another.
IMPORT_NAMES = {"griffelib": "griffe", "opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
IMPORT_NAMES |= {"scikit-image": "skimage"}


@cache
def declared() -> dict[str, list[Requirement]]:
    """The requirements in pyproject.toml: ``core`` and each extra."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in lists.items()}


@cache
def pins(python: str) -> dict[str, Requirement]:
    """The lines of constraints.txt that hold for a version of Python, by canonical name."""
    result: dict[str, Requirement] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert canonicalize_name(pin.name) not in result, f"{pin.name} is pinned twice for Python {python}"
                result[canonicalize_name(pin.name)] = pin
    return result


def git_files() -> list[Path]:
    """Files that are, or would be, tracked."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("this folder is not a git checkout")
    return [path for path in (ROOT / name for name in listed.stdout.split("\0") if name) if path.is_file()]


def make_targets() -> set[str]:
    """The commands that ``make`` lists."""
    # Not as a part of a make that runs these tests: that one's flags and "Entering directory" do not belong here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return {line.split("\t")[0].strip() for line in shown.stdout.splitlines()[1:]}


def test_one_version_everywhere() -> None:
    reported = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.split()[-1] == kg_detectron.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == kg_detectron.__version__


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_exactly(python: str) -> None:
    for pin in pins(python).values():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], f"{pin} is no exact pin"
    for requirements in declared().values():
        for requirement in requirements:
            if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
                continue
            pin = pins(python).get(canonicalize_name(requirement.name))
            assert pin, f"pyproject.toml asks for {requirement}; constraints.txt has no pin of it for Python {python}"
            version = next(iter(pin.specifier)).version
            assert version in requirement.specifier, (
                f"pyproject.toml asks for {requirement}; constraints.txt pins {pin}"
            )


def test_every_import_is_declared() -> None:
    """What a package imports must come with its installation, not by the luck of somebody else's requirement."""
    extras = {
        "kg_detectron": ("core",),
        "kg_detectron/d2": ("core", "detectron2"),
        "kg_detectron/napari": ("core", "napari"),
        "datasets": ("core",),
        "tools": ("core", "detectron2", "docs", "napari"),
        "tests": ("core", "dev"),
        "tests/d2": ("core", "dev", "detectron2"),
        "tests/napari": ("core", "dev", "napari"),
    }
    for path in {path for folder in extras for path in (ROOT / folder).rglob("*.py")}:
        folder = max((folder for folder in extras if ROOT / folder in path.parents), key=len)
        names = {"kg_detectron", "detectron2"}
        for extra in extras[folder]:
            names |= {canonicalize_name(requirement.name) for requirement in declared()[extra]}
        known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names} | sys.stdlib_module_names
        known |= {
            script.stem
            for folder in (path.parent, *(ROOT / name for name in ("datasets", "tests", "tests/layers", "tools")))
            for script in folder.glob("*.py")
        }
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = {node.module}
            else:
                continue
            unknown = {name.split(".")[0] for name in imported} - known
            assert not unknown, (
                f"{path.relative_to(ROOT)}:{node.lineno} imports {unknown}, which setup.py does not ask for"
            )


def test_no_path_of_somebodys_machine_is_tracked() -> None:
    private = re.compile(r"(?<![\w.])/(home|Users|root|work)/\w+")
    this_file = Path(__file__).resolve()
    for path in git_files():
        if path.resolve() == this_file:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image or another binary file
        match = private.search(text)
        assert not match, f"{path.relative_to(ROOT)} has the path of a machine: {match.group(0)}"


def test_without_sanitizers_it_is_said_and_ci_goes_on(tmp_path: Path) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\necho libasan.so\n")
    (tmp_path / "g++").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(
        [sys.executable, "tools/sanitize.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("NOT TESTED WITH SANITIZERS: libasan.so")


def test_commands_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))
    commands = set(re.findall(r"\bmake ([a-z]+)", code))
    assert {"setup", "demo", "test"} <= commands, "README.md shows how to set up, see the demo and test"
    assert commands <= make_targets()
    scripts = set(re.findall(r"\b(?:python3? |\./)((?:tools|datasets)/\w+\.py)", code))
    assert {script for script in scripts if not (ROOT / script).is_file()} == set()


def test_unsupported_python_is_refused_by_name(tmp_path: Path) -> None:
    """With no fitting interpreter on the PATH, ``make`` says which ones fit and which one it met."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.20" || exit 1\n')
    old.chmod(0o755)
    for tool in ("sh", "make", "head", "rm"):
        program = subprocess.run(["sh", "-c", f"command -v {tool}"], capture_output=True, text=True).stdout.strip()
        (tmp_path / tool).symlink_to(program)
    run = subprocess.run(
        ["make", "setup", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "needs Python 3.10, 3.11 or 3.12; python3 is Python 3.8.20" in run.stderr
    assert not (tmp_path / "venv").exists()

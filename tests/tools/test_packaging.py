"""What a wheel has, and the files that build and test the package elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import yaml
from builders import ROOT

with open(ROOT / "pyproject.toml", "rb") as file:
    PYPROJECT = tomli.load(file)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_a_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    """By setuptools' own list, which takes no build: all that is no source of the compiled operators."""
    code = """
from distutils.core import run_setup
distribution = run_setup("setup.py", stop_after="init")
distribution.parse_config_files(["pyproject.toml"])
command = distribution.get_command_obj("build_py")
command.build_lib = "BUILD"
command.ensure_finalized()
print(*command.get_outputs(include_bytecode=False), sep="\\n")
"""
    code = "import setuptools" + code  # which brings its own distutils
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    packed = {line.removeprefix("BUILD/") for line in run.stdout.replace("\\", "/").splitlines()}
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kg_detectron").rglob("*")
        if path.is_file() and not {"__pycache__", "csrc"} & set(path.parts) and not path.name.startswith(("_C.", "."))
    }
    assert "kg_detectron/models/nuclei.safetensors" in ours and "kg_detectron/napari/napari.yaml" in ours
    assert ours - packed == set()
    configs = {f"kg_detectron/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) > 30 and configs - packed == set()


def test_a_wheel_is_built_against_the_declared_range_of_pytorch() -> None:
    """`pip wheel .` builds in an environment of its own, and left the operators out where PyTorch was missing there."""
    needs = PYPROJECT["build-system"]["requires"]
    assert [line for line in PYPROJECT["project"]["dependencies"] if line.startswith("torch>")] == [
        line for line in needs if line.startswith("torch>")
    ]
    assert "ninja" in needs


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflow_is_yaml_with_jobs_that_run_something(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["name"] and (True in workflow or "on" in workflow)  # YAML 1.1 reads "on" as true
    for job in workflow["jobs"].values():
        assert job["runs-on"] and any("run" in step for step in job["steps"])
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step


def test_workflows_cover_three_systems_and_the_newest_pytorch() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    for word in ("ubuntu-", "macos-", "windows-", "cron:", "--upgrade"):
        assert word in text


def test_conda_recipe_asks_for_what_the_package_asks_for() -> None:
    recipe = yaml.safe_load((ROOT / "packaging" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    on_conda = {
        "torch": "pytorch",
        "matplotlib": "matplotlib-base",
        "opencv-python-headless": "opencv",
    }
    run = {line.split(" ")[0] for line in recipe["requirements"]["run"]}
    for line in PYPROJECT["project"]["dependencies"]:
        name = line.split(">")[0].split("<")[0].strip()
        assert on_conda.get(name, name) in run, name


def test_dockerfile_installs_the_wheel_on_both_bases() -> None:
    text = (ROOT / "packaging" / "Dockerfile").read_text(encoding="utf-8")
    for word in ("AS build", "AS cpu", "AS cuda", "pip wheel", "kg-detectron"):
        assert word in text


def test_every_extra_is_in_the_table_of_the_documentation() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for extra in PYPROJECT["project"]["optional-dependencies"]:
        assert f"| `{extra}` |" in text, extra

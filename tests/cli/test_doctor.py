"""``kg-detectron doctor``: what works, what does not, and the command that mends it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kg_detectron.cli import doctor
from kg_detectron.cli.main import main
from kg_detectron.layers.ops import COMPILED_FOR

ROOT = Path(__file__).parents[2]
GPU = {"version": "2.11.0+cu130", "cuda": "13.0", "devices": ["Some GPU"]}
CPU = {"version": "2.11.0", "cuda": None, "devices": []}


def test_this_environment_works(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line[7:].partition(":")[0]: line for line in lines if not line.startswith("       ")}
    assert {"kg_detectron", "torch", "torchvision", "operators", "CUDA device", "Detectron2"} <= by_name.keys()
    assert "FAULT" not in "".join(lines)
    assert ("compiled for" in by_name["operators"]) == bool(COMPILED_FOR)
    installed = importlib.util.find_spec("detectron2") is not None
    assert ("not installed" in by_name["Detectron2"]) != installed


def test_all_faults_of_a_broken_environment_are_found_at_once(tmp_path):
    """A Detectron2 that does not import, a torchvision for another torch, operators for another torch."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    (tmp_path / "torchvision-9.9.dist-info").mkdir()
    (tmp_path / "torchvision-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\nRequires-Dist: torch (==9.8.7)\n"
    )
    (tmp_path / "_C.so").write_bytes(b"no library")
    code = "import sys; from kg_detectron.cli import main; sys.exit(main(['doctor']))"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "KG_DETECTRON_LIBRARY": str(tmp_path / "_C.so"),
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    lines = run.stdout.splitlines()
    remedies = dict(zip(lines, lines[1:], strict=False))
    for start, word, remedy in (
        ("FAULT  torchvision: 9.9 is made for torch 9.8.7", "installed is", doctor.INSTALL_TORCH),
        ("note   operators: not compiled", "_C.so does not load", doctor.BUILD_OPERATORS),
        ("FAULT  Detectron2: ", "undefined symbol: _ZN3c10", doctor.INSTALL_DETECTRON2),
    ):
        line = next((line for line in lines if line.startswith(start)), "")
        assert word in line, (start, run.stdout)
        assert remedies[line].strip() == remedy


@pytest.mark.parametrize(
    ("steps", "error", "name", "state", "text", "remedy"),
    [
        ({}, "libcudart.so.13: no such file", "torch", "FAULT", "libcudart", "pip install"),
        ({"torch": CPU}, "operator torchvision::nms does not exist", "torchvision", "FAULT", "nms", "pip install"),
        ({"torch": CPU, "torchvision": {}}, "the process ended with -11", "operators", "FAULT", "-11", "make setup"),
        (
            {"torch": GPU, "torchvision": {}, "operators": ["cpu", "cuda"], "cuda": {}},
            "",
            "CUDA device",
            "ok",
            "Some",
            "",
        ),
        (
            {"torch": GPU, "torchvision": {}, "operators": ["cpu"], "cuda": {}},
            "",
            "CUDA device",
            "note",
            "slow",
            "FORCE",
        ),
        (
            {"torch": GPU, "torchvision": {}, "operators": ["cpu", "cuda"]},
            "no kernel image is available",
            "CUDA device",
            "FAULT",
            "no kernel image",
            "pip install",
        ),
    ],
)
def test_what_the_trial_of_the_core_means(monkeypatch, steps, error, name, state, text, remedy):
    monkeypatch.setattr(doctor, "requires", lambda name: [])
    if "torchvision" in steps:
        steps = steps | {"torchvision": {"version": "0.26.0"}}
    if "operators" in steps:
        steps = steps | {"operators": {"compiled_for": steps["operators"], "problems": []}}
    finding = next(finding for finding in doctor._core(steps, error) if finding.name == name)
    assert finding.state == state and text in finding.text and remedy in finding.remedy
    assert bool(finding.remedy) == (state != "ok")


@pytest.mark.parametrize(
    ("has_driver", "cuda", "state", "remedy"),
    [
        (False, None, "ok", ""),
        (True, None, "note", doctor.INSTALL_TORCH),
        (True, "13.0", "note", "nvidia-smi"),
    ],
)
def test_a_gpu_that_torch_does_not_see(monkeypatch, has_driver, cuda, state, remedy):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if has_driver else None)
    finding = next(f for f in doctor._core({"torch": CPU | {"cuda": cuda}}, "") if f.name == "CUDA device")
    assert (finding.state, finding.remedy) == (state, remedy)


@pytest.mark.parametrize(
    ("own", "torch", "fits"),
    [
        ("0.26.0", "2.11.0", True),
        ("0.26.0+cu130", "2.11.0+cu130", True),
        ("0.26.0", "2.11.0+cpu", True),
        ("0.26.0", "2.10.0", False),
        ("0.26.0+cpu", "2.11.0+cu130", False),
    ],
)
@pytest.mark.parametrize("line", ["torch==2.11.0", "torch (==2.11.0)"])
def test_torch_and_torchvision_match(monkeypatch, own, torch, fits, line):
    monkeypatch.setattr(doctor, "_version", lambda distribution: own)
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", line])
    assert (doctor._mismatch(torch) is None) == fits


def test_detectron2_without_its_compiled_part_is_enough():
    (finding,) = doctor._detectron2({"detectron2": {}}, "ModuleNotFoundError: No module named 'detectron2._C'")
    assert finding.state == "ok" and "without its compiled part" in finding.text
    (finding,) = doctor._detectron2({"detectron2": {}}, "ImportError: undefined symbol: _ZN2at")
    assert finding.state == "note" and "_ZN2at" in finding.text and finding.remedy
    assert doctor._no_detectron2().state == "note" and doctor._no_detectron2().remedy


def test_absent_requirements_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.4", "roi-file>=1", 'no-such ; extra == "dev"'])
    (finding,) = doctor._requirements()
    assert finding.state == "FAULT" and finding.remedy == "pip install roi-file"

"""The memory of ``kg-detectron predict``, and what it imports."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kg_detectron.synthetic import nuclei_image

ROOT = Path(__file__).parents[2]
CODE = """
import resource, sys
from kg_detectron.cli import main
status = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
with open(sys.argv[-1] + ".figures", "w") as file:
    print(status, peak, "torch" in sys.modules, file=file)
"""
IMPORT = "import torch, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)"


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of the peak differs")
def test_a_run_and_its_repetition(tmp_path: Path):
    """At its own pixels an image of 520 x 696 takes less than 250 MB beyond PyTorch; done, it does not import it."""
    image, _ = nuclei_image(np.random.default_rng(0), 520, 696, 140)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    command = ["-c", CODE, "predict", str(tmp_path / "image.png"), "--device", "cpu", "--scale", "1", "-o"]
    run(*command, str(tmp_path / "out"))
    status, peak, has_torch = (tmp_path / "out.figures").read_text().split()
    assert status == "0" and has_torch == "True"
    assert float(peak) - float(run("-c", IMPORT)) < 250
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "run.json"}
    run(*command, str(tmp_path / "out"))
    assert (tmp_path / "out.figures").read_text().split()[::2] == ["0", "False"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "run.json"} == first

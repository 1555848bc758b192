"""The benchmark runs, on a small image."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_operators(device):
    small = "--size 64 --batches 1 2 --cells 3 --peaks 5 80 --boxes 2 --repeats 1".split()
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "ops", "--device", device, *small]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for case in ("hough_vote", "batch 2, 3 cells an image", "80 peaks take", "2 boxes"):
        assert case in run.stdout

"""Reads and writes of the CUDA kernels stay inside their tensors: run on the CPU, under AddressSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_sources import HERE, ROOT
from stand_in import BOUNDS_FAULTS, FaultyCopy

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the stand-in for CUDA needs g++"),
    pytest.mark.timeout(1200),  # seconds; the first test compiles the kernels
]


def run_bounds(*operators: str) -> subprocess.CompletedProcess:
    """Run bounds.py with AddressSanitizer's library loaded first, as it must be."""
    names = ("libasan.so", "libstdc++.so")
    asked = [["g++", f"-print-file-name={name}"] for name in names]
    libraries = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in asked]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("AddressSanitizer is not installed")
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(HERE / "bounds.py"), *operators]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_all_kernels_stay_inside_their_tensors():
    run = run_bounds()
    assert run.returncode == 0 and "within bounds" in run.stdout, run.stderr


@pytest.mark.parametrize("fault", BOUNDS_FAULTS, ids=lambda fault: fault.operator)
def test_an_index_beyond_the_last_is_found(fault: FaultyCopy) -> None:
    run = run_bounds(fault.operator)
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr and f"{fault.name}.cu" in run.stderr, run.stderr
    access = "WRITE of size" if fault.fault == "writing_beyond" else "READ of size"
    assert access in run.stderr, run.stderr

"""The compiled library and the installed PyTorch: what does not fit is named, and the reference runs."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from builders import ROOT

from kg_detectron.layers import ops

CODE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from kg_detectron.layers import hough_vote, ops
print(sorted(ops.COMPILED_FOR), *(w.message for w in caught), sep="\\n")
import torch
print(hough_vote(torch.ones(1, 5, 4, 4), torch.zeros(1, 10, 4, 4), 5.0).shape)
"""


def test_a_library_fits_the_minor_version_that_it_was_built_for(tmp_path: Path) -> None:
    library, note = tmp_path / "_C.pyd", tmp_path / "_C.torch"
    assert ops._mismatch(library) == "", "of a library without a note nothing is known"
    major, minor, *_ = torch.__version__.split(".")
    for built_for, fits in ((torch.__version__, True), (f"{major}.{minor}.99+cpu", True), ("1.13.1+cu117", False)):
        note.write_text(f"{built_for}\n")
        message = f"it was built for PyTorch {built_for}, and {torch.__version__} is installed"
        assert ops._mismatch(library) == ("" if fits else message)


def test_a_library_for_another_pytorch_is_not_loaded_and_the_reference_runs(tmp_path: Path) -> None:
    (tmp_path / "_C.pyd").write_bytes(b"no library: an attempt to load it would say so")
    (tmp_path / "_C.torch").write_text("1.13.1+cu117\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KG_DETECTRON_LIBRARY": str(tmp_path / "_C.pyd")}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[]\n"), "nothing is compiled"
    assert "_C.pyd does not load (it was built for PyTorch 1.13.1+cu117, and" in run.stdout
    assert "make setup" in run.stdout and "torch.Size([1, 5, 4, 4])" in run.stdout

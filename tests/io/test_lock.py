"""A folder of results belongs to one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from kg_detectron.io.lock import FolderInUse, locked

HOLDER = """
import sys, time
from kg_detectron.io.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_dies(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cells"
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], cwd=root, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=r"cells: another command is writing into this folder"), locked(folder):
            pass
        with locked(tmp_path):  # another folder
            pass
        holder.kill()
        holder.wait()
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_it_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []

"""Files that appear whole or not at all."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kg_detectron.io import atomic


def test_where_folders_cannot_be_opened_they_are_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where opening one is refused."""
    flushed = []

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    names = vars(os) | {"name": "nt", "open": refuse, "fsync": flushed.append}
    monkeypatch.setattr(atomic, "os", SimpleNamespace(**names))
    with atomic.replacing(tmp_path / "a", durable=True) as unfinished:
        unfinished.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole" and len(flushed) == 1
    monkeypatch.setattr(atomic.os, "name", "posix")
    with pytest.raises(PermissionError), atomic.replacing(tmp_path / "a", durable=True) as unfinished:
        unfinished.write_text("new")


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "new" / "folder" / "a") as unfinished:
        unfinished.write_text("whole")
    assert (tmp_path / "new" / "folder" / "a").read_text() == "whole"


@pytest.mark.parametrize("name", [".", "..", "folder"])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(IsADirectoryError, match="it is a folder, expected a file") as error:
        with atomic.replacing(name) as unfinished:
            unfinished.write_text("whole")
    assert error.value.filename == name
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "here"]

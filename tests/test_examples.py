"""The examples: images with their masks, and the notebook from top to bottom."""

import os
from pathlib import Path

import pytest
from builders import ROOT

from kg_detectron.io.finding import find_images
from kg_detectron.io.images import read_image
from kg_detectron.io.labels import read_label_image

EXAMPLES = ROOT / "examples"


def test_every_image_has_its_label_image(tmp_path: Path) -> None:
    paths = [item.path for item in find_images([EXAMPLES], tmp_path).inputs]
    assert [path.stem for path in paths] == ["bright_field", "fluorescence", "stained_tissue"]
    for path in paths:
        labels = read_label_image(EXAMPLES / "masks" / f"{path.stem}.tif")
        assert labels.shape == read_image(path).shape[:2] and labels.max() > 5
        assert path.stat().st_size < 150_000


@pytest.mark.notebook
def test_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs make every run a change: clear them"
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the cells are shown"
    text = "".join(output.get("text", "") for output in outputs)
    assert "before: " in text and "after: " in text
    assert "is not compiled" not in text

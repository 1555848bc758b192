"""Label images with the measurements beside them, and the manifest that announces reader and widget."""

from pathlib import Path

import numpy as np
import pytest
import tomli
import torch
from builders import ROOT

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cells.class_colours import class_colours
from kg_detectron.export.label_images import LabelStack
from kg_detectron.export.measurements import write_table
from kg_detectron.export.results import save_results

MANIFEST = ROOT / "kg_detectron" / "napari" / "napari.yaml"


@pytest.fixture
def manifest():
    """The manifest, known to npe2 as if the package were installed."""
    npe2 = pytest.importorskip("npe2")
    known = npe2.PluginManager.instance()
    loaded = npe2.PluginManifest.from_file(MANIFEST)
    if loaded.name not in known:
        known.register(loaded)
    return loaded


def test_manifest_is_valid_and_its_commands_exist(manifest) -> None:
    manifest.validate_imports()
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomli.load(file)["project"]
    assert project["entry-points"]["napari.manifest"] == {project["name"]: "kg_detectron.napari:napari.yaml"}
    assert manifest.name == project["name"]


def test_napari_opens_a_label_image_with_its_measurements(manifest, viewer, tmp_path: Path) -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[2:8, 3:9], labels[10:18, 12:25] = 1, 2
    masks = MaskCrops.from_label_image(labels)
    cells = Cells(masks.windows.float(), torch.tensor([0.9, 0.5]), torch.ones(2, dtype=torch.long), masks)
    save_results(cells, np.full((20, 30), 7, np.uint8), tmp_path, "a", pixel_size=0.5)
    (layer,) = viewer.open(tmp_path / "a_labels.tif", plugin="kg_detectron")
    assert np.array_equal(layer.data, labels)
    assert list(layer.features["index"]) == [1, 2]
    assert list(layer.features["area_px"]) == [36, 104]
    assert layer.metadata["pixel_size_um"] == pytest.approx(0.5)
    assert "area_px: 104" in str(layer.get_status((12, 14), world=True))


def test_cells_have_the_colours_of_their_classes(manifest, viewer, tmp_path: Path) -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[2:8, 3:9], labels[10:18, 12:25] = 1, 2
    masks = MaskCrops.from_label_image(labels)
    cells = Cells(masks.windows.float(), torch.tensor([0.9, 0.5]), torch.tensor([2, 1]), masks)
    names = ("round", "dark")
    kinds = ("labels", "csv", "classes")
    save_results(cells, np.full((20, 30), 7, np.uint8), tmp_path, "a", kinds, category_names=names)
    (layer,) = viewer.open(tmp_path / "a_labels.tif", plugin="kg_detectron")
    assert list(layer.features["class"]) == ["dark", "round"]
    first, second = (tuple(np.round(255 * layer.get_color(id_)).astype(int)[:3]) for id_ in (1, 2))
    assert (second, first) == class_colours(2)


def test_ids_of_a_stack_count_on_and_keep_their_rows(tmp_path: Path) -> None:
    from kg_detectron.napari.reader import get_reader

    stack = LabelStack((2, 4, 6), "TYX", tmp_path)
    stack.add(0, np.array([[1, 2, 0, 0, 0, 0]] * 4))
    stack.add(1, np.array([[0, 0, 0, 0, 2, 1]] * 4))
    stack.write(tmp_path / "a_labels.tif")
    for page in (1, 2):
        columns = {"id": np.array([1, 2]), "area_px": np.array([4, 40]) * page, "page": np.array([page, page])}
        write_table(tmp_path / f"a_page{page:04d}_cells.csv", columns)
    reader = get_reader(str(tmp_path / "a_labels.tif"))
    assert reader is not None
    ((labels, options, kind),) = reader(str(tmp_path / "a_labels.tif"))
    assert kind == "labels" and labels.shape == (2, 4, 6)
    assert labels[0, 0].tolist() == [1, 2, 0, 0, 0, 0] and labels[1, 0].tolist() == [0, 0, 0, 0, 4, 3]
    assert options["features"]["index"].tolist() == [1, 2, 3, 4]
    assert options["features"]["area_px"].tolist() == [4, 40, 8, 80]


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    from kg_detectron.napari.reader import get_reader, read_results

    assert get_reader("a.tif") is None and get_reader([]) is None
    LabelStack((1, 4, 6), "TYX", tmp_path).write(tmp_path / "b_labels.tif")
    ((_, options, _),) = read_results([str(tmp_path / "b_labels.tif")])
    assert options["features"] == {}, "without a table there are no features"

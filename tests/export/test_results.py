"""All files of one result: each read back, each the same when written twice."""

import csv
import dataclasses
import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import roifile
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import regionprops

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cells.label_plane import LabelPlane
from kg_detectron.cells.separation import separate_cells
from kg_detectron.export.outlines import outline
from kg_detectron.export.results import KINDS, result_files, save_results
from kg_detectron.io.labels import read_label_image, write_label_image


def random_cells(seed: int, count: int, height: int, width: int) -> Cells:
    """Separate cells of one pixel up to the whole image, with holes, at the borders, and touching."""
    generator = np.random.default_rng(seed)
    crops, windows = [], []
    for _ in range(count):
        x1, y1 = int(generator.integers(width)), int(generator.integers(height))
        x2, y2 = int(generator.integers(x1 + 1, width + 1)), int(generator.integers(y1 + 1, height + 1))
        windows.append([x1, y1, x2, y2])
        crops.append(torch.from_numpy(generator.random((y2 - y1, x2 - x1)) < generator.choice([0.4, 0.8, 1])))
    windows = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
    return separate_cells(
        Cells(
            windows + torch.from_numpy(generator.random((count, 4))).float(),
            torch.from_numpy(generator.random(count)).float(),
            torch.ones(count, dtype=torch.int64),
            MaskCrops(crops, windows, (height, width)),
        )
    )


def filled(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(H,W) bool: pixels whose centre lies inside an odd number of rings of x, y."""
    mask = np.zeros(size, bool)
    for ring in rings:
        mask ^= polygon2mask(size, np.asarray(ring, float)[:, ::-1] - 0.5)
    return mask


def read_coco(path: Path) -> dict[int, np.ndarray]:
    dataset = COCO(path)
    return {id: dataset.annToMask(annotation).astype(bool) for id, annotation in dataset.anns.items()}


def read_geojson(path: Path, size: tuple[int, int]) -> dict[int, np.ndarray]:
    cells = {}
    for feature in json.loads(path.read_text())["features"]:
        properties = feature["properties"]
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert properties["objectType"] == "detection"
        rings = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] for ring in rings)
        assert properties["measurements"][0] == {"name": "id", "value": int(properties["name"])}
        assert uuid.UUID(feature["id"]) and properties["classification"]["name"] == "cell"
        cells[int(properties["name"])] = filled(rings, size)
    return cells


def read_rois(path: Path, size: tuple[int, int]) -> dict[int, np.ndarray]:
    rois = roifile.roiread(path) if path.stat().st_size > 22 else []  # a zip of 22 bytes has no members
    for roi in rois:
        corners = np.concatenate(roi.coordinates(multi=True))
        assert (roi.left, roi.top, roi.right, roi.bottom) == (*corners.min(axis=0), *corners.max(axis=0))
    return {int(roi.name): filled(roi.coordinates(multi=True), size) for roi in rois}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 5),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    channels=st.sampled_from([None, 1, 3, 4]),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
)
def test_every_file_holds_the_same_cells(folder, seed, count, height, width, channels, dtype):
    cells = random_cells(seed, count, height, width)
    size = (height, width) if channels is None else (height, width, channels)
    image = (np.random.default_rng(seed).random(size) * (1 if dtype == "float32" else np.iinfo(dtype).max)).astype(
        dtype
    )
    paths = save_results(cells, image, folder, "x", KINDS, pixel_size=0.25, source="folder/x.tif")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths.values())
    first = {kind: path.read_bytes() for kind, path in paths.items()}
    again = save_results(cells, image, folder, "x", KINDS, pixel_size=0.25, source="folder/x.tif")
    assert {kind: path.read_bytes() for kind, path in again.items()} == first

    expected = {i: mask.numpy() for i, mask in enumerate(cells["masks"], start=1)}
    labels = read_label_image(paths["labels"])
    assert labels.shape == (height, width) and labels.dtype == np.uint16
    contents = {
        "labels": {int(id): labels == id for id in np.unique(labels[labels > 0])},
        "coco": read_coco(paths["coco"]),
        "geojson": read_geojson(paths["geojson"], (height, width)),
        "roi": read_rois(paths["roi"], (height, width)),
    }
    for kind, found in contents.items():
        assert sorted(found) == sorted(expected), kind
        for id, mask in expected.items():
            np.testing.assert_array_equal(found[id], mask, err_msg=f"{kind}, cell {id}")
    assert np.asarray(Image.open(paths["overlay"])).shape[:2] == (height, width)

    rows = list(csv.DictReader(open(paths["csv"], newline="")))
    assert [int(row["id"]) for row in rows] == sorted(expected)
    for row, cell in zip(rows, regionprops(labels, intensity_image=image), strict=True):
        y, x = cell.centroid
        assert float(row["area_px"]) == cell.area and float(row["area_um2"]) == cell.area / 16
        assert float(row["centroid_x_px"]) == pytest.approx(x + 0.5)
        assert float(row["centroid_y_um"]) == pytest.approx((y + 0.5) / 4)
        assert 0 < float(row["perimeter_px"]) < 4 * cell.area + 1
        columns = {
            None: ["mean_intensity"],
            1: ["mean_intensity"],
            3: ["mean_intensity_blue", "mean_intensity_green", "mean_intensity_red"],
            4: [f"mean_intensity_channel{c}" for c in range(1, 5)],
        }[channels]
        means = [float(row[column]) for column in columns]
        assert means == pytest.approx(np.atleast_1d(cell.intensity_mean).tolist(), rel=1e-5)
    for row, score, box in zip(rows, cells["scores"].tolist(), cells["boxes"].tolist(), strict=True):
        assert float(row["score"]) == pytest.approx(score)
        assert [float(row[f"box_{side}_px"]) for side in ("x1", "y1", "x2", "y2")] == pytest.approx(box)


def test_coco_keeps_the_networks_boxes_and_scores(tmp_path):
    cells = random_cells(3, 5, 30, 40)
    content = json.loads(
        save_results(cells, np.zeros((30, 40)), tmp_path, "x", ["coco"], source="a/b.tif")["coco"].read_text()
    )
    assert [image["file_name"] for image in content["images"]] == ["b.tif"]
    for annotation, box, score in zip(
        content["annotations"], cells["boxes"].tolist(), cells["scores"].tolist(), strict=True
    ):
        x, y, w, h = annotation["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(box, abs=1e-9) and annotation["score"] == score


@given(seed=st.integers(0, 2**31), density=st.sampled_from([0.5, 0.7, 0.9]))
def test_rings_of_an_outline_are_simple_polygons(seed, density):
    generator = np.random.default_rng(seed)
    pieces, _ = ndimage.label(generator.random(tuple(generator.integers(1, 12, 2))) < density)
    mask = pieces == pieces.max()
    if not pieces.any():
        with pytest.raises(ValueError, match="one 4-connected component, got 0"):
            outline(pieces > 0)
        return
    rings = outline(mask)
    _, background = ndimage.label(np.pad(~mask, 1, constant_values=True))
    assert len(rings) == background  # one for the outside, one for each hole
    areas = []
    for ring in rings:
        assert len(np.unique(ring, axis=0)) == len(ring)  # it never meets itself
        step = np.roll(ring, -1, axis=0) - ring
        assert ((step != 0).sum(axis=1) == 1).all()  # horizontal and vertical sides
        areas.append((ring[:, 0] * step[:, 1] - ring[:, 1] * step[:, 0]).sum() / 2)
    assert areas[0] > 0 and all(area < 0 for area in areas[1:]) and sum(areas) == mask.sum()


def test_cells_that_are_not_separate_are_refused(tmp_path):
    cells = random_cells(0, 1, 8, 8)
    assert len(cells["masks"]) == 1
    twice = cells[[0, 0]]
    with pytest.raises(ValueError, match="separate_cells"):
        save_results(twice, np.zeros((8, 8)), tmp_path, "x", ["labels"])
    for crop in (np.eye(3, dtype=bool), np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)):
        masks = MaskCrops([torch.from_numpy(crop)], torch.tensor([[0, 0, 3, 3]]), (8, 8))
        with pytest.raises(ValueError, match=f"cell 1.*component, got {crop.sum()}"):
            save_results(dataclasses.replace(cells, masks=masks), np.zeros((8, 8)), tmp_path, "x", ["geojson"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kinds": ["labels", "svg"]}, "kinds: expected some of labels, overlay.*'svg'"),
        ({"image": np.zeros((8, 9))}, r"image: .*\(8, 8\).*\(8, 9\)"),
        ({"pixel_size": 0.0}, "pixel_size.*0.0"),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(tmp_path, arguments, message):
    given = {"image": np.zeros((8, 8)), "folder": tmp_path, "stem": "x", "kinds": KINDS} | arguments
    with pytest.raises(ValueError, match=message):
        save_results(random_cells(0, 2, 8, 8), **given)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    cells = random_cells(0, 2, 8, 8)
    old = {
        kind: path.read_bytes() for kind, path in save_results(cells, np.zeros((8, 8)), tmp_path, "x", KINDS).items()
    }
    names = sorted(tmp_path.iterdir())

    def broken(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)  # the last step, when the new file is complete beside the old one
    other = random_cells(1, 3, 8, 8)
    for kind in KINDS:
        with pytest.raises(OSError, match="disk full"):
            save_results(other, np.ones((8, 8)), tmp_path, "x", [kind])
    assert sorted(tmp_path.iterdir()) == names
    assert {kind: path.read_bytes() for kind, path in result_files(tmp_path, "x").items()} == old


def test_large_label_images_are_never_in_memory_and_in_tiles_only_above_2_gb(tmp_path, monkeypatch):
    monkeypatch.setattr("kg_detectron.cells.label_plane._LARGE", 100)
    monkeypatch.setattr("kg_detectron.export.label_images._STRIP", 1000)
    cells = random_cells(5, 5, 40, 50)
    seen = []
    monkeypatch.setattr(
        "kg_detectron.export.overlay.draw_cells", lambda image, labels, **_: seen.append(labels) or image[..., :3]
    )
    for striped, tiled in ((2**31, False), (2000, True)):
        monkeypatch.setattr("kg_detectron.export.label_images._STRIPED", striped)
        path = save_results(cells, np.zeros((40, 50, 3)), tmp_path, "x", ["labels", "overlay"])["labels"]
        assert isinstance(seen.pop(), LabelPlane)
        with tifffile.TiffFile(path) as file:
            assert file.is_bigtiff == tiled and file.pages[0].is_tiled == tiled
            assert len(file.pages[0].dataoffsets) == (1 if tiled else 4)  # strips of 12 rows
        np.testing.assert_array_equal(read_label_image(path), cells["masks"].label_image())
        assert sorted(file.name for file in tmp_path.iterdir()) == ["x_labels.tif", "x_overlay.png"]


def test_reading_label_images(tmp_path):
    labels = np.arange(12, dtype=np.uint32).reshape(3, 4) * 30_000
    write_label_image(tmp_path / "a.tif", labels)
    read = read_label_image(tmp_path / "a.tif")
    assert read.dtype == np.uint32
    np.testing.assert_array_equal(read, labels)
    Image.fromarray((labels // 6).astype(np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.png"), labels // 6)
    with pytest.raises(FileNotFoundError):
        read_label_image(tmp_path / "none.tif")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("float.tif", np.full((3, 4), 0.5, np.float32), "float"),
        ("colour.tif", np.arange(36, dtype=np.uint8).reshape(3, 4, 3), ""),
        ("negative.tif", np.full((3, 4), -2, np.int16), "-2"),
        ("text.png", b"no image", "cannot be read"),
        ("empty.tif", b"", "cannot be read"),
        ("cut.tif", b"II*\0\x08\0\0\0", "cannot be read"),
    ],
)
def test_what_is_no_label_image_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else tifffile.imwrite(path, content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_label_image(path)

"""Results of stacks and of channels: positions, planes, pixel sizes, names; read by ImageJ itself where it is."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import roifile
import tifffile
import torch
from skimage.measure import regionprops_table

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.export.kinds import EXPORTERS, KINDS_OF_STACKS
from kg_detectron.export.label_images import LabelStack, write_labels
from kg_detectron.export.results import Result, save_results, write_results
from kg_detectron.io.ome_zarr import is_zarr_installed

IMAGEJ = sorted(Path("/usr/share/java").glob("ij-*.jar")) or sorted(Path("/usr/share/java").glob("ij.jar"))


def two_cells(shift: int = 0, size: tuple[int, int] = (64, 80)) -> Cells:
    """A rectangle, and one with a hole; both move with the page."""
    ring = torch.ones(10, 12, dtype=torch.bool)
    ring[4:6, 4:6] = False
    windows = torch.tensor([[5 + shift, 6, 17 + shift, 16], [30, 20 + shift, 42, 30 + shift]])
    return Cells(
        windows.float(),
        torch.tensor([0.9, 0.8]),
        torch.ones(2, dtype=torch.int64),
        MaskCrops([torch.ones(10, 12, dtype=torch.bool), ring], windows, size),
    )


def stack(axes: str, shape: tuple[int, ...], pixel_size: float | None = 0.325) -> list[Result]:
    return [
        Result(
            two_cells(page),
            np.full((64, 80), 10 * (page + 1), np.uint8),
            "stack.tif",
            pixel_size,
            page=page + 1,
            position=dict(zip(axes, index, strict=True)),
        )
        for page, index in enumerate(np.ndindex(*shape))
    ]


STACKS = [("Z", (3,)), ("T", (4,)), ("TZ", (2, 3)), ("ZT", (3, 2)), ("I", (2,))]


@pytest.mark.parametrize(("axes", "shape"), STACKS)
def test_one_label_image_with_the_axes_of_the_stack(tmp_path: Path, axes: str, shape: tuple[int, ...]):
    results = stack(axes, shape)
    EXPORTERS["labels"].write_stack(tmp_path / "s_labels.tif", results)
    with tifffile.TiffFile(tmp_path / "s_labels.tif") as file:
        (series,) = file.series
        assert series.shape == (*shape, 64, 80)
        assert series.axes == f"{axes}YX".replace("I", "Z")
        labels = series.asarray()
        if axes != "ZT":
            assert file.is_imagej and file.imagej_metadata["unit"] == "um"
        else:
            assert 'PhysicalSizeX="0.325"' in file.ome_metadata
    for page, result in zip(labels.reshape(-1, 64, 80), results, strict=True):
        np.testing.assert_array_equal(page, result.label_image)


def test_ids_above_65535_and_large_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kg_detectron.export.label_images._MAPPED", 100)
    for tiled in (False, True):
        labels = LabelStack((2, 40, 50), "ZYX", tmp_path)
        assert all(isinstance(page, np.memmap) for page in labels.pages)
        pages = np.arange(4000, dtype=np.uint32).reshape(2, 40, 50) * 100
        for page in range(2):
            labels.add(page, pages[page])
        labels.write(tmp_path / "many.tif", 0.5)
        with tifffile.TiffFile(tmp_path / "many.tif") as file:
            assert file.is_ome and file.series[0].dtype == np.uint32 and file.pages[0].is_tiled == tiled
            np.testing.assert_array_equal(file.asarray(), pages)
        monkeypatch.setattr("kg_detectron.export.label_images._STRIPED", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["many.tif"]


@pytest.mark.parametrize("pixel_size", [None, 0.325])
def test_the_pixel_size_of_a_label_image(tmp_path: Path, pixel_size: float | None):
    for name in ("a.tif", "b.tif"):
        write_labels(tmp_path / name, np.arange(20, dtype=np.uint16).reshape(4, 5), pixel_size)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        if pixel_size is None:
            assert not file.is_ome
        else:
            page = file.pages[0]
            numerator, denominator = page.tags["XResolution"].value
            assert page.tags["ResolutionUnit"].value == 3  # centimetres
            assert 1e4 * denominator / numerator == pytest.approx(pixel_size)
            assert 'PhysicalSizeX="0.325"' in file.ome_metadata and 'PhysicalSizeXUnit="µm"' in file.ome_metadata
    first = (tmp_path / "a.tif").read_bytes()
    write_labels(tmp_path / "a.tif", np.arange(20, dtype=np.uint16).reshape(4, 5), pixel_size)
    assert (tmp_path / "a.tif").read_bytes() == first


@pytest.mark.parametrize(("reader", "pixel_size"), [("bioio_tifffile", None), ("bioio_ome_tiff", 0.325)])
def test_bioio_reads_labels_and_pixel_size(tmp_path: Path, reader: str, pixel_size: float | None):
    bioio, reading = pytest.importorskip("bioio"), pytest.importorskip(reader)
    labels = np.arange(600, dtype=np.uint16).reshape(20, 30)
    write_labels(tmp_path / "a.tif", labels, pixel_size)
    image = bioio.BioImage(tmp_path / "a.tif", reader=reading.Reader)
    np.testing.assert_array_equal(image.get_image_data("YX"), labels)
    if pixel_size is not None:
        assert image.physical_pixel_sizes.X == image.physical_pixel_sizes.Y == pixel_size


@pytest.mark.parametrize(("axes", "shape"), STACKS)
def test_regions_and_polygons_know_their_plane(tmp_path: Path, axes: str, shape: tuple[int, ...]):
    for result in stack(axes, shape):
        paths = write_results(result, tmp_path, f"s_page{result.page:04d}", ["roi", "geojson"])
        position = result.position
        for roi in roifile.roiread(paths["roi"]):
            assert roi.position == (result.page if len(axes) == 1 else 0)
            assert (roi.z_position, roi.t_position) == (position.get("Z", -1) + 1, position.get("T", -1) + 1)
            assert roi.stroke_color[:1] == b"\xff" and roi.name in ("1", "2")
        for feature in json.loads(paths["geojson"].read_text())["features"]:
            plane = {"c": -1, "z": position.get("Z", position.get("I", 0)), "t": position.get("T", 0)}
            assert feature["geometry"]["plane"] == plane


def test_one_file_for_a_stack(tmp_path: Path):
    results = stack("TZ", (2, 3))
    for kind in KINDS_OF_STACKS:
        if kind == "zarr" and not is_zarr_installed():
            continue  # its own tests are skipped, and counted
        EXPORTERS[kind].write_stack(tmp_path / f"s{EXPORTERS[kind].ending}", results)
    assert [roi.name for roi in roifile.roiread(tmp_path / "s_rois.zip")][:3] == ["0001-1", "0001-2", "0002-1"]
    features = json.loads((tmp_path / "s.geojson").read_text())["features"]
    assert len(features) == len({feature["id"] for feature in features}) == 12
    rows = list(csv.DictReader(open(tmp_path / "s_cells.csv", newline="")))
    assert [(row["page"], row["t"], row["z"]) for row in rows[::2]] == [
        (str(3 * t + z + 1), str(t + 1), str(z + 1)) for t in range(2) for z in range(3)
    ]


def test_an_image_alone_has_no_position(tmp_path: Path):
    paths = save_results(two_cells(), np.zeros((64, 80)), tmp_path, "x", ["roi", "geojson", "csv"])
    assert {(r.position, r.z_position, r.t_position) for r in roifile.roiread(paths["roi"])} == {(0, 0, 0)}
    (first, second) = json.loads(paths["geojson"].read_text())["features"]
    assert "plane" not in first["geometry"] and first["id"] != second["id"]
    header = paths["csv"].read_text().splitlines()[0].split(",")
    assert header[:3] == ["id", "score", "area_px"] and "page" not in header


def test_qupath_gets_every_column_of_the_table(tmp_path: Path):
    paths = save_results(two_cells(), np.zeros((64, 80)), tmp_path, "x", ["geojson", "csv"], pixel_size=0.5)
    rows = list(csv.DictReader(open(paths["csv"], newline="")))
    for row, feature in zip(rows, json.loads(paths["geojson"].read_text())["features"], strict=True):
        values = {entry["name"]: entry["value"] for entry in feature["properties"]["measurements"]}
        assert values.keys() == row.keys()
        assert all(float(row[name]) == pytest.approx(value) for name, value in values.items())
        assert feature["properties"]["classification"] == {"name": "cell", "color": [86, 180, 233]}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_shapes_and_channels_are_those_of_regionprops(tmp_path: Path, dtype: str):
    channels = (np.random.default_rng(0).random((64, 80, 3)) * 200).astype(dtype)
    names = ("DAPI", "GFP", "far red")
    paths = save_results(
        two_cells(), channels[..., 0], tmp_path, "x", ["labels", "csv"], channels=channels, channel_names=names
    )
    labels = tifffile.imread(paths["labels"])
    shapes = ["perimeter_crofton", "eccentricity", "axis_major_length", "axis_minor_length", "solidity"]
    shapes += ["feret_diameter_max", "equivalent_diameter_area", "orientation"]
    table = regionprops_table(labels, properties=shapes)
    rows = list(csv.DictReader(open(paths["csv"], newline="")))
    columns = {"perimeter_crofton": "perimeter_px", "orientation": "orientation_rad"}
    for name in shapes:
        column = columns.get(name, name if name in ("eccentricity", "solidity") else f"{name}_px")
        assert [float(row[column]) for row in rows] == pytest.approx(table[name].tolist()), name
    for c, name in enumerate(("DAPI", "GFP", "far_red")):
        for id, row in enumerate(rows, start=1):
            values = channels[..., c][labels == id].astype(float)
            for figure in ("mean", "min", "max", "std"):
                assert float(row[f"{figure}_intensity_{name}"]) == pytest.approx(getattr(values, figure)())


def test_channels_of_one_name_or_none_are_told_apart(tmp_path: Path):
    channels = np.zeros((64, 80, 4))
    path = save_results(
        two_cells(), channels[..., 0], tmp_path, "x", ["csv"], channels=channels, channel_names=("a", "a", "", "b")
    )["csv"]
    header = path.read_text().splitlines()[0].split(",")
    means = [name for name in header if name.startswith("mean")]
    assert means == [f"mean_intensity_{name}" for name in ("a", "a_channel2", "channel3", "b")]


@pytest.mark.skipif(not IMAGEJ or shutil.which("javac") is None, reason="ImageJ (Debian's imagej and a JDK) is absent")
def test_imagej_opens_labels_and_measures_every_region_on_its_slice(tmp_path: Path):
    large = np.zeros((4200, 4200), np.uint16)
    large[10:4000, 10:4000], large[4100:4190, 4100:4190] = 1234, 4321
    write_labels(tmp_path / "large.tif", large, 0.325)
    write_labels(tmp_path / "many.tif", np.full((9, 8), 70_001, np.uint32))
    arguments, expected, regions = ["large.tif", "many.tif"], [], []
    expected += ["image 1 1 4200 4200 0.325000 µm 4321", "image 1 1 9 8 1.000000 pixel 70001"]
    for axes, shape in STACKS[:3]:
        results = stack(axes, shape)
        raw = np.stack([result.image for result in results]).reshape(*shape, 64, 80)
        tifffile.imwrite(tmp_path / f"{axes}.tif", raw, imagej=True, metadata={"axes": f"{axes}YX"})
        for kind in ("labels", "roi"):
            EXPORTERS[kind].write_stack(tmp_path / f"{axes}{EXPORTERS[kind].ending}", results)
        arguments += [f"{axes}_labels.tif", f"{axes}.tif", f"{axes}_rois.zip"]
        size = dict(zip(axes, shape, strict=True))
        frames = f"image {size.get('T', 1)} {size.get('Z', 1)} 64 80"
        expected += [f"{frames} 0.325000 µm 2", f"{frames} 1.000000 pixel {10 * len(results)}"]
        for result in results:
            for id, area in ((1, 120), (2, 116)):
                colour = bytes((255, *result.colours[id - 1].tolist())).hex()
                regions.append(f"region {result.page:04d}-{id} {result.page} {area} {10 * result.page}.000 {colour}")
    classpath = str(IMAGEJ[0])
    run = subprocess.run(
        ["java", "-Djava.awt.headless=true", "-Dfile.encoding=UTF-8", "-cp", classpath]
        + [str(Path(__file__).with_name("Look.java")), *(str(tmp_path / name) for name in arguments)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("image")] == expected
    assert [line for line in lines if line.startswith("region")] == regions

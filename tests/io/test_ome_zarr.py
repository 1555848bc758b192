"""OME-Zarr: images of both versions, plates, and labels that its readers find."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_network

from kg_detectron.export.ome_zarr import write_into, write_label_group
from kg_detectron.inference import save_model
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.run_settings import Settings
from kg_detectron.io import ome_zarr
from kg_detectron.io.finding import find_inputs
from kg_detectron.io.images import open_image

zarr = pytest.importorskip("zarr")

VERSIONS = ("0.4", "0.5")


def pyramid(path: Path, pixels: np.ndarray, axes: str, version: str, unit: str = "micrometer", **omero: object) -> Path:
    """A multiscale image of two levels, with 0.25 units a pixel, of the first with twice that for all levels."""
    group = zarr.create_group(str(path), zarr_format=3 if version == "0.5" else 2)
    y, x = axes.index("y"), axes.index("x")
    half = tuple(slice(None, None, 2) if axis in (y, x) else slice(None) for axis in range(len(axes)))
    for name, level in (("s0", pixels), ("s1", pixels[half])):
        separator = {"name": "default" if version == "0.5" else "v2", "separator": "/"}
        array = group.create_array(
            name, shape=level.shape, chunks=tuple(min(16, n) for n in level.shape), dtype=level.dtype,
            chunk_key_encoding=separator,
        )  # fmt: skip
        array[...] = level
    scales = [[0.125 * factor if axis in (y, x) else 1.0 for axis in range(len(axes))] for factor in (1, 2)]
    datasets = [
        {"path": name, "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for name, scale in zip(("s0", "s1"), scales, strict=True)
    ]
    named = [{"name": axis, **({"unit": unit} if axis in "yx" else {})} for axis in axes]
    whole = [{"type": "scale", "scale": [2.0 if axis in (y, x) else 1.0 for axis in range(len(axes))]}]
    content = {"multiscales": [{"axes": named, "datasets": datasets, "coordinateTransformations": whole}]}
    content |= {"omero": omero} if omero else {}
    group.attrs.update({"ome": {"version": version, **content}} if version == "0.5" else content)
    return path


def drawn(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("piece_by_piece", [False, True])
def test_planes_channels_and_pixel_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, piece_by_piece: bool
) -> None:
    if piece_by_piece:
        monkeypatch.setattr(ome_zarr, "_MAP_FROM", 0)
    pixels = drawn(2, 3, 2, 40, 50, dtype="uint16")
    channels = [{"label": "DAPI"}, {"label": "GFP"}, {"label": "phase"}]
    path = pyramid(tmp_path / "a.ome.zarr", pixels, "tczyx", version, channels=channels)
    image = open_image(path, channels=["GFP"])
    assert (image.axes, image.pixel_size, image.pixel_size_source) == ("TCZYX", 0.25, "OME-Zarr")
    assert [page.position for page in image.pages] == [{"t": t, "z": z} for t in (0, 1) for z in (0, 1)]
    for page in image.pages:
        t, z = page.position["t"], page.position["z"]
        assert page.channel_names == ("DAPI", "GFP", "phase") and page.is_lazy == piece_by_piece
        np.testing.assert_array_equal(page.source[3:33, 5:50], pixels[t, :, z, 3:33, 5:50].transpose(1, 2, 0))
        np.testing.assert_array_equal(page.pixels[:, :][..., 0], pixels[t, 1, z])
        np.testing.assert_array_equal(page.pixels[::2, ::2][..., 2], pixels[t, 1, z, ::2, ::2])


def test_colours_units_and_what_is_refused(tmp_path: Path) -> None:
    names = [{"label": name} for name in ("Red", "Green", "Blue")]
    path = pyramid(tmp_path / "rgb.zarr", drawn(3, 20, 30), "cyx", "0.4", unit="nanometer", channels=names)
    image = open_image(path)
    assert image.pixel_size == pytest.approx(0.00025) and image.pages[0].chosen == (1, 2, 3)
    with pytest.raises(ValueError, match=r"it has 2 channels.*--channels 1"):
        open_image(pyramid(tmp_path / "two.zarr", drawn(2, 20, 30), "cyx", "0.5"))
    bare = tmp_path / "bare.zarr"
    zarr.create_group(str(bare), zarr_format=2)
    (bare / ".zattrs").write_text("{}")
    with pytest.raises(ValueError, match="no OME-Zarr image: its metadata have no entry multiscales"):
        open_image(bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": [{"id": "pickle"}]}, "it is compressed by pickle, which is not known to be harmless"),
        ({"compressor": {"id": "json2"}}, "compressed by json2"),
        ({"dtype": "|O"}, r"its values are of type \|O, expected numbers"),
    ],
)
def test_what_could_run_code_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = pyramid(tmp_path / "a.zarr", drawn(20, 30), "yx", "0.4")
    about = path / "s0" / ".zarray"
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        open_image(path)
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["datasets"][0]["path"] = "../../elsewhere"
    (path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(ValueError, match="must be relative"):
        open_image(path)


@pytest.fixture
def plate(tmp_path: Path) -> Path:
    """Two wells with two fields each."""
    return write_plate(tmp_path / "plate.ome.zarr", ("A/1", "B/2"), 2)


def write_plate(path: Path, wells: Sequence[str], fields: int, size: tuple[int, int] = (40, 60)) -> Path:
    content = {"plate": {"wells": [{"path": well} for well in wells], "version": "0.4"}}
    zarr.create_group(str(path), zarr_format=2).attrs.update(content)
    for number, well in enumerate(wells):
        group = zarr.create_group(str(path / well), zarr_format=2)
        group.attrs.update({"well": {"images": [{"path": str(field)} for field in range(fields)]}})
        for field in range(fields):
            pixels = np.random.default_rng(fields * number + field).integers(0, 256, (1, *size), dtype=np.uint8)
            pyramid(path / well / str(field), pixels, "cyx", "0.4", channels=[{"label": "DAPI"}])
    return path


def test_a_plate_is_predicted_field_by_field(plate: Path, tmp_path: Path) -> None:
    fields = ["A/1/0", "A/1/1", "B/2/0", "B/2/1"]
    names = [f"plate/{field}" for field in fields]
    for given in (plate, tmp_path, tmp_path / "*.zarr"):
        assert [item.name for item in find_inputs([given], tmp_path / "out")] == names
    assert [item.name for item in find_inputs([plate / "B" / "2" / "1"], tmp_path / "out")] == ["1"]
    save_model(tiny_network(size=(32, 48), radius=2.0, smooth_sigma=1.0), tmp_path / "model.pth")
    settings = Settings(save=("labels", "zarr"), into_zarr=True)
    summary = predict_files([plate], tmp_path / "model.pth", tmp_path / "out", settings)
    assert not summary.failed and {record.pixel_size for record in summary.done} == {0.25}
    for field in fields:
        expected = ome_zarr_labels(tmp_path / "out" / "plate" / f"{field}_labels.ome.zarr")
        assert expected.max() > 10
        np.testing.assert_array_equal(ome_zarr_labels(plate / field / "labels" / "kg_detectron"), expected)
        assert json.loads((plate / field / "labels" / ".zattrs").read_text())["labels"] == ["kg_detectron"]
    rows = (tmp_path / "out" / "images.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == names
    # Labels in the image do not make it another one.
    assert len(predict_files([plate], tmp_path / "model.pth", tmp_path / "out", settings).skipped) == 4
    # Other settings replace the stores.
    predict_files([plate], tmp_path / "model.pth", tmp_path / "out", Settings(save=("csv",)))
    assert not list((tmp_path / "out").rglob("*.zarr"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rows", ["A", pytest.param("ABCDEFGH", marks=pytest.mark.slow)])
def test_a_plate_that_is_interrupted_goes_on(tmp_path: Path, rows: str) -> None:
    wells = [f"{row}/{column}" for row in rows for column in range(1, 13)]
    first = len(wells) // 3
    path = write_plate(tmp_path / "plate.ome.zarr", wells, 1, (24, 32))
    save_model(tiny_network(size=(32, 48), radius=2.0, smooth_sigma=1.0), tmp_path / "model.pth")
    settings, lines = Settings(save=("labels", "ome-tiff"), scale=1.0), []

    def interrupt_in_the_middle(line: str) -> None:
        lines.append(line)
        if sum(" cells, " in line for line in lines) == first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files([path], tmp_path / "model.pth", tmp_path / "out", settings, say=interrupt_in_the_middle)
    done = [record["name"] for record in json.loads((tmp_path / "out" / "run.json").read_text())["files"]]
    assert done == [f"plate/{well}/0" for well in wells[:first]]
    summary = predict_files([path], tmp_path / "model.pth", tmp_path / "out", settings)
    assert (len(summary.skipped), len(summary.done), len(summary.failed)) == (first, len(wells) - first, 0)
    predict_files([path], tmp_path / "model.pth", tmp_path / "whole", settings)
    for name in ("out", "whole"):
        files = {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*_labels*")}
        assert len(files) == 2 * len(wells)
        if name == "out":
            expected = files, (tmp_path / name / "cells.csv").read_bytes()
    assert expected == (files, (tmp_path / "whole" / "cells.csv").read_bytes())
    rows = (tmp_path / "out" / "images.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == sorted(f"plate/{well}/0" for well in wells)


def ome_zarr_labels(path: Path) -> np.ndarray:
    attributes = json.loads((path / ".zattrs").read_text())
    assert "image-label" in attributes
    return zarr.open_array(str(path / attributes["multiscales"][0]["datasets"][0]["path"]), mode="r")[...]


@pytest.mark.parametrize("version", VERSIONS)
def test_labels_are_a_pyramid_that_comes_back(tmp_path: Path, version: str) -> None:
    labels = np.random.default_rng(0).integers(0, 90_000, (2, 600, 515), dtype=np.uint32)
    path = tmp_path / "labels.ome.zarr"
    for _ in range(2):  # the second takes the place of the first
        write_label_group(path, labels, labels.shape, "TYX", 0.5, version=version)
    image = open_image(path)
    assert (image.axes, image.pixel_size) == ("TYX", 0.5)
    np.testing.assert_array_equal(np.stack([page.source[..., 0] for page in image.pages]), labels)
    levels = [zarr.open_array(str(path / str(number)), mode="r")[...] for number in range(3)]
    for number, level in enumerate(levels):
        np.testing.assert_array_equal(level, labels[:, :: 2**number, :: 2**number])
    assert not (path / "3").exists() and not list(tmp_path.glob(".*"))


def test_the_readers_of_others_read_the_labels(tmp_path: Path) -> None:
    reader = pytest.importorskip("ome_zarr.reader")
    location = pytest.importorskip("ome_zarr.io")
    labels = np.random.default_rng(0).integers(0, 99, (300, 280), dtype=np.uint32)
    write_label_group(tmp_path / "a.ome.zarr", [labels], labels.shape, "YX", 0.5)
    (node, *_) = list(reader.Reader(location.parse_url(tmp_path / "a.ome.zarr"))())
    assert len(node.data) == 2
    np.testing.assert_array_equal(np.asarray(node.data[0]), labels)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("axes", "scale", "translation", "units"),
    [
        ("zyx", [2.0, 0.25, 0.25], None, ["micrometer"] * 3),
        ("yx", [0.25, 0.5], [10.0, 20.0], ["micrometer"] * 2),
        ("yx", [0.25, 0.25], None, ["", ""]),
        ("cyx", [1.0, 250.0, 250.0], [0.0, 5.0, 0.0], ["", "nanometer", "nanometer"]),
        ("yx", None, None, ["", ""]),
    ],
)
def test_labels_lie_on_their_image(tmp_path: Path, version: str, axes: str, scale, translation, units) -> None:
    image = tmp_path / "a.ome.zarr"
    group = zarr.create_group(str(image), zarr_format=3 if version == "0.5" else 2)
    shape = {"c": 2, "z": 3, "y": 40, "x": 60}
    pixels = drawn(*(shape[axis] for axis in axes))
    array = group.create_array("0", shape=pixels.shape, chunks=pixels.shape, dtype=pixels.dtype)
    array[...] = pixels
    places = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
    dataset = {"path": "0", "coordinateTransformations": [one for one in places if one[one["type"]]]}
    types = {"c": "channel"}
    named = [
        {"name": axis, "type": types.get(axis, "space"), **({"unit": unit} if unit else {})}
        for axis, unit in zip(axes, units, strict=True)
    ]
    content = {"multiscales": [{"axes": named, "datasets": [dataset]}]}
    group.attrs.update({"ome": {"version": version, **content}} if version == "0.5" else content)

    letters = axes.replace("c", "").upper()
    sides = [shape[axis.lower()] for axis in letters]
    pages = [np.ones((40, 60), np.uint32)] * (3 if "Z" in letters else 1)
    labels = ome_zarr.axes_of(write_into(image, "cells", pages, sides, letters, 0.7))
    of_image = ome_zarr.axes_of(image)
    assert "".join(labels) == letters and labels == {axis: of_image[axis] for axis in letters}
    for index, axis in enumerate(axes):
        expected = scale[index] if scale else 1.0, translation[index] if translation else 0.0
        assert (of_image[axis.upper()].scale, of_image[axis.upper()].translation) == expected

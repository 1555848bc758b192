"""Whole slides: read piece by piece, tissue and regions alone, in their own pixels; an interrupted run goes on."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from builders import tiny_network

from kg_detectron.inference import file_prediction, save_model, tiling
from kg_detectron.inference.area import Area, area_of, regions_of, tissue_mask
from kg_detectron.inference.many_files import predict_files
from kg_detectron.inference.run_settings import Settings
from kg_detectron.io import slides
from kg_detectron.io.images import open_image
from kg_detectron.io.lazy import LazyPlane
from kg_detectron.synthetic import nuclei_image

HEIGHT, WIDTH, TILES = 320, 384, 9
TISSUE = (slice(176, 304), slice(208, 368))
SETTINGS = {"save": ("labels", "geojson"), "scale": 1.0, "tile": 128, "overlap": 32, "normalise": "fixed"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which find something everywhere."""
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_model(tiny_network(size=(32, 48), radius=2.0, smooth_sigma=1.0), path)
    return path


def slide_pixels() -> np.ndarray:
    """(H, W, 3) RGB: glass with a little noise, and violet tissue in one place."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(238, 244, (HEIGHT, WIDTH, 1), dtype=np.uint8), 3, axis=2)
    height, width = (part.stop - part.start for part in TISSUE)
    nuclei, _ = nuclei_image(rng, height, width, 30)
    pixels[TISSUE] = [220, 160, 200] - (nuclei[..., :1] * [0.5, 0.4, 0.3]).astype(np.uint8)
    return pixels


@pytest.fixture
def slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiled TIFF with two levels, which counts as a large slide."""
    if not slides.is_slide_package_installed():
        pytest.skip("neither OpenSlide nor tiffslide is installed")
    monkeypatch.setattr(slides, "_LARGE", 0)
    path, pixels = tmp_path / "slide.tif", slide_pixels()
    options = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, resolution=(40000, 40000), resolutionunit="CENTIMETER", **options)
        file.write(pixels[::2, ::2], subfiletype=1, **options)
    return path


@pytest.mark.parametrize("package", ["openslide", "tiffslide"])
def test_a_slide_is_read_piece_by_piece(slide: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    pytest.importorskip(package)
    monkeypatch.setattr(slides, "_PACKAGES", [entry for entry in slides._PACKAGES if entry[0] == package])
    image = open_image(slide)
    (page,) = image.pages
    assert page.is_lazy and (image.pixel_size, image.pixel_size_source) == (0.25, "slide")
    pixels = slide_pixels()
    np.testing.assert_array_equal(page.source[:, :], pixels)
    np.testing.assert_array_equal(page.pixels[100:222, 7:333], pixels[100:222, 7:333, ::-1])
    np.testing.assert_array_equal(page.pixels[::2, ::2], pixels[::2, ::2, ::-1])
    assert page.pixels[::5, ::5].shape == (64, 77, 3)


def test_small_tiffs_and_stacks_are_no_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, slide_pixels()[:64, :64], photometric="rgb", tile=(64, 64))
    assert not open_image(path).pages[0].is_lazy
    monkeypatch.setattr(slides, "is_slide_package_installed", lambda: False)
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=r'whose reader is not installed: pip install "kg_detectron\[slides\]"'):
        open_image(tmp_path / "a.mrxs")


def test_cells_are_looked_for_in_tissue(slide: Path, model: Path, tmp_path: Path) -> None:
    everywhere = predict_files([slide], model, tmp_path / "all", Settings(**SETTINGS, all_tiles=True))
    summary = predict_files([slide], model, tmp_path / "out", Settings(**SETTINGS))
    assert not summary.failed and 20 < summary.cells < everywhere.cells
    (record,) = summary.done
    assert any("--all-tiles looks everywhere" in line for line in record.notes)
    # Inside, where no cell that was left out is near, the labels are the same cells.
    inside = tuple(slice(part.start + 40, part.stop - 40) for part in TISSUE)
    some, all_ = (tifffile.imread(tmp_path / name / "slide_labels.tif") for name in ("out", "all"))
    np.testing.assert_array_equal(some[inside] > 0, all_[inside] > 0)
    assert not some[:128, :128].any() and all_[:128, :128].any()
    rows = list(csv.DictReader(open(tmp_path / "out" / "cells.csv", newline="")))
    features = json.loads((tmp_path / "out" / "slide.geojson").read_text())["features"]
    assert len(rows) == len(features) == summary.cells and float(rows[0]["centroid_x_um"]) > 0
    for feature, row in zip(features, rows, strict=True):
        x, y = np.array(feature["geometry"]["coordinates"][0]).mean(axis=0)
        label = some[int(float(row["centroid_y_px"])), int(float(row["centroid_x_px"]))]
        assert label in (0, int(row["id"])) and abs(x - float(row["centroid_x_px"])) < 40
        assert TISSUE[0].start - 160 < y < TISSUE[0].stop + 160


def test_regions_are_rectangles_and_polygons(slide: Path, model: Path, tmp_path: Path) -> None:
    drawn = {"type": "Polygon", "coordinates": [[[220, 190], [360, 190], [220, 300]]]}
    (tmp_path / "drawn.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [{"geometry": drawn}]})
    )
    centres = {}
    for name, given in (("rectangle", "230,190,100,80"), ("polygon", str(tmp_path / "drawn.geojson"))):
        settings = Settings(**SETTINGS, regions=regions_of([given]))
        assert not predict_files([slide], model, tmp_path / name, settings).failed
        rows = csv.DictReader(open(tmp_path / name / "cells.csv", newline=""))
        boxes = [[float(row[f"box_{side}_px"]) for side in ("x1", "y1", "x2", "y2")] for row in rows]
        centres[name] = np.array([[(x1 + x2) / 2, (y1 + y2) / 2] for x1, y1, x2, y2 in boxes])
        assert len(boxes) > 5
    x, y = centres["rectangle"].T
    assert (x >= 230).all() and (x <= 330).all() and (y >= 190).all() and (y <= 270).all()
    x, y = centres["polygon"].T
    assert ((x - 220) / 140 + (y - 190) / 110 <= 1).all() and (x >= 220).all() and (y >= 190).all()
    for wrong in ("1,2,3", "1,2,3,x", "1,2,0,4", str(slide)):
        with pytest.raises((ValueError, OSError)):
            regions_of([wrong])


def test_holes_and_masks_of_an_area() -> None:
    square = [[0, 0], [40, 0], [40, 40], [0, 40]]
    hole = [[10, 10], [30, 10], [30, 30], [10, 30]]
    area = area_of(np.zeros((100, 80, 3)), [json.dumps([[square, hole]])], tissue=False)
    assert isinstance(area, Area)
    points = np.array([[5, 5], [20, 20], [50, 50]], float)
    assert area.contains(points).tolist() == [True, False, False]
    assert area.touches(30, 30, 60, 60) and not area.touches(50, 50, 60, 60)
    assert area_of(np.zeros((100, 80, 3)), (), tissue=False) is None
    assert not tissue_mask(np.full((50, 60, 3), 240, np.uint8)).any()
    assert tissue_mask(slide_pixels())[TISSUE].mean() > 0.95 > 20 * tissue_mask(slide_pixels())[:150].mean()


def test_an_interrupted_run_goes_on_with_the_missing_tiles(
    slide: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**SETTINGS, all_tiles=True)
    predict_files([slide], model, tmp_path / "whole", settings)
    calls = {"peaks": 0, "masks": 0}

    def interrupt(stage: str) -> None:
        real = getattr(tiling._LocalNetwork, stage)

        def counted(self: object, place: object) -> object:
            calls[stage] += 1
            if calls[stage] == 4:
                raise KeyboardInterrupt
            return real(self, place)

        monkeypatch.setattr(tiling._LocalNetwork, stage, counted)

    for stage in calls:
        interrupt(stage)
        with pytest.raises(KeyboardInterrupt):
            predict_files([slide], model, tmp_path / "out", settings)
    predict_files([slide], model, tmp_path / "out", settings)
    assert calls["peaks"] == TILES + 1, "tiles were computed again"
    for name in ("slide_labels.tif", "slide.geojson", "cells.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_slide_that_fails_at_last_goes_on_with_its_tiles(
    slide: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**{**SETTINGS, "save": ("ome-tiff", "labels")}, all_tiles=True)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(file_prediction, "write_results", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        summary = predict_files([slide], model, tmp_path / "out", settings)
    assert [record.error for record in summary.failed] == ["no space left"]
    monkeypatch.setattr(tiling._LocalNetwork, "peaks", None)  # nothing is computed again
    monkeypatch.setattr(tiling._LocalNetwork, "masks", None)
    lines: list[str] = []
    summary = predict_files([slide], model, tmp_path / "out", settings, say=lines.append)
    assert not summary.failed and summary.cells > 20
    assert not list((tmp_path / "out").glob(".*"))
    pyramid, labels = (tifffile.imread(tmp_path / "out" / f"slide_labels{end}") for end in (".ome.tif", ".tif"))
    np.testing.assert_array_equal(pyramid, labels)
    assert open_image(tmp_path / "out" / "slide_labels.ome.tif").pixel_size == 0.25


def test_a_lazy_plane_is_an_array_in_the_ways_that_are_used() -> None:
    class Source:
        shape, dtype, levels = (3000, 1100, 3), np.dtype(np.uint8), [(3000, 1100)]
        pixels = np.random.default_rng(0).integers(0, 256, (3000, 1100, 3), dtype=np.uint8)

        def read(self, level: int, y1: int, y2: int, x1: int, x2: int) -> np.ndarray:
            return self.pixels[y1:y2, x1:x2]

        def coarse(self, step: int) -> np.ndarray:
            return self.pixels[::step, ::step]

    plane, pixels = LazyPlane(Source()), Source.pixels
    np.testing.assert_array_equal(plane[1000:2050, 1020:1100], pixels[1000:2050, 1020:1100])
    np.testing.assert_array_equal(plane[..., 1:][10:20, :], pixels[10:20, :, 1:])
    np.testing.assert_array_equal(plane.take([2, 2])[5:6, 3:9:2], pixels[5:6, 3:9:2][..., [2, 2]])
    np.testing.assert_array_equal(np.asarray(plane), pixels)
    assert plane[5:3, 2:9].shape == (0, 7, 3) and plane.overview().shape == (3000, 1100, 3)
    for wrong in (3, (slice(None), 2), (slice(None, None, -1), slice(None))):
        with pytest.raises(TypeError):
            plane[wrong]


def test_what_is_no_region_is_named(tmp_path: Path) -> None:
    for wrong in ("1,2,3", "1,2,3,4,5", "1,2,3,x", "drawn"):
        with pytest.raises(ValueError, match=f"region: expected four numbers X,Y,WIDTH,HEIGHT or a file, got {wrong}"):
            regions_of([wrong])
    with pytest.raises(FileNotFoundError, match="drawn.geojson"):
        regions_of([str(tmp_path / "drawn.geojson")])
    drawn = {"type": "Polygon", "coordinates": [[[2, 2], [9, 2], [2, 9]]]}
    path = tmp_path / "some.geojson"
    path.write_text(json.dumps({"features": [{"geometry": None}, {"geometry": drawn}]}))
    assert regions_of([str(path)]) == ("[[[[2,2],[9,2],[2,9]]]]",)
    for nothing in ({}, {"features": [{"geometry": None}]}):
        path.write_text(json.dumps(nothing))
        with pytest.raises(ValueError, match=r"some\.geojson: expected a GeoJSON of polygons.*it has no polygon"):
            regions_of([str(path)])

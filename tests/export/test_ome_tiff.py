"""Label pyramids in OME-TIFF, as tifffile, bioio and our own readers find them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from kg_detectron.cells import Cells, MaskCrops
from kg_detectron.cells.label_plane import LabelPlane
from kg_detectron.export.kinds import KINDS
from kg_detectron.export.label_images import TILE, write_labels
from kg_detectron.export.ome_tiff import write_pyramid
from kg_detectron.export.results import save_results
from kg_detectron.io.images import open_image
from kg_detectron.io.labels import read_label_image

SIZE = (1100, 700)


def drawn_cells(size: tuple[int, int] = SIZE, count: int = 50) -> MaskCrops:
    """Squares of 40 pixels that do not touch."""
    place = torch.arange(count)
    corner = torch.stack((place % 10 * 66 + 3, place // 10 * 210 + 5), dim=1)
    return MaskCrops([torch.ones(40, 40, dtype=torch.bool)] * count, torch.cat((corner, corner + 40), dim=1), size)


def cells_of(masks: MaskCrops) -> Cells:
    return Cells(masks.windows.float(), torch.ones(len(masks)), torch.ones(len(masks), dtype=torch.long), masks)


def test_levels_are_subifds_in_tiles_with_the_pixel_size(tmp_path: Path) -> None:
    masks = drawn_cells()
    image = np.zeros(SIZE, np.uint8)
    for _ in range(2):  # the second takes the place of the first, with the same bytes
        before = (tmp_path / "a_labels.ome.tif").read_bytes() if list(tmp_path.iterdir()) else None
        (path,) = save_results(cells_of(masks), image, tmp_path, "a", ["ome-tiff"], pixel_size=0.25).values()
    assert [file.name for file in tmp_path.iterdir()] == ["a_labels.ome.tif"] and before == path.read_bytes()
    labels = masks.label_image()
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        assert file.is_bigtiff and file.is_ome and len(file.pages) == 1 and series.axes == "YX"
        assert [level.shape for level in series.levels] == [(1100, 700), (550, 350), (275, 175), (138, 88)]
        for number, level in enumerate(series.levels):
            page = level.keyframe
            assert (page.tilelength, page.tilewidth, page.dtype) == (TILE, TILE, np.uint16)
            assert page.is_subifd == page.is_reduced == (number > 0)
            assert page.get_resolution("MICROMETER") == pytest.approx((4 / 2**number,) * 2)
            np.testing.assert_array_equal(level.asarray(), labels[:: 2**number, :: 2**number])
        assert 'PhysicalSizeX="0.25"' in str(file.ome_metadata) and 'PhysicalSizeXUnit="µm"' in str(file.ome_metadata)
    image_file = open_image(path)
    assert (image_file.pixel_size, image_file.pixel_size_source, len(image_file.pages)) == (0.25, "OME", 1)
    np.testing.assert_array_equal(read_label_image(path), labels)


def test_a_stack_keeps_its_axes(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 90_000, (2, 3, 300, 520), dtype=np.uint32)
    path = tmp_path / "s_labels.ome.tif"
    write_pyramid(path, list(labels.reshape(6, 300, 520)), labels.shape, "TZYX", None)
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        assert series.axes == "TZYX" and [level.shape[-2:] for level in series.levels] == [
            (300, 520), (150, 260), (75, 130),
        ]  # fmt: skip
        for number, level in enumerate(series.levels):
            np.testing.assert_array_equal(level.asarray(), labels[..., :: 2**number, :: 2**number])
    pages = open_image(path).pages
    assert [page.position for page in pages] == [{"t": t, "z": z} for t in range(2) for z in range(3)]
    np.testing.assert_array_equal(np.stack([page.source[..., 0] for page in pages]), labels.reshape(6, 300, 520))


def test_a_large_image_is_written_window_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(LabelPlane):
        windows: list[int] = []

        def __getitem__(self, key: Any) -> np.ndarray:
            window = super().__getitem__(key)
            self.windows.append(window.size)
            return window

    masks = drawn_cells((2000, 1500))
    expected, plane = masks.label_image(), Watched(masks)
    write_pyramid(tmp_path / "a.ome.tif", [plane], plane.shape, "YX", None)
    assert max(plane.windows) == TILE**2 and len(plane.windows) == 4 * 3 + 2 * 2 + 1 + 1
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.ome.tif"), expected)
    # The plain label image too, once it is so large.
    write_labels(tmp_path / "a.tif", expected, 0.5)
    monkeypatch.setattr("kg_detectron.export.label_images._STRIPED", 0)
    plane.windows.clear()
    write_labels(tmp_path / "b.tif", plane, 0.5)
    assert max(plane.windows) == TILE**2
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "b.tif"), tifffile.imread(tmp_path / "a.tif"))


def test_the_kind_is_beside_the_others_and_not_among_all(tmp_path: Path) -> None:
    assert not {"ome-tiff", "zarr"} & set(KINDS)
    with pytest.raises(ValueError, match="expected some of .*ome-tiff, zarr"):
        save_results(cells_of(drawn_cells()), np.zeros(SIZE, np.uint8), tmp_path, "a", ["ometiff"])


def test_bioio_reads_it(tmp_path: Path) -> None:
    bioio, reader = pytest.importorskip("bioio"), pytest.importorskip("bioio_ome_tiff")
    masks = drawn_cells()
    write_pyramid(tmp_path / "a.ome.tif", [LabelPlane(masks)], SIZE, "YX", 0.25)
    image = bioio.BioImage(tmp_path / "a.ome.tif", reader=reader.Reader)
    np.testing.assert_array_equal(image.data[0, 0, 0], masks.label_image())
    assert (image.physical_pixel_sizes.Y, image.physical_pixel_sizes.X) == (0.25, 0.25)

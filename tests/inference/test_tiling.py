"""Prediction in tiles equals prediction of the whole image, and reads and keeps no more than tiles."""

import copy
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from builders import ROOT, TRAINABLE, nuclei_example, tiny_network, train
from torch import Tensor

from kg_detectron.cells import Cells
from kg_detectron.inference import predict, save_model, tiling
from kg_detectron.inference.area import area_of, regions_of
from kg_detectron.modeling import DecodingSettings, KeypointDecoder, KeypointGraphNet, KeypointMaps
from kg_detectron.synthetic import nuclei_image

VARIANTS = {
    "paper": {},
    "single_scale": {"scales": (1,), "peak_threshold": 0.001},  # finds little after so short a training
    "seg_s1": {"cut_from": "s1"},
    "ranked": {"blur_weight": 1.0, "overlap_sigma": 0.1, "nms_threshold": 0.7},
    "margin": {"mask_margin": 2.5, "box_jitter": 0.2, "blur_weight": 1.0},
    "border": {"border": 24},
    "percentile": {"normalisation": "percentile", "percentiles": (1.0, 99.8)},
}
pytestmark = pytest.mark.timeout(900)
# Larger than any image here.
WHOLE = 2**14


@pytest.fixture(scope="module")
def models() -> dict[str, KeypointGraphNet]:
    """The variants, trained until they find most cells: only then few scores lie close to each other."""
    paper, rng = tiny_network(**TRAINABLE), np.random.default_rng(0)
    train(paper, lambda: nuclei_example(rng), steps=40)
    variants = {name: tiny_network(**TRAINABLE | changes).eval() for name, changes in VARIANTS.items()}
    for model in variants.values():
        weights = model.state_dict()
        fitting = {k: v for k, v in paper.state_dict().items() if k in weights and weights[k].shape == v.shape}
        model.load_state_dict(weights | fitting)
    # The masks of seg_s1 come from another map.
    branch = variants["seg_s1"].segmentation
    optimizer = torch.optim.Adam(branch.parameters(), 4e-3)
    for _ in range(20):
        image, target = nuclei_example(rng)
        with torch.no_grad():
            _, decoded = paper.keypoint_branch(paper.backbone(paper.preprocessing.batch([image], paper.divisor)))
        loss = branch.loss([decoded[1]], [target["boxes"]], [target["masks"]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return variants


def predict_whole(model: KeypointGraphNet, image: np.ndarray, scale: float = 1) -> Cells:
    return predict(model, image, scale=scale, tile=WHOLE)


def assert_same(tiled: Cells, whole: Cells, only: Tensor | slice = slice(None), least_overlap: float = 0.999) -> None:
    """The same cells, in the same order but for scores that are equal up to rounding; of `whole`, some are expected."""
    assert (tiled.scores.diff() <= 0).all() and tiled.size == whole.size
    expected = whole[only]
    assert len(tiled) == len(expected)
    # One after another by their places, which are half pixels.
    tiled, expected = (cells[np.lexsort(cells.boxes.mul(4).round().T.numpy()).tolist()] for cells in (tiled, expected))
    torch.testing.assert_close(tiled.boxes, expected.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(tiled.scores, expected.scores, rtol=0, atol=1e-6)
    assert torch.equal(tiled.labels, expected.labels)
    assert torch.equal(tiled.masks.windows, expected.masks.windows)
    threshold = expected.masks.threshold
    for tiled_crop, crop in zip(tiled.masks.crops, expected.masks.crops, strict=True):
        one, other = (mask if mask.dtype == torch.bool else mask >= threshold for mask in (tiled_crop, crop))
        assert (one & other).sum() >= least_overlap * (one | other).sum()


class Slices:
    """An image that can only be sliced, and remembers how: (y1, y2, x1, x2)."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.shape, self.ndim, self.dtype = image.shape, image.ndim, image.dtype
        self.read: list[tuple[int, int, int, int]] = []

    def __getitem__(self, item: tuple[slice, slice]) -> np.ndarray:
        rows, columns = item
        self.read.append((*rows.indices(self.shape[0])[:2], *columns.indices(self.shape[1])[:2]))
        return self.image[item]


@pytest.fixture
def exact(models):
    """The variants in double precision: there no keypoint is won or lost by the last digit."""
    torch.set_default_dtype(torch.float64)
    yield {name: copy.deepcopy(model).double() for name, model in models.items()}
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def tiles_alone(monkeypatch):
    """Tiles compute their own features, as in an image whose features are too large to be kept."""
    monkeypatch.setattr(tiling, "KEPT_BYTES", 0)


@pytest.mark.parametrize("variant", ["paper", "seg_s1", "margin"])
@pytest.mark.parametrize("size", [(150, 200), (160, 192)])  # the latter is not padded
def test_kept_features_give_the_same(exact, variant, size, monkeypatch):
    """The backbone runs once for the whole image, but for c0."""
    monkeypatch.setattr(tiling, "KEPT_BYTES", 2**29)
    image, _ = nuclei_image(np.random.default_rng(7), *size, 25)
    model, calls = exact[variant], []
    deep_features = model.backbone.deep_features

    def counted(pixels):
        calls.append(pixels.shape)
        return deep_features(pixels)

    whole = predict_whole(model, image)
    monkeypatch.setattr(model.backbone, "deep_features", counted)
    assert_same(predict(model, image, scale=1, tile=96, overlap=64), whole)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("variant", "size", "tile", "overlap"),
    [
        # Narrow images, so that the surroundings of a tile end inside them.
        ("paper", (90, 801), 160, 64),
        ("paper", (903, 120), 224, 30),  # some cells are larger than the overlap
        ("seg_s1", (100, 780), 192, 64),
        ("ranked", (90, 801), 160, 64),
        ("margin", (90, 801), 160, 64),
        # Corners of four tiles, with surroundings that end inside the image and with many tiles.
        ("paper", (610, 620), 320, 64),
        ("seg_s1", (233, 221), 96, 40),
        ("border", (233, 221), 96, 40),
        # Smaller than a tile, than its overlap, than one pixel of c4.
        ("paper", (90, 130), 512, 256),
        ("seg_s1", (40, 9), 32, 64),
    ],
)
def test_equals_the_whole_image(exact, variant, size, tile, overlap):
    height, width = size
    image, cells = nuclei_image(np.random.default_rng(7), max(height, 32), max(width, 32), height * width // 1200)
    image = image[:height, :width]
    whole = predict_whole(exact[variant], image)
    assert len(whole) >= len(cells) / 5  # enough to compare
    steps = []
    slices = Slices(image)
    tiled = predict(
        exact[variant], slices, scale=1, tile=tile, overlap=overlap, progress=lambda *step: steps.append(step)
    )
    assert_same(tiled, whole)
    assert all(one[0] < other[0] and one[1] == other[1] for one, other in pairwise(steps))
    assert steps[-1][0] == steps[-1][1]
    # 256: what this network sees around a tile.
    for y1, y2, x1, x2 in slices.read:
        assert y2 - y1 <= tile + overlap + 512 and x2 - x1 <= tile + overlap + 512


def test_cells_on_seams_and_corners_of_tiles(models, monkeypatch):
    """Tiles so small that many cells hold a corner of four; few are segmented at once."""
    monkeypatch.setattr("kg_detectron.inference.tiling.CROP_PIXELS", 500)
    image, _ = nuclei_image(np.random.default_rng(3), 160, 160, 24)
    cells = predict(models["paper"], image, scale=1, tile=32, overlap=64)
    assert_same(cells, predict_whole(models["paper"], image))
    x1, y1, x2, y2 = (cells.boxes / 32).T
    in_columns, in_rows = x1.floor() + 1 < x2, y1.floor() + 1 < y2  # the edge of a tile lies inside
    assert (in_columns & in_rows).sum() >= 5


def test_a_cell_that_no_window_holds_is_left_out_with_a_note(models):
    image, _ = nuclei_image(np.random.default_rng(1), 128, 160, 8)
    whole = predict_whole(models["paper"], image)
    fits = (whole.boxes[:, 2:] - whole.boxes[:, :2]).amax(1) <= 32
    assert 0 < fits.sum() < len(fits)
    cells = predict(models["paper"], image, scale=1, tile=32, overlap=0)
    assert_same(cells, whole, fits)
    (note,) = cells.notes
    assert note.startswith(f"{int((~fits).sum())} boxes longer than tile + overlap = 32 pixels") and not whole.notes


@pytest.mark.parametrize("scale", [1, 0.5, 1.6])
def test_a_dim_image_has_the_same_cells_in_tiles(exact, scale):
    """12 bits in 16, which only percentiles of the whole image tell: those of a tile would be others."""
    image, cells = nuclei_image(np.random.default_rng(7), 96, 800, 60)
    image[:, 400:] //= 2
    size = round(800 / scale), round(96 / scale)
    dim = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint16) * 12 + 200
    assert dim.max() < 4096
    whole = predict_whole(exact["percentile"], dim, scale)
    assert len(whole) > len(cells) / 2 and whole.scale == (scale, scale) and whole.scale_source == "given"
    tiled = predict(exact["percentile"], dim, scale=scale, tile=160, overlap=64)
    assert_same(
        tiled, whole, least_overlap=0.999 if scale == 1 else 0.97
    )  # tiles round probabilities to 16 bits: a pixel in doubt
    assert (tiled.scale, tiled.scale_source) == (whole.scale, whole.scale_source)


@pytest.mark.parametrize(
    ("kind", "factor"), [(np.uint16, 257), (np.float32, 1 / 255), (np.dtype(">f4"), 1 / 255), (np.dtype(">u2"), 257)]
)
def test_reads_a_mapped_file_of_any_type(models, tmp_path, kind, factor):
    image, _ = nuclei_image(np.random.default_rng(5), 64, 96, 6)
    mapped = np.memmap(tmp_path / "image", kind, "w+", shape=image.shape)
    mapped[:] = image * np.float32(factor)
    cells = predict(models["single_scale"], mapped, scale=1, tile=64, overlap=64)
    assert len(cells) > 0
    assert_same(cells, predict_whole(models["single_scale"], image))


@pytest.mark.parametrize(("scale", "ensemble"), [(1.0, False), (0.8, True)])
def test_an_area_of_an_image_with_a_border(exact, scale, ensemble):
    """Its tiles begin before the image, and so do those that are left out."""
    image, _ = nuclei_image(np.random.default_rng(7), 100, 400, 60)
    area = area_of(image, regions_of(["260,20,130,70"]), tissue=False)
    model, steps = exact["border"], []
    whole = predict(model, image, scale=scale, ensemble=ensemble)
    x, y = ((whole.boxes[:, :2] + whole.boxes[:, 2:]) / 2).T
    # Not those whose centre is so close to the edge of the area that rounding decides.
    inside = whole[(x >= 262) & (x < 388) & (y >= 22) & (y < 88)]
    assert 3 <= len(inside) < len(whole) / 2
    found = predict(
        model,
        image,
        scale=scale,
        tile=64,
        overlap=64,
        ensemble=ensemble,
        area=area,
        progress=lambda step, of: steps.append(of),
    )
    x, y = ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).T
    assert ((x >= 260) & (x <= 390) & (y >= 20) & (y <= 90)).all()
    for box in inside.boxes:
        assert (found.boxes - box).abs().amax(1).min() < 1e-3
    across, down = (math.ceil(scale * (side + 2 * math.ceil(24 / scale)) / 64) for side in (400, 100))
    assert steps[0] < 2 * across * down * (4 if ensemble else 1)


@pytest.mark.parametrize(("side", "steps"), [(96, 1), (97, 8)])
def test_the_border_does_not_count_as_part_of_a_tile(models, side, steps):
    """An image of the size of a tile is one part, although the network sees more."""
    done = []
    image = np.zeros((side, side, 3), np.uint8)
    predict(models["border"], image, scale=1, tile=96, progress=lambda step, of: done.append((step, of)))
    assert done[-1] == (steps, steps)


def test_an_image_without_cells():
    model = tiny_network(**TRAINABLE | {"peak_threshold": 1e9}).eval()
    cells = predict(model, np.zeros((40, 70, 3), np.uint8), scale=1, tile=32)
    assert cells.boxes.shape == (0, 4) and cells.scores.shape == cells.labels.shape == (0,)
    assert len(cells.masks) == 0 and cells.size == (40, 70)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tile": 0}, "tile"),
        ({"tile": -32}, "tile"),
        ({"tile": 48}, "tile: expected a positive multiple of 32 pixels, got 48"),
        ({"overlap": -1}, "overlap"),
        ({"scale": 0}, "scale: expected a number above 0, got 0"),
        ({"scale": 1, "diameter": 20}, "scale, diameter: expected one of these at most"),
        ({"normalisation": "none"}, "normalisation"),
        ({"image": np.zeros((40, 40, 4), np.uint8)}, "image"),
        ({"image": np.zeros((0, 40, 3), np.uint8)}, "image"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(ValueError, match=named):
        predict(**{"model": tiny_network().eval(), "image": image} | arguments)
    with pytest.raises(ValueError, match="eval"):
        predict(tiny_network(), image)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "backbone": "resnet50",
            "head_kernel": 7,
            "radius": 5.0,
            "smooth_sigma": 2.0,
        },  # the paper's, but for its widths
        {"scales": (1,)},
        {"scales": (2, 3), "smooth_sigma": 0.0},
    ],
)
def test_tiles_are_read_with_all_that_their_maps_depend_on(changes):
    """What a tile does not read cannot matter: nan there never comes near. And it reads no more than that needs."""
    narrow = {"c0_channels": 2, "widths": (2, 2, 2, 2), "peak_threshold": 1e9}
    model = tiny_network(**TRAINABLE | narrow | changes)
    image = np.zeros((32, 32 * 31, 3), np.uint8)
    slices = Slices(image)
    predict(model.eval(), slices, scale=1, tile=32)
    _, _, read_from, read_to = slices.read[15]
    core = (15 * 32, 16 * 32)
    assert 0 < read_from < core[0] and core[1] < read_to < image.shape[1]

    def is_clean(read_from: int, read_to: int) -> bool:
        pixels = torch.full((1, 3, 32, image.shape[1]), torch.nan, dtype=torch.float64)
        pixels[..., read_from:read_to] = 0
        with torch.no_grad():
            maps, _ = model.double().keypoint_branch(model.backbone(pixels))
        around = model.decoder.receptive_radius
        return all(
            bool(torch.isfinite(value[..., core[0] // m.stride - around : core[1] // m.stride + around]).all())
            for m in maps
            for value in (m.heatmap, m.single_offset, m.group_offset)
        )

    assert is_clean(read_from, read_to)
    # Windows are rounded to the grid of 32 twice, and the field of a value is a little larger to the left.
    assert not is_clean(read_from + 96, read_to) and not is_clean(read_from, read_to - 96)


@pytest.mark.parametrize(("radius", "sigma"), [(1.0, 0.0), (1.5, 0.6), (2.0, 1.0), (5.0, 2.0)])
def test_peaks_depend_on_maps_within_the_decoders_receptive_radius(radius, sigma):
    """Cut with so many pixels around it, a map has the peaks of the whole map, for votes of up to 2 r."""
    generator = torch.Generator().manual_seed(0)
    decoder = KeypointDecoder(radius, DecodingSettings(smooth_sigma=sigma, peak_threshold=0.0))
    low, high, width = 50, 62, 112
    heatmap = torch.randn(1, 5, 20, width, generator=generator)
    single = (2 * torch.rand(1, 10, 20, width, generator=generator) - 1) * 2 * radius
    group = torch.randn(1, 40, 20, width, generator=generator)

    def peaks(start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        cut = decoder.find([KeypointMaps(*(m[..., start:end] for m in (heatmap, single, group)), 1)])
        cut.peaks[:, 3] += start
        inside = (cut.peaks[:, 3] >= low) & (cut.peaks[:, 3] < high)
        return tuple(value[inside] for value in cut)

    whole, cut = peaks(0, width), peaks(low - decoder.receptive_radius, high + decoder.receptive_radius)
    assert len(whole[0]) > 10 and torch.equal(cut[0], whole[0]) and torch.equal(cut[2], whole[2])
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-5, atol=0)


def peak_memory(model: KeypointGraphNet, tmp_path: Path, *options: str) -> tuple[float, int]:
    """Of ``tools/benchmark.py large``: GiB, and the cells that it found."""
    save_model(model, tmp_path / "model.pth")
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "large", str(tmp_path / "model.pth"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command += ["--scratch", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    words = run.stdout.split()
    return float(words[words.index("GiB") - 1]), int(words[words.index("cells") - 1])


def test_benchmark_runs(models, tmp_path):
    memory, cells = peak_memory(models["paper"], tmp_path, *"--size 300 --cells 20 --tile 320".split())
    assert 0 < memory < 4 and cells > 5  # the libraries of CUDA take 1.5 GiB where they are loaded


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_image(models, tmp_path):
    """The maps of the whole image would take more than 10 GiB, c1 alone 2.1."""
    memory, cells = peak_memory(models["paper"], tmp_path, *"--size 6000 --cells 3000 --tile 1024".split())
    assert memory < 4 and cells > 2000

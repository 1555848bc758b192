"""Prediction in tiles equals prediction of the whole image, and reads and keeps no more than tiles."""

import copy
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kg_detectron.inference import save_model
from kg_detectron.inference.tiling import predict_tiled
from kg_detectron.modeling import KeypointDecoder, KeypointGraphNet, KeypointMaps
from kg_detectron.synthetic import nuclei_image

ROOT = Path(__file__).parents[2]
NETWORK = {
    "depth": 18,
    "c0_channels": 8,
    "widths": (8, 12, 16, 24),
    "head_kernel": 3,
    "radius": 2.0,
    "smooth_sigma": 1.0,
}
VARIANTS = {
    "paper": {},
    "single_scale": {"scales": (1,), "peak_threshold": 0.001},  # finds little after so short a training
    "seg_s1": {"segmentation": "s1"},
    "ranked": {"blur_weight": 1.0, "overlap_sigma": 0.1, "nms_threshold": 0.7},
    "margin": {"mask_margin": 2.5, "blur_weight": 1.0},
}


def example(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    image, masks = nuclei_image(rng, 96, 96, 10)
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "masks": torch.from_numpy(np.array(masks))}
    return to_tensor(image), target


def to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).to(torch.get_default_dtype())


@pytest.fixture(scope="module")
def models() -> dict[str, KeypointGraphNet]:
    """The variants, trained until they find most cells: only then few scores lie close to each other."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    paper = KeypointGraphNet(**NETWORK)
    optimizer = torch.optim.Adam(paper.parameters(), 4e-3)
    for _ in range(40):
        loss = sum(paper(*map(list, zip(*(example(rng) for _ in range(2)), strict=True))).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    paper.eval()
    every = {name: KeypointGraphNet(**NETWORK | changes).eval() for name, changes in VARIANTS.items()}
    for model in every.values():
        own = model.state_dict()
        fitting = {k: v for k, v in paper.state_dict().items() if k in own and own[k].shape == v.shape}
        model.load_state_dict(own | fitting)
    # The masks of seg_s1 come from another map.
    optimizer = torch.optim.Adam(every["seg_s1"].mask_head.parameters(), 4e-3)
    for _ in range(20):
        image, target = example(rng)
        with torch.no_grad():
            _, decoded = paper.keypoint_branch(paper.backbone(paper.normalised_batch([image])))
        loss = every["seg_s1"].mask_head.loss([decoded["s1"]], [target["boxes"]], [target["masks"]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return every


@torch.no_grad()
def predict_whole(model: KeypointGraphNet, image: np.ndarray) -> dict:
    (found,) = model([to_tensor(image)])
    return found


def assert_same(found: dict, whole: dict, only: Tensor | slice = slice(None)) -> None:
    """The same cells, in the same order but for scores that are equal up to rounding; of `whole`, some are expected."""
    assert (found["scores"].diff() <= 0).all()
    expected = {name: whole[name][only] for name in ("boxes", "scores", "labels", "masks")}
    assert len(found["boxes"]) == len(expected["boxes"])
    # One after another by their places, which are half pixels.
    found, expected = (
        {name: own[name][np.lexsort(own["boxes"].mul(4).round().T.numpy())] for name in expected}
        for own in (found, expected)
    )
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-6)
    assert torch.equal(found["labels"], expected["labels"])
    masks = expected["masks"]
    assert found["masks"].size == masks.size and torch.equal(found["masks"].windows, masks.windows)
    for tiled, crop in zip(found["masks"].crops, masks.crops, strict=True):
        crop = crop >= masks.threshold
        assert tiled.dtype == torch.bool
        assert (tiled & crop).sum() >= 0.999 * (tiled | crop).sum()


class Slices:
    """An image that can only be sliced, and remembers how: (y1, y2, x1, x2)."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.shape = image.shape
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


@pytest.mark.parametrize(
    ("variant", "size", "tile", "overlap"),
    [
        # Narrow images, so that the surroundings of a tile end inside them.
        ("paper", (90, 801), 160, 64),
        ("paper", (903, 120), 224, 30),  # some cells are larger than the overlap
        ("single_scale", (101, 800), 160, 64),
        ("seg_s1", (100, 780), 192, 64),
        ("ranked", (90, 801), 160, 64),
        ("margin", (90, 801), 160, 64),
        # Corners of four tiles, with surroundings that end inside the image and with many tiles.
        ("paper", (610, 620), 320, 64),
        ("seg_s1", (233, 221), 96, 40),
        # Smaller than a tile, than its overlap, than one pixel of c4.
        ("paper", (90, 130), 512, 256),
        ("seg_s1", (40, 9), 32, 64),
    ],
)
def test_equals_the_whole_image(exact, variant, size, tile, overlap):
    height, width = size
    image, cells = nuclei_image(np.random.default_rng(7), max(height, 32), max(width, 32), height * width // 1200)
    image = image[:height, :width].astype(np.float64)
    whole = predict_whole(exact[variant], image)
    assert len(whole["boxes"]) >= len(cells) / 2
    steps = []
    slices = Slices(image)
    found = predict_tiled(exact[variant], slices, tile=tile, overlap=overlap, progress=lambda *s: steps.append(s))
    assert_same(found, whole)
    assert all(before[0] < after[0] and before[1] == after[1] for before, after in pairwise(steps))
    assert steps[-1][0] == steps[-1][1]
    # 256: what this network sees around a tile.
    for y1, y2, x1, x2 in slices.read:
        assert y2 - y1 <= tile + overlap + 512 and x2 - x1 <= tile + overlap + 512


def test_cells_on_seams_and_corners_of_tiles(models, monkeypatch):
    """Tiles so small that many cells hold a corner of four; few are segmented at once."""
    monkeypatch.setattr("kg_detectron.inference.tiling.CROP_PIXELS", 500)
    image, _ = nuclei_image(np.random.default_rng(3), 160, 160, 24)
    found = predict_tiled(models["paper"], image, tile=32, overlap=64)
    assert_same(found, predict_whole(models["paper"], image))
    x1, y1, x2, y2 = (found["boxes"] / 32).T
    in_columns, in_rows = x1.floor() + 1 < x2, y1.floor() + 1 < y2  # the edge of a tile lies inside
    assert (in_columns & in_rows).sum() >= 5


def test_a_cell_that_no_window_holds_is_left_out_with_a_warning(models):
    image, _ = nuclei_image(np.random.default_rng(1), 128, 160, 8)
    whole = predict_whole(models["paper"], image)
    fits = (whole["boxes"][:, 2:] - whole["boxes"][:, :2]).amax(1) <= 32
    assert 0 < fits.sum() < len(fits)
    with pytest.warns(UserWarning, match=rf"{int((~fits).sum())} boxes longer than tile \+ overlap = 32 pixels"):
        found = predict_tiled(models["paper"], image, tile=32, overlap=0)
    assert_same(found, whole, fits)


@pytest.mark.parametrize(("kind", "scale"), [(np.uint16, 1), (np.float32, 0.5), (np.dtype(">f4"), 1)])
def test_reads_a_mapped_file_of_any_type(models, tmp_path, kind, scale):
    image, _ = nuclei_image(np.random.default_rng(5), 64, 96, 6)
    mapped = np.memmap(tmp_path / "image", kind, "w+", shape=image.shape)
    mapped[:] = image * scale
    found = predict_tiled(models["single_scale"], mapped, tile=64, overlap=64)
    assert len(found["boxes"]) > 0
    assert_same(found, predict_whole(models["single_scale"], image * scale))


def test_an_image_without_cells(models):
    model = KeypointGraphNet(**NETWORK, peak_threshold=1e9).eval()
    found = predict_tiled(model, np.zeros((40, 70, 3), np.uint8), tile=32)
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == found["labels"].shape == (0,)
    assert len(found["masks"]) == 0 and found["masks"].size == (40, 70)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tile": 0}, "tile"),
        ({"tile": -32}, "tile"),
        ({"tile": 48}, "tile: expected a positive multiple of 32 pixels, got 48"),
        ({"overlap": -1}, "overlap"),
        ({"image": np.zeros((40, 40), np.uint8)}, "image"),
        ({"image": np.zeros((40, 40, 4), np.uint8)}, "image"),
        ({"image": np.zeros((0, 40, 3), np.uint8)}, "image"),
        ({"model": KeypointGraphNet(**NETWORK)}, "eval"),
    ],
)
def test_bad_arguments_are_named(models, arguments, named):
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(ValueError, match=named):
        predict_tiled(**{"model": models["paper"], "image": image} | arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 50, "head_kernel": 7, "radius": 5.0, "smooth_sigma": 2.0},  # the paper's, but for its widths
        {"scales": (1,)},
        {"scales": (2, 3), "smooth_sigma": 0.0},
    ],
)
def test_tiles_are_read_with_all_that_their_maps_depend_on(changes):
    """What a tile does not read cannot matter: nan there never comes near. And it reads no more than that needs."""
    model = KeypointGraphNet(**NETWORK | {"c0_channels": 2, "widths": (2, 2, 2, 2), "peak_threshold": 1e9} | changes)
    image = np.zeros((32, 32 * 31, 3), np.uint8)
    slices = Slices(image)
    predict_tiled(model.eval(), slices, tile=32)
    _, _, read_from, read_to = slices.read[15]
    core = (15 * 32, 16 * 32)
    assert 0 < read_from < core[0] and core[1] < read_to < image.shape[1]

    def is_clean(read_from: int, read_to: int) -> bool:
        pixels = torch.full((1, 3, 32, image.shape[1]), torch.nan, dtype=torch.float64)
        pixels[..., read_from:read_to] = 0
        with torch.no_grad():
            maps, _ = model.double().keypoint_branch(model.backbone(pixels))
        around = model.decoder.reach
        return all(
            bool(torch.isfinite(value[..., core[0] // m.stride - around : core[1] // m.stride + around]).all())
            for m in maps
            for value in (m.heatmap, m.single_offset, m.group_offset)
        )

    assert is_clean(read_from, read_to)
    # Windows are rounded to the grid of 32 twice, and the field of a value is a little larger to the left.
    assert not is_clean(read_from + 96, read_to) and not is_clean(read_from, read_to - 96)


@pytest.mark.parametrize(("radius", "sigma"), [(1.0, 0.0), (1.5, 0.6), (2.0, 1.0), (5.0, 2.0)])
def test_peaks_depend_on_maps_within_the_decoders_reach(radius, sigma):
    """Cut with so many pixels around it, a map has the peaks of the whole map, for votes of up to 2 r."""
    generator = torch.Generator().manual_seed(0)
    decoder = KeypointDecoder(radius, sigma, peak_threshold=0.0)
    low, high, width = 50, 62, 112
    heatmap = torch.randn(1, 5, 20, width, generator=generator)
    single = (2 * torch.rand(1, 10, 20, width, generator=generator) - 1) * 2 * radius
    group = torch.randn(1, 40, 20, width, generator=generator)

    def peaks(start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        found = decoder.find([KeypointMaps(*(m[..., start:end] for m in (heatmap, single, group)), 1)])
        found.peaks[:, 3] += start
        inside = (found.peaks[:, 3] >= low) & (found.peaks[:, 3] < high)
        return tuple(value[inside] for value in found)

    whole, cut = peaks(0, width), peaks(low - decoder.reach, high + decoder.reach)
    assert len(whole[0]) > 10 and torch.equal(cut[0], whole[0]) and torch.equal(cut[2], whole[2])
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-5, atol=0)


def peak_memory(model: KeypointGraphNet, tmp_path: Path, *options: str) -> tuple[float, int]:
    """Of ``tools/benchmark.py large``: GiB, and the cells that it found."""
    save_model(model, tmp_path / "model.pth")
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "large", str(tmp_path / "model.pth"), *options]
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, "--scratch", str(tmp_path)], env=own, cwd=ROOT, capture_output=True, text=True)
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

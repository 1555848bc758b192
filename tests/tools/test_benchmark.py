"""The benchmark runs, on a small image."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark import models, slide
from benchmark.measure import peak_bytes
from benchmark.scenes import cells

from kg_detectron.modeling import (
    BackboneSettings,
    HeadSettings,
    KeypointGraphNet,
    KeypointGraphSettings,
    TargetSettings,
    TrunkSettings,
)

ROOT = Path(__file__).parents[2]


def run_benchmark(*options: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_operators(device):
    small = "--size 64 --batches 1 2 --cells 3 --peaks 5 80 --boxes 2 --repeats 1".split()
    printed = run_benchmark("ops", "--device", device, *small)
    for case in ("hough_vote", "batch 2, 3 cells an image", "80 peaks take", "2 boxes"):
        assert case in printed
    assert ("weights, 4 x 48" in printed) == (device == "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_models(device):
    """Every table has a line for each model and number of cells, with a figure for each stage."""
    small = "--size 64 --cells 0 3 --repeats 1 --configs kg_r18_synthetic_cpu mask_rcnn_fpn_r18_synthetic_cpu".split()
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("without Detectron2 only the paper's large network can be measured")
    lines = run_benchmark("model", "--device", device, *small).splitlines()
    for model in ("kg_r18_synthetic_cpu", "mask_rcnn_fpn_r18_synthetic_cpu"):
        for count in (0, 3):
            rows = [line for line in lines if line.startswith(f"| {model} | {count} |")]
            assert [line.count("|") for line in rows] == [11, 9, 9, 9, 8]
    assert any("decode + masks, %" in line for line in lines)
    assert any(line.startswith("Masks of 3 cells, `kg_r18_synthetic_cpu`") for line in lines)


def test_a_slide_goes_on_in_its_folder_and_is_compared_with_a_crop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("zarr")
    monkeypatch.setattr(slide, "TILE", 128)
    parser = argparse.ArgumentParser()
    slide.add_command(parser.add_subparsers())
    options = f"--size 384 --tissue 0.5 --tile 128 --crop 384 --folder {tmp_path}"
    arguments = parser.parse_args(["slide", *options.split()])
    for state in ("1 done, 0 done before", "0 done, 1 done before"):
        slide.benchmark_slide(arguments, "cpu")
        printed = capsys.readouterr().out
        assert f"1 files: {state}, 0 failed" in printed and "peak memory" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("192 x 192 pixels: ") and last.endswith(" in four, 0 pixels differ")
    assert int(last.split(": ")[1].split()[0]) > 2


def test_as_many_cells_as_asked_for_reach_the_masks():
    settings = KeypointGraphSettings(
        backbone=BackboneSettings("resnet18", c0_channels=4),
        trunk=TrunkSettings(widths=(4, 6, 8, 8)),
        heads=HeadSettings(head_kernel=3),
        targets=TargetSettings(radius=2.0),
    )
    stages = models.KeypointGraphStages(KeypointGraphNet.build(settings).eval(), torch.zeros(1, 3, 64, 64))
    with torch.no_grad():
        for count in (0, 7):
            run = {name: stage.run for name, stage in stages.stages(count)}
            assert tuple(run) == models.STAGES
            assert len(run["masks"]()[0]) == len(run["paste"]()) == count


def test_peak_memory_is_the_most_that_is_held_at_once():
    def call() -> None:
        for _ in range(3):
            a = torch.zeros(2**20)
            b = a + 1
            del a, b

    assert 2 * 2**22 <= peak_bytes(call, "cpu") < 2 * 2**22 + 2**16


def test_cells_lie_in_the_image():
    boxes = cells(50, 128, 0)
    assert boxes.min() >= 0 and boxes.max() <= 128 and (boxes[:, 2:] - boxes[:, :2]).min() >= 13


def test_whole_images():
    """The command and the other networks, of the smallest size."""
    printed = run_benchmark("images", "--sizes", "1", "--repeats", "1", "--before", str(ROOT))
    names = ["kg_detectron", "kg_detectron --fast", "kg_detectron before", "StarDist (network)"]
    names += ["Mask R-CNN R50-FPN"] * (importlib.util.find_spec("detectron2") is not None)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| 256x256")]
    assert [row[1].strip() for row in rows] == names
    for _, _, command, cpu, image, megabytes, count in rows:
        assert 0 < float(image) < float(command) and float(cpu) > 0 and float(megabytes) > 50 and int(count) == 1

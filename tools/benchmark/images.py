"""The command ``kg-detectron predict`` on whole images of several sizes, beside an earlier commit and other networks.

Every measurement is a process of its own, and the candidates take turns. The networks of StarDist and Mask R-CNN have
random weights. Mask R-CNN gets the number of cells that are in the image, so that its masks cost what they would;
of StarDist only the network is measured, for random maps have a star in every other pixel.
"""

import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from benchmark.models import HAS_DETECTRON2, ROOT, MaskRCNNStages, load_stages
from kg_detectron.modeling import method_class
from kg_detectron.synthetic import nuclei_image

SIZES = ((256, 256), (520, 696), (1040, 1388), (2048, 2048))
CELLS_PER_PIXEL = 1 / 2800  # as in the images of the DSB 2018
DEFINITIONS = """\
Command s: wall time of the process, from its start. CPU s: its time on all cores. Image s: reading, prediction and
writing of the image (Mask R-CNN: from pixels to masks; StarDist: from pixels to maps), without imports and loading.
MB: largest memory of the process. Medians."""

# As the installed command does; at the end of an earlier commit's, `main` was that.
_PREDICT = "from kg_detectron import cli; raise SystemExit(getattr(cli, 'program', cli.main)())"
_OTHER = "from benchmark.images import measure_network; measure_network()"
# Linux counts the peak of the process that started it as its own too, but not here.
_STATUS, _PEAK = Path("/proc/self/status"), re.compile(r"VmHWM:\s*(\d+) kB")
_KEEP_STATUS = "import atexit, shutil, sys; atexit.register(shutil.copyfile, '/proc/self/status', sys.argv.pop())\n"


class Run(NamedTuple):
    """What one process took."""

    command: float
    cpu: float
    image: float
    megabytes: float


@dataclass(frozen=True)
class Candidate:
    """What is measured.

    Attributes:
        name: in the table.
        code: what Python runs.
        paths: folders that Python imports from.
        options: further arguments of ``predict``; None for a network, which takes those of `measure_network`.
    """

    name: str
    code: str
    paths: tuple[Path, ...]
    options: tuple[str, ...] | None

    def __call__(self, image: Path, cells: int, threads: int) -> Run:
        """Run it once.

        Raises:
            RuntimeError: the process failed; with what it printed last.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder)
            if self.options is None:
                arguments = [self.name, str(image), str(cells), folder]
            else:
                arguments = ["predict", str(image), "-o", folder, "--device", "cpu", *self.options]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, self.paths)),
                "OMP_NUM_THREADS": str(threads),
            }
            code = self.code
            if _STATUS.is_file():
                code = _KEEP_STATUS + code
                arguments.append(str(output / "status"))
            start = time.perf_counter()
            with (output / "log").open("w+") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", code, *arguments],
                    env=environment,
                    cwd=self.paths[0],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                seconds = time.perf_counter() - start
                if process.returncode:
                    log.seek(0)
                    raise RuntimeError(f"{self.name}: exit status {process.returncode}: {log.read()[-2000:]}")
            (record,) = json.loads((output / "run.json").read_text(encoding="utf-8"))["files"]
            if _STATUS.is_file():
                found = _PEAK.search((output / "status").read_text(encoding="utf-8"))
                megabytes = int(found[1]) / 2**10 if found else math.nan
            else:
                megabytes = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
            return Run(seconds, usage.ru_utime + usage.ru_stime, record["seconds"], megabytes)


@torch.no_grad()
def measure_network() -> None:
    """A process of `Candidate`: a network by its name on an image; the seconds go to a run.json in a folder."""
    name, path, cells, folder = sys.argv[1:]
    image = cv2.imread(path)
    assert image is not None
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    if name == "Mask R-CNN R50-FPN":
        height, width = (-(-side // 32) * 32 for side in image.shape[:2])
        stages = load_stages("mask_rcnn_fpn_dsb2018", (height, width), "cpu", channels_last=True)
        assert isinstance(stages, MaskRCNNStages)
        start = time.perf_counter()
        for stage_name, stage in stages.stages(int(cells)):  # which runs the other stages on the way to these
            if stage_name in ("decode", "paste"):
                stage.run()
    else:
        model = method_class("stardist").build(None).eval().accelerate(channels_last=True)  # type: ignore[arg-type]
        start = time.perf_counter()
        model.maps(model.batch(list(pixels)))
    seconds = time.perf_counter() - start
    Path(folder, "run.json").write_text(json.dumps({"files": [{"seconds": seconds}]}), encoding="utf-8")


def candidates(before: Path | None, before_model: Path | None, options: list[str]) -> Iterator[Candidate]:
    """This tree, also in its fastest way, the one of before, and the networks that are installed."""
    yield Candidate("kg_detectron", _PREDICT, (ROOT,), tuple(options))
    yield Candidate("kg_detectron --fast", _PREDICT, (ROOT,), (*options, "--fast"))
    if before is not None:
        model = before_model or next(iter(sorted((before / "models").glob("*.safetensors"))), None)
        named = () if model is None else ("-m", str(model.resolve()))
        yield Candidate("kg_detectron before", _PREDICT, (before.resolve(),), named)
    yield Candidate("StarDist (network)", _OTHER, (ROOT / "tools", ROOT), None)
    if HAS_DETECTRON2:
        yield Candidate("Mask R-CNN R50-FPN", _OTHER, (ROOT / "tools", ROOT), None)


def benchmark_images(arguments: argparse.Namespace, device: str) -> None:
    """All candidates on all sizes in turn, as a table in Markdown."""
    options = ["-m", arguments.model] if arguments.model else []
    chosen = list(candidates(arguments.before, arguments.before_model, options))
    runs: dict[tuple[tuple[int, int], str], list[Run]] = {}
    stop = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for size in SIZES[: arguments.sizes]:
                path = Path(folder, f"{size[0]}x{size[1]}.png")
                cells = round(size[0] * size[1] * CELLS_PER_PIXEL)
                if not repeat:
                    cv2.imwrite(str(path), nuclei_image(np.random.default_rng(0), *size, cells)[0])
                for candidate in chosen:
                    if repeat and time.monotonic() > stop:
                        continue
                    print(f"{candidate.name}, {size[0]}x{size[1]}", file=sys.stderr, flush=True)
                    try:
                        run = candidate(path, cells, torch.get_num_threads())
                    except RuntimeError as error:  # such as out of memory; the others still compare
                        print(error, file=sys.stderr, flush=True)
                        continue
                    runs.setdefault((size, candidate.name), []).append(run)
    print(f"\n{DEFINITIONS}\n")
    print("| image | | command s | CPU s | image s | MB | runs |\n|---|---|---:|---:|---:|---:|---:|")
    for (size, name), taken in runs.items():
        command, cpu, image, megabytes = (statistics.median(values) for values in zip(*taken, strict=True))
        figures = f"{command:.1f} | {cpu:.1f} | {image:.2f} | {megabytes:.0f} | {len(taken)}"
        print(f"| {size[0]}x{size[1]} | {name} | {figures} |")
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\nAll processes: {own.ru_utime + own.ru_stime:.0f} s of CPU.")


def add_command(commands: Any) -> None:
    """Add ``images`` to the commands of tools/benchmark.py."""
    command = commands.add_parser("images", help="the command on whole images", description=__doc__)
    command.add_argument("--device", choices=("cpu",), default="cpu", help="(%(default)s)")
    command.add_argument("--model", help="model file, or name of a kept model (default: the command's own)")
    command.add_argument("--before", type=Path, metavar="TREE", help="checkout of an earlier commit, built")
    command.add_argument("--before-model", type=Path, metavar="FILE", help="its model (default: of TREE/models)")
    command.add_argument("--repeats", type=int, default=3, help="of each measurement (%(default)s)")
    command.add_argument("--minutes", type=float, default=6, help="no repeat begins later (%(default)s)")
    command.add_argument("--sizes", type=int, default=len(SIZES), help="so many of the sizes, small ones first")
    command.set_defaults(benchmark=benchmark_images)

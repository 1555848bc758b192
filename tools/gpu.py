"""Everything that needs a GPU, in one command (called by `make gpu`).

Builds the CUDA operators, tests them, runs them under compute-sanitizer, measures operators and models, trains the
keypoint-graph model and Mask R-CNN for ten minutes, and compares the two. A step that fails is named and does not stop
the next ones, unless they need it. ``results/gpu/CARD/`` gets the output of every step and `README.md`, which lists the
steps. The exit status is 1 where a step failed. Without a GPU, ``--device cpu`` tries the steps that can do without.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DATA = ROOT / "output" / "gpu" / "data"
RUNS = {"kg": "kg_r18_synthetic_cpu", "mask_rcnn": "mask_rcnn_fpn_r18_synthetic_cpu"}  # configs
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda")
OPERATOR_TESTS = ("tests/layers/test_ops_compiled.py", "tests/layers/test_convolve_resized.py")


@dataclass(frozen=True)
class Step:
    """A command.

    Args:
        name: what the table calls it, and its file of output.
        command: what is run.
        needs: names of the steps without which it is left out.
        seconds: after which it is asked to end (SIGINT), which is no failure then; 0 for no limit.
        program: that must be installed.
        module: of Python that must be installed.
    """

    name: str
    command: Sequence[object]
    needs: tuple[str, ...] = ()
    seconds: float = 0
    program: str = ""
    module: str = ""


def steps(minutes: float, device: str = "cuda") -> list[Step]:
    """All of them, in order; ``minutes`` of training for each of the two models, on the device "cuda" or "cpu"."""
    python = sys.executable
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    operators = (*PYTEST, *OPERATOR_TESTS, "-k", "not compile and not export")
    benchmark = [python, "tools/benchmark.py"]
    card = ("card",) if device == "cuda" else ()
    data = [python, "datasets/make_synthetic.py", "--kind", "nuclei", "--train", "400", "--val", "60", "--seed", "0"]
    data += ["--size", "128", "128", "--cells", "4", "14", "--output", DATA]
    training = [
        Step(
            f"train {name}",
            [python, "tools/train_net.py", "--config-file", f"configs/{config}.yaml", "SEED", "1"]
            + ["MODEL.DEVICE", device, "SOLVER.MAX_ITER", "1000000", "OUTPUT_DIR", DATA.parent / name],
            (*card, "data"),
            seconds=60 * minutes,
            module="detectron2",
        )
        for name, config in RUNS.items()
    ]
    return [
        Step("card", [python, "-c", "import torch; print(torch.cuda.get_device_properties(0))"]),
        Step("build", [python, "setup.py", "build_ext", "--inplace"]),
        Step("tests", [*PYTEST, "tests"], ("card", "build")),
        Step("memcheck", [*sanitizer, "memcheck", *operators], ("card", "build"), program="compute-sanitizer"),
        Step("racecheck", [*sanitizer, "racecheck", *operators], ("card", "build"), program="compute-sanitizer"),
        Step("synccheck", [*sanitizer, "synccheck", *operators], ("card", "build"), program="compute-sanitizer"),
        Step("operators", [*benchmark, "ops", "--device", device], (*card, "build")),
        Step("models", [*benchmark, "model", "--device", device], (*card, "build")),
        Step("data", data),
        *training,
        Step(
            "comparison",
            [python, "tools/compare.py", *(DATA.parent / name for name in RUNS), "--dataset", "synthetic_val"]
            + ["--weights", "model_stopped.pth", "--output", DATA.parent / "comparison", "--device", device],
            tuple(step.name for step in training),
            module="detectron2",
        ),
    ]


def missing(step: Step, failed: Sequence[str]) -> str:
    """Why a step cannot be run, or nothing."""
    if needed := [name for name in step.needs if name in failed]:
        return f"needs {', '.join(needed)}"
    if step.program and shutil.which(step.program) is None:
        return f"{step.program} is not installed"
    if step.module and importlib.util.find_spec(step.module) is None:
        return f"{step.module} is not installed"
    return ""


def run(step: Step, output: Path) -> str:
    """Run a step; its output goes to the file. Returns what failed, or nothing."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(DATA),
        "FORCE_CUDA": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }
    with output.open("w", encoding="utf-8") as file:
        command = [str(part) for part in step.command]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(step.seconds or None)
        except subprocess.TimeoutExpired:
            process.send_signal(2)  # it saves and ends
            status = 0 if process.wait() in (0, 130) else process.returncode
    return f"exit status {status}" if status else ""


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of training for each model (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="for all but the tests (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu", help="folder (%(default)s)")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    folder = arguments.output / re.sub(r"\W+", "_", card).lower()
    folder.mkdir(parents=True, exist_ok=True)
    DATA.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    lines = [f"# {card}", "", f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    lines += ["| step | result | seconds | output |", "|---|---|--:|---|"]
    for step in steps(arguments.minutes, arguments.device):
        if arguments.only and step.name not in arguments.only:
            continue
        print(f"{step.name} ...", flush=True)
        output = folder / f"{step.name.replace(' ', '_')}.txt"
        start = time.monotonic()
        reason = missing(step, failed)
        fault = f"not run: {reason}" if reason else run(step, output)
        if fault:
            failed.append(step.name)
        result = fault or "ok"
        print(f"{step.name}: {result}", flush=True)
        lines.append(f"| {step.name} | {result} | {time.monotonic() - start:.0f} | {'' if reason else output.name} |")
        (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"FAILED: {', '.join(failed)}" if failed else "All steps passed.", f"See {folder / 'README.md'}.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

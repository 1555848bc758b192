"""``kg-detectron doctor``: what is installed, whether it works, and the command that mends what does not.

Nothing is imported here: PyTorch, the operators and Detectron2 are tried in processes of their own, for a binary that
was built for another PyTorch may end its process.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from kg_detectron._version import __version__

OK = "ok"
NOTE = "note"  # something is missing, and everything runs without it
FAULT = "FAULT"  # something cannot run

INSTALL_TORCH = "pip install --upgrade --force-reinstall torch torchvision"
BUILD_OPERATORS = (
    "make setup   (in a checkout; elsewhere: pip install --no-build-isolation --no-deps --force-reinstall .)"
)
INSTALL_DETECTRON2 = "python tools/install_detectron2.py   (in a checkout of kg_detectron)"

_SECONDS = 300  # for one of the two trials

# Both say what they have got through, step by step.
_SAY = """
import json
def say(step, **facts):
    print(json.dumps({"step": step, **facts}), flush=True)
"""
_TRY_CORE = f"""{_SAY}
import torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
say("torch", version=torch.__version__, cuda=torch.version.cuda, devices=devices)
import torchvision
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
say("torchvision", version=torchvision.__version__)
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from kg_detectron.layers import hough_vote
    from kg_detectron.layers.ops import COMPILED_FOR
problems = [str(warning.message) for warning in caught if "kg_detectron" in str(warning.message)]
say("operators", compiled_for=sorted(COMPILED_FOR), problems=problems)
if devices:
    maps = torch.zeros(1, 15, 4, 4, device="cuda")
    hough_vote(maps[:, :5].contiguous(), maps[:, 5:].contiguous(), 5.0).cpu()
    say("cuda")
"""
_TRY_DETECTRON2 = f"""{_SAY}
import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.model_zoo, detectron2.modeling
say("detectron2")
import detectron2._C
say("_C")
"""


@dataclass(frozen=True)
class Finding:
    """One line of the examination: `state` is `OK`, `NOTE` or `FAULT`; `remedy`, a command, may be empty."""

    state: str
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:5}  {self.name}: {self.text}"
        return f"{line}\n       {self.remedy}" if self.remedy else line


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="see whether everything installed works",
        description="Try PyTorch, torchvision, the compiled operators, CUDA and Detectron2, and name the command that "
        "mends what does not work. Exit status 1 where something cannot run.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings."""
    findings = examine()
    print(*findings, sep="\n")
    return 1 if any(finding.state == FAULT for finding in findings) else 0


def examine() -> list[Finding]:
    """Look at everything that kg_detectron stands on; takes some seconds."""
    findings = [Finding(OK, "kg_detectron", f"{__version__}, Python {platform.python_version()}"), *_requirements()]
    with ThreadPoolExecutor() as pool:
        core = pool.submit(_try, _TRY_CORE)
        detectron2 = pool.submit(_try, _TRY_DETECTRON2) if find_spec("detectron2") else None
        findings += _core(*core.result())
        findings += _detectron2(*detectron2.result()) if detectron2 else [_no_detectron2()]
    return findings


def _try(code: str) -> tuple[dict[str, dict], str]:
    """Run `code` in a new process: the steps that it got through, and what its last words were."""
    # The same kg_detectron as this one.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {_SECONDS} s"
    steps = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"step"')]
    words = [line for line in run.stderr.splitlines() if line.strip()] or [f"the process ended with {run.returncode}"]
    return {step["step"]: step for step in steps}, "" if run.returncode == 0 else words[-1]


def _requirements() -> Iterator[Finding]:
    """The packages that the installed kg_detectron asks for and that are absent."""
    try:
        lines = requires("kg_detectron") or []
    except PackageNotFoundError:
        yield Finding(NOTE, "installation", "kg_detectron runs from its folder, not installed", "pip install -e .")
        return
    matches = [re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line]
    names = [match.group() for match in matches if match is not None]
    absent = [name for name in names if _version(name) is None]
    if absent:
        yield Finding(FAULT, "requirements", f"{', '.join(absent)} not installed", f"pip install {' '.join(absent)}")


def _core(steps: dict[str, dict], error: str) -> Iterator[Finding]:
    if "torch" not in steps:
        yield Finding(FAULT, "torch", f"{_version('torch') or 'not installed'}: {error}", INSTALL_TORCH)
        return
    torch = steps["torch"]
    yield Finding(OK, "torch", f"{torch['version']}, CUDA {torch['cuda'] or 'not in this build'}")

    mismatch = _mismatch(torch["version"])
    if mismatch or "torchvision" not in steps:
        text = mismatch or f"{_version('torchvision') or 'not installed'}: {error}"
        yield Finding(FAULT, "torchvision", text, INSTALL_TORCH)
    else:
        yield Finding(OK, "torchvision", f"{steps['torchvision']['version']}, made for this torch")

    devices = torch["devices"]
    compiled_for = steps.get("operators", {}).get("compiled_for", [])
    if "torchvision" in steps:
        yield _operators(steps.get("operators"), error)
    if devices and "operators" in steps and "cuda" not in steps:
        yield Finding(FAULT, "CUDA device", f"{', '.join(devices)}: {error}", INSTALL_TORCH)
    elif devices and "cuda" not in compiled_for:
        text = f"{', '.join(devices)}; the operators are not compiled for it, and their slow PyTorch reference runs"
        yield Finding(NOTE, "CUDA device", text, f"CUDA_HOME=/usr/local/cuda FORCE_CUDA=1 {BUILD_OPERATORS}")
    elif devices:
        yield Finding(OK, "CUDA device", ", ".join(devices))
    elif shutil.which("nvidia-smi") is None:
        yield Finding(OK, "CUDA device", "none, the CPU computes")
    elif torch["cuda"] is None:
        yield Finding(NOTE, "CUDA device", "not used, for this build of torch is for the CPU only", INSTALL_TORCH)
    else:
        yield Finding(NOTE, "CUDA device", "torch sees none, the CPU computes; the driver's own view:", "nvidia-smi")


def _operators(step: dict | None, error: str) -> Finding:
    if step is None:
        return Finding(FAULT, "operators", error, BUILD_OPERATORS)
    if step["compiled_for"]:
        return Finding(OK, "operators", f"compiled for {' and '.join(step['compiled_for']).upper()}")
    reason = "".join(f"; {problem}" for problem in step["problems"])
    return Finding(NOTE, "operators", f"not compiled, their slow PyTorch reference runs{reason}", BUILD_OPERATORS)


def _mismatch(torch_version: str) -> str | None:
    """Why the installed torchvision cannot be that torch's, by their metadata; None where it can."""
    own = _version("torchvision")
    if own is None:
        return None
    wanted = [re.match(r"torch\s*\(?==\s*([\w.]+)", line) for line in requires("torchvision") or []]
    release, _, build = torch_version.partition("+")
    for wish in filter(None, wanted):
        if wish.group(1).partition("+")[0] != release:
            return f"{own} is made for torch {wish.group(1)}, installed is {torch_version}"
    own_build = own.partition("+")[2]
    if build and own_build and build != own_build:
        return f"{own} and torch {torch_version} are builds for different devices"
    return None


def _no_detectron2() -> Finding:
    text = "not installed: prediction works without it; training, evaluation and Mask R-CNN in Detectron2 need it"
    return Finding(NOTE, "Detectron2", text, INSTALL_DETECTRON2)


def _detectron2(steps: dict[str, dict], error: str) -> Iterator[Finding]:
    own = _version("detectron2") or "of unknown version"
    if "detectron2" not in steps:
        yield Finding(FAULT, "Detectron2", f"{own}, does not import: {error}", INSTALL_DETECTRON2)
    elif "_C" in steps:
        yield Finding(OK, "Detectron2", f"{own}, with its compiled part")
    elif "No module named" in error:
        yield Finding(OK, "Detectron2", f"{own}, without its compiled part, which nothing here needs")
    else:
        yield Finding(NOTE, "Detectron2", f"{own}; its compiled part does not load: {error}", INSTALL_DETECTRON2)


def _version(distribution: str) -> str | None:
    try:
        return installed_version(distribution)
    except PackageNotFoundError:
        return None

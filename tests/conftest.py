"""What all tests share: the markers' meaning, what is left out and said aloud, the folder of given data."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
TESTS_OF_DETECTRON2 = ROOT / "tests" / "d2"
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
HAS_CUDA = torch.cuda.is_available()
TESTS_OF_NAPARI = ROOT / "tests" / "napari"


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A folder of tests of its name is none: it has no file."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def why_no_napari() -> str | None:
    """Why the tests of the napari plugin cannot run here, or None. Its canvas needs OpenGL, which needs a display."""
    if not is_installed("napari"):
        return "napari is not installed"
    if not any(map(is_installed, ("PyQt5", "PyQt6", "PySide6"))):
        return "there is no Qt"
    if sys.platform == "linux" and "DISPLAY" not in os.environ and shutil.which("Xvfb") is None:
        return "there is no display, and no Xvfb to make one"
    return None


NO_NAPARI = why_no_napari()
HAS_NOTEBOOK = is_installed("nbclient") and is_installed("ipykernel")

# Small tensors: more threads only wait for each other. Of several processes of pytest-xdist each has its core, and so
# have the programs that they start: what is computed depends on the number of threads in the last digit.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(torch.get_num_threads(), 4))

# The same examples in every run, and no limit on the time of one: a busy machine must not fail a test.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Numbers of tests left out: by reason.
LEFT_OUT = pytest.StashKey[dict[str, int]]()


class UnimportedTest(pytest.Item):
    """A test function in a module that cannot be imported here. ``line`` is where it begins, from 0."""

    def __init__(self, *, line: int, **node: Any) -> None:
        super().__init__(**node)
        self.line = line

    def runtest(self) -> None:
        """Never reached: the marker detectron2 skips it."""

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.line, self.name


class UnimportedModule(pytest.File):
    """The test functions of a module of tests/d2, read from its source, where Detectron2 is not installed."""

    def collect(self) -> Iterator[UnimportedTest]:
        tree = ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
        for prefix, body in [("", tree.body), *((f"{node.name}::", node.body) for node in classes)]:
            for node in body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                    yield UnimportedTest.from_parent(self, name=prefix + node.name, line=node.lineno - 1)


def pytest_configure(config: pytest.Config) -> None:
    """Start a display that has OpenGL, where there is none and napari is tested: one for all processes of a run.

    Xvfb ends after this process, when its standard input ends: Qt would complain if the display went first.
    """
    if hasattr(config, "workerinput") or NO_NAPARI or "DISPLAY" in os.environ or shutil.which("Xvfb") is None:
        return
    reading, writing = os.pipe()
    start = f"Xvfb -displayfd {writing} -screen 0 1280x960x24 -nolisten tcp -noreset & cat; kill $!"
    subprocess.Popen(["sh", "-c", start], pass_fds=[writing], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        number = pipe.readline().strip()
    assert number, "Xvfb did not start"
    os.environ["DISPLAY"] = f":{number}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, which take minutes")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if not HAS_DETECTRON2 and TESTS_OF_DETECTRON2 in module_path.parents:
        return UnimportedModule.from_parent(parent, path=module_path)
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    if TESTS_OF_DETECTRON2 in item.path.parents:
        item.add_marker("detectron2")
    if TESTS_OF_NAPARI in item.path.parents:
        item.add_marker("napari")


@pytest.hookimpl(trylast=True)  # after -k and -m, so that only tests which were asked for are counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = config.stash[LEFT_OUT] = {"detectron2": 0, "cuda": 0, "slow": 0, "napari": 0, "notebook": 0}
    if not config.getoption("slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        left_out["slow"] = len(slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    needs = {
        "detectron2": (HAS_DETECTRON2, "Detectron2 is not installed"),
        "cuda": (HAS_CUDA, "no CUDA device"),
        "napari": (NO_NAPARI is None, NO_NAPARI or ""),
        "notebook": (HAS_NOTEBOOK, "nbclient or ipykernel is not installed"),
    }
    for item in items:
        for marker, (present, reason) in needs.items():
            if item.get_closest_marker(marker) and not present:
                item.add_marker(pytest.mark.skip(reason=reason))
                left_out[marker] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist: every process collects all tests, so the counts of one are those of all."""
    node.config.stash[LEFT_OUT] = node.workeroutput.get("left_out", {})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(trylast=True)  # below the table of durations, where it is seen
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, {})
    lines = {
        "detectron2": "DETECTRON2 IS NOT INSTALLED: {} tests of it were skipped "
        "(those of tests/d2 are counted by function, not by parameter: the files cannot be imported)",
        "cuda": "NO CUDA DEVICE: {} tests were skipped",
        "napari": f"NO TESTS OF THE NAPARI PLUGIN, FOR {(NO_NAPARI or '').upper()}: {{}} tests were skipped",
        "notebook": "NBCLIENT OR IPYKERNEL IS NOT INSTALLED: {} tests of notebooks were skipped",
        "slow": "SLOW TESTS NOT RUN: {} (run them with --slow)",
    }
    for marker, line in lines.items():
        if left_out.get(marker):
            terminalreporter.write_line(line.format(left_out[marker]), yellow=True, bold=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files and real images beside this checkout; the test skips where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the golden files and real images are not here: no folder 'shared' beside this checkout")
    return folder

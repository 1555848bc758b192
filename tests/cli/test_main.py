"""The command ``kg-detectron``."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

import kg_detectron
from kg_detectron.cli.main import main


def test_version_names_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["kg_detectron", "torch", "torchvision", "Detectron2", "Python"]
    assert lines["kg_detectron"] == kg_detectron.__version__
    assert lines["Python"] == platform.python_version()
    assert (lines["Detectron2"] == "not installed") == (importlib.util.find_spec("detectron2") is None)


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none_installed(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", none_installed)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.count("not installed") == 3


def test_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: kg-detectron")


def test_unknown_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--frobnicate"])
    assert stop.value.code == 2
    assert "--frobnicate" in capsys.readouterr().err


def test_the_program_ends_with_all_that_is_left_to_do() -> None:
    """It does not unload PyTorch, but it waits for threads, and calls what is registered for the end."""
    code = (
        "import atexit, sys, threading, time\n"
        "from kg_detectron.cli import program\n"
        "def late():\n"
        "    time.sleep(0.3)\n"
        "    sys.stdout.write('late ')\n"
        "threading.Thread(target=late).start()\n"
        "atexit.register(sys.stdout.write, 'last')\n"
        "program()\n"
        "print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code, "predict", "nothing", "-o", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "late last"
    assert done.stderr == "kg-detectron: error: nothing: there is no such file or folder\n"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_soon_sleep_unless_the_user_wants_otherwise(given: dict[str, str], spins: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    code = "import atexit, os; atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'))); "
    done = subprocess.run(
        [sys.executable, "-c", code + "from kg_detectron.cli import program; program()"],
        capture_output=True,
        text=True,
        env=environment | given,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == spins


def test_the_package_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "kg_detectron", "models"], capture_output=True, text=True)
    assert done.returncode == 0 and "nuclei" in done.stdout

"""Imports go one way, and the core stands without Detectron2."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kg_detectron"

OF_NAPARI = ("napari", "magicgui", "qtpy", "superqt", "kg_detectron.napari")
BLOCKED = ("detectron2", "napari", "magicgui", "qtpy", "superqt")

# cells -> io -> metrics, export; graph -> layers -> modeling, which takes normalisation and resizing from io;
# all meet at inference -> report -> cli. What each part may import of the others:
CELLS = {"cells"}  # containers, without model code
LAYERS = {"graph"}
MODELING = CELLS | LAYERS | {"layers", "io"}
INFERENCE = MODELING | {"modeling", "metrics", "io", "export", "synthetic", "_version"}
MAY_IMPORT = {
    "_version": set(),
    "graph": set(),
    "cells": set(),
    "io": CELLS,
    "export": CELLS | {"io", "_version"},
    "metrics": CELLS | {"io", "_version"},
    "synthetic": CELLS,
    "layers": LAYERS,
    "modeling": MODELING,
    "inference": INFERENCE,
    "training": INFERENCE | {"inference"},
    "report": INFERENCE | {"inference"},
    "cli": INFERENCE | {"inference", "training", "report"},
    "d2": INFERENCE | {"inference", "training"},
    "napari": INFERENCE | {"inference", "training"},
    "__init__": INFERENCE | {"inference"},
    "__main__": {"cli"},
}


def imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names that the file imports, anywhere in it, ``import_module("...")`` included.

    ``from a import b`` gives ``a.b``: whether b is a module is for the caller to see.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the folder of the file, in an __init__.py too.
            folder = path.parent.relative_to(ROOT).parts
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "importorskip"):
                yield str(node.args[0].value)


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


PARTS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in python_files(PACKAGE)})


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_one_way(part: str) -> None:
    assert part in MAY_IMPORT, f"kg_detectron.{part} has no place in the diagram of imports: give it one in {__file__}"
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else python_files(PACKAGE / part)
    for path in files:
        for name in imported_names(path):
            if not is_in(name, "kg_detectron") or name == "kg_detectron.__version__":
                continue
            target = name.split(".")[1] if "." in name else "__init__"
            allowed = MAY_IMPORT[part] | {part}
            assert target in allowed, f"{path.relative_to(ROOT)} imports {name}; kg_detectron.{part} may not"


def test_only_d2_tools_and_their_tests_import_detectron2() -> None:
    may = (
        PACKAGE / "d2",
        ROOT / "tools",
        ROOT / "tests" / "d2",
        ROOT / "tests" / "builders.py",
        ROOT / "tests" / "tools",
    )
    folders = [PACKAGE, ROOT / "tests", ROOT / "datasets", ROOT / "tools"]
    importing = [
        path
        for folder in folders
        for path in python_files(folder)
        if any(is_in(name, "detectron2") or is_in(name, "kg_detectron.d2") for name in imported_names(path))
    ]
    assert PACKAGE / "d2" / "config.py" in importing, "the search itself finds nothing"
    assert [str(path.relative_to(ROOT)) for path in importing if not any(m in (path, *path.parents) for m in may)] == []


def test_only_the_plugin_and_its_tests_import_napari() -> None:
    may = (PACKAGE / "napari", ROOT / "tests" / "napari", ROOT / "tools" / "docs_pictures.py")
    importing = [
        path
        for folder in (PACKAGE, ROOT / "tests", ROOT / "datasets", ROOT / "tools")
        for path in python_files(folder)
        if any(is_in(name, package) for name in imported_names(path) for package in OF_NAPARI)
    ]
    assert PACKAGE / "napari" / "widget.py" in importing, "the search itself finds nothing"
    assert [str(path.relative_to(ROOT)) for path in importing if not any(m in (path, *path.parents) for m in may)] == []


def test_core_imports_with_detectron2_and_napari_blocked() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in python_files(PACKAGE)
        if PACKAGE / "d2" not in path.parents and PACKAGE / "napari" not in path.parents
    ]
    assert "kg_detectron.cli" in modules
    code = f"""
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            # Not an ImportError, which the importing module could catch.
            sys.exit("the core imports " + name)

sys.meta_path.insert(0, Block())
for module in {modules!r}:
    importlib.import_module(module)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

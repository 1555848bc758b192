"""The images that a command is given, by files, folders and patterns."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Endings of the files that are taken from a folder; files that are named themselves may have any.
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Input(NamedTuple):
    """An image and what its results are called: a path without ending, relative to the folder of results."""

    path: Path
    name: str


def find_inputs(inputs: Sequence[str | Path], output: str | Path) -> list[Input]:
    """Find all images, each once, in the order of the inputs, sorted within each.

    Of a folder, the PNG, JPEG and TIFF files directly in it; of a pattern with ``*``, ``?``, ``[...]`` or ``**``, all
    files that match. Results of a pattern keep the folders below its fixed part: ``plates/*/image.tif`` gives
    ``well1/image``. Hidden files are left out, and the results of earlier runs in ``output``. What does not exist, or
    matches nothing, stays as it is, to be missed when it is read.

    Raises:
        ValueError: no inputs; two images whose results would have the same name; results beside their image, where the
            next run would take them for images.
    """
    output = Path(os.path.abspath(output))
    found: dict[Path, Input] = {}
    for given in inputs:
        root, paths = _expand(os.fspath(given))
        for path in paths:
            if root != output and root in output.parents and output in path.parents:
                continue
            name = path.relative_to(root).with_suffix("") if path.suffix.lower() in ENDINGS else path.relative_to(root)
            found.setdefault(path, Input(path, name.as_posix()))
    if not found:
        raise ValueError("inputs: expected at least one file, folder or pattern")
    owner: dict[str, Input] = {}
    for item in found.values():
        other = owner.setdefault(item.name.casefold(), item)
        if other is not item:
            raise ValueError(
                f"{other.path} and {item.path} would have the same names of results, {item.name}: "
                "give them output folders of their own, or name their common folder by a pattern"
            )
        if (output / item.name).parent == item.path.parent:
            raise ValueError(f"{item.path}: its results would lie beside it in {output}; choose another output folder")
    return list(found.values())


def _expand(given: str) -> tuple[Path, list[Path]]:
    """The folder from which the names of results start, and the files."""
    path = Path(os.path.abspath(given))
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
        return (path, inside) if inside else (path.parent, [path])
    if os.path.lexists(path) or not glob.has_magic(given):
        return path.parent, [path]
    fixed = Path(path.anchor)
    for part in path.relative_to(fixed).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    matching = sorted(Path(p) for p in glob.glob(os.fspath(path), recursive=True))
    matching = [p for p in matching if not p.is_dir() or p.suffix.lower() in ENDINGS]
    return (fixed, matching) if matching else (path.parent, [path])

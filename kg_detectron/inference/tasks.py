"""The files of a run that are to be predicted."""

import shutil
from pathlib import Path
from typing import NamedTuple

from kg_detectron.inference.manifest import FileRecord
from kg_detectron.io.finding import Input

STAGING = ".kg-detectron-tasks-"  # folders in the output folder begin with it


class Task(NamedTuple):
    """A file to predict; the fields are arguments of `FilePredictor`."""

    item: Input
    known: FileRecord | None
    taken: tuple[str, ...]


def remove_staging(output: Path) -> None:
    """Delete what workers of this and earlier runs left in a folder of results, which must be locked."""
    for folder in output.glob(STAGING + "*"):
        shutil.rmtree(folder, ignore_errors=True)

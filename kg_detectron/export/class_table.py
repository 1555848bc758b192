"""The class of each cell of a label image, as a table: ``id``, ``class_id``, ``class``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kg_detectron.export.measurements import write_table

if TYPE_CHECKING:
    from kg_detectron.export.result import Result


def write(path: Path, result: "Result") -> None:
    """Write the table of one image as CSV; ``id`` is the cell's number in the label image."""
    write_table(path, _columns(result))


def write_stack(path: Path, results: Sequence["Result"]) -> None:
    """Write the table of all planes of a stack; ids begin anew on every ``page``."""
    tables = [{"page": np.full(len(result), result.page), **_columns(result)} for result in results]
    write_table(path, {name: np.concatenate([table[name] for table in tables]) for name in tables[0]})


def _columns(result: "Result") -> dict[str, np.ndarray]:
    return {
        "id": np.arange(1, len(result) + 1),
        "class_id": np.array(result.labels, np.int64),
        "class": np.array([result.category(label) for label in result.labels], object),
    }

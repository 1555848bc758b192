"""Tables of a whole run: ``images.csv``, a row an image, and ``cells.csv``, a row a cell, also as Parquet."""

import csv
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from kg_detectron.export.kinds import EXPORTERS
from kg_detectron.inference.manifest import FileRecord, Manifest
from kg_detectron.io.atomic import replacing

CELLS_TABLE, IMAGES_TABLE, PARQUET_TABLE = "cells.csv", "images.csv", "cells.parquet"
_FIRST_COLUMNS = ("page", "t", "z")
_TEXTS, _INTEGERS = ("image", "class"), ("id", "page", "t", "z", "area_px")  # columns; others are real numbers
_MEASURED = {"id", "score", "area_px"}  # columns of every table of cells
_ROWS = 2**17  # that are written to Parquet at once


def remove_tables(folder: Path, names: Sequence[str] = (CELLS_TABLE, IMAGES_TABLE, PARQUET_TABLE)) -> None:
    """Delete the tables of an earlier run, which new results make wrong."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def is_parquet_installed() -> bool:
    """Whether the package pyarrow is there."""
    return importlib.util.find_spec("pyarrow") is not None


def write_tables(folder: Path, manifest: Manifest, *, parquet: bool = False) -> list[str]:
    """Write the tables of all results in a folder, whole or not at all, in memory that one image bounds.

    A cell of ``cells.csv`` has the columns of its image's own table, and ``image``; columns that an image has not are
    empty. The table is left out where no image has one. With `parquet` it is written as ``cells.parquet`` too.

    An image's own table that somebody changed so that it is no longer one of cells, or removed, has no rows in it.

    Returns:
        What is wrong with such tables, and with those that have lost or gained rows; it is among the notes of
        ``images.csv`` too.
    """
    records = sorted(manifest.valid_records(), key=lambda record: record.name)
    tables: list[tuple[FileRecord, Path]] = []
    columns: dict[str, None] = {}
    faults: dict[str, list[str]] = {}  # by the name of the record
    outputs = [(record, output) for record in records for output in record.outputs if _is_table(output)]
    for record, output in outputs:
        path = folder / output
        try:
            names, rows = _check_table(path)
        except (OSError, ValueError, csv.Error) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            fault = f"its rows are not in {CELLS_TABLE}, for it is not as it was written ({why})"
        else:
            tables.append((record, path))
            columns |= dict.fromkeys(names)
            expected = _cells_of(record, output)
            if expected in (None, rows):
                continue
            fault = f"it has {rows} rows, where {expected} cells were found"
        faults.setdefault(record.name, []).append(f"{path}: {fault}; delete it and run again to have it written anew")
    _write_images(folder, manifest, records, faults)
    if tables:
        _write_cells(folder, tables, columns)
        if parquet:
            _write_parquet(folder)
    elif faults:  # what is there has rows that the run cannot vouch for
        remove_tables(folder, (CELLS_TABLE, PARQUET_TABLE))
    return [fault for of_record in faults.values() for fault in of_record]


def _is_table(output: str) -> bool:
    return output.endswith(EXPORTERS["csv"].ending)


def _check_table(path: Path) -> tuple[list[str], int]:
    """The columns of an image's own table, and the number of its rows.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read as a table of cells, such as one with semicolons.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        names, rows = next(reader, []), 0
        if not set(names) >= _MEASURED or "image" in names or len(set(names)) < len(names):
            found = ", ".join(names[:4]) or "none"
            raise ValueError(f"expected columns as id, score, area_px, with commas between them; the first are {found}")
        parsers = [_parser(name) for name in names]
        for row in reader:
            rows += 1
            if len(row) != len(names):
                raise ValueError(f"line {reader.line_num} has {len(row)} values for {len(names)} columns")
            for name, parse, value in zip(names, parsers, row, strict=True):
                try:
                    parse(value)
                except ValueError:
                    raise ValueError(f"line {reader.line_num} has {value!r} as its {name}") from None
    return names, rows


def _cells_of(record: FileRecord, output: str) -> int | None:
    """The cells in a table of a file; None where the record is of a failure, and the table of an earlier run."""
    if record.error is not None:
        return None
    name = output.removesuffix(EXPORTERS["csv"].ending)
    return next((plane.cells for plane in record.planes if plane.name == name), record.cells)


def _parser(column: str) -> Callable[[str], object]:
    return str if column in _TEXTS else int if column in _INTEGERS else float


def _write_cells(folder: Path, tables: list[tuple[FileRecord, Path]], columns: Iterable[str]) -> None:
    columns = list(columns)
    first = [name for name in _FIRST_COLUMNS if name in columns]
    names = ["image", *first, *(name for name in columns if name not in first)]
    with replacing(folder / CELLS_TABLE) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        for record, path in tables:
            with open(path, encoding="utf-8", newline="") as table:
                writer.writerows({"image": record.image, **row} for row in csv.DictReader(table))


def _write_parquet(folder: Path) -> None:
    """The rows of ``cells.csv``, a part of them at a time."""
    arrow = importlib.import_module("pyarrow")
    writer_class = importlib.import_module("pyarrow.parquet").ParquetWriter
    with open(folder / CELLS_TABLE, encoding="utf-8", newline="") as table, replacing(folder / PARQUET_TABLE) as target:
        reader = csv.reader(table)
        names = next(reader)
        types = [
            arrow.string() if name in _TEXTS else arrow.int64() if name in _INTEGERS else arrow.float64()
            for name in names
        ]
        schema = arrow.schema(list(zip(names, types, strict=True)))
        parsers = [_parser(name) for name in names]
        with writer_class(target, schema) as writer:
            while rows := list(islice(reader, _ROWS)):
                columns = [
                    arrow.array([parse(value) if value else None for value in column], type)
                    for column, parse, type in zip(zip(*rows, strict=True), parsers, types, strict=True)
                ]
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def _write_images(
    folder: Path, manifest: Manifest, records: list[FileRecord], faults: Mapping[str, Sequence[str]]
) -> None:
    thresholds = {id(record): run.threshold for run in manifest.runs for record in run.files.values()}
    rows = [
        {"image": record.image, **row, "threshold": thresholds[id(record)]}
        for record in records
        for row in _rows(record, faults.get(record.name, ()))
    ]
    names = ["image", "scene", "page", "t", "z", "height_px", "width_px", "cells", "area_share", "scale"]
    names += ["scale_source", "pixel_size_um", "pixel_size_source", "threshold", "seconds", "notes", "error"]
    used = {name for row in rows for name, value in row.items() if value is not None}
    names = [name for name in names if name in used or name not in ("scene", "page", "t", "z")]
    with replacing(folder / IMAGES_TABLE) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)


def _rows(record: FileRecord, faults: Sequence[str]) -> Iterator[dict[str, object]]:
    """A row for each page; the seconds, notes, faults of tables and error of a file stand in its first."""
    notes = "; ".join(note.rstrip(".") for note in (*record.notes, *faults)) or None
    of_file = {"seconds": record.seconds, "notes": notes, "error": record.error}
    if not record.planes:
        yield {"cells": record.cells if record.error is None else None, **of_file}
    for plane in record.planes:
        yield {
            "scene": plane.scene,
            "page": plane.page or None,
            **{axis.lower(): index + 1 for axis, index in plane.position.items()},
            "height_px": plane.size[0],
            "width_px": plane.size[1],
            "cells": plane.cells,
            "area_share": f"{plane.area_share:.6g}",
            "scale": f"{plane.scale[0]:.6g}"
            if plane.scale[0] == plane.scale[1]
            else "x".join(f"{value:.6g}" for value in plane.scale),
            "scale_source": plane.scale_source,
            "pixel_size_um": record.pixel_size,
            "pixel_size_source": record.pixel_size_source,
            **of_file,
        }
        of_file = {}

"""Tables of a whole run: ``images.csv``, a row an image, and ``cells.csv``, a row a cell, also as Parquet."""

import csv
import importlib
import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from kg_detectron.export.kinds import EXPORTERS
from kg_detectron.inference.manifest import FileRecord, Manifest
from kg_detectron.io.atomic import replacing

CELLS_TABLE, IMAGES_TABLE, PARQUET_TABLE = "cells.csv", "images.csv", "cells.parquet"
_FIRST_COLUMNS = ("page", "t", "z")
_TEXTS, _INTEGERS = ("image", "class"), ("id", "page", "t", "z", "area_px")  # columns; others are real numbers
_ROWS = 2**17  # that are written to Parquet at once


def remove_tables(folder: Path) -> None:
    """Delete the tables of an earlier run, which new results make wrong."""
    for name in (CELLS_TABLE, IMAGES_TABLE, PARQUET_TABLE):
        (folder / name).unlink(missing_ok=True)


def is_parquet_installed() -> bool:
    """Whether the package pyarrow is there."""
    return importlib.util.find_spec("pyarrow") is not None


def write_tables(folder: Path, manifest: Manifest, *, parquet: bool = False) -> None:
    """Write the tables of all results in a folder, whole or not at all, in memory that one image bounds.

    A cell of ``cells.csv`` has the columns of its image's own table, and ``image``; columns that an image has not are
    empty. The table is left out where no image has one. With `parquet` it is written as ``cells.parquet`` too.
    """
    records = sorted(manifest.valid_records(), key=lambda record: record.name)
    _write_images(folder, manifest, records)
    tables = [(record, folder / output) for record in records for output in record.outputs if _is_table(output)]
    if tables:
        _write_cells(folder, tables)
        if parquet:
            _write_parquet(folder)


def _is_table(output: str) -> bool:
    return output.endswith(EXPORTERS["csv"].ending)


def _write_cells(folder: Path, tables: list[tuple[FileRecord, Path]]) -> None:
    columns: dict[str, None] = {}
    for _, path in tables:
        with open(path, encoding="utf-8", newline="") as file:
            columns |= dict.fromkeys(next(csv.reader(file)))
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
        parsers = [str if name in _TEXTS else int if name in _INTEGERS else float for name in names]
        with writer_class(target, schema) as writer:
            while rows := list(islice(reader, _ROWS)):
                columns = [
                    arrow.array([parse(value) if value else None for value in column], type)
                    for column, parse, type in zip(zip(*rows, strict=True), parsers, types, strict=True)
                ]
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def _write_images(folder: Path, manifest: Manifest, records: list[FileRecord]) -> None:
    thresholds = {id(record): run.threshold for run in manifest.runs for record in run.files.values()}
    rows = [
        {"image": record.image, **row, "threshold": thresholds[id(record)]}
        for record in records
        for row in _rows(record)
    ]
    names = ["image", "scene", "page", "t", "z", "height_px", "width_px", "cells", "area_share", "scale"]
    names += ["scale_source", "pixel_size_um", "pixel_size_source", "threshold", "seconds", "notes", "error"]
    used = {name for row in rows for name, value in row.items() if value is not None}
    names = [name for name in names if name in used or name not in ("scene", "page", "t", "z")]
    with replacing(folder / IMAGES_TABLE) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)


def _rows(record: FileRecord) -> Iterator[dict[str, object]]:
    """A row for each page; the seconds, notes and error of a file stand in its first."""
    notes = "; ".join(note.rstrip(".") for note in record.notes) or None
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

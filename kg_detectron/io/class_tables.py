"""The classes of the cells of label images, from tables beside them: CSV or JSON."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from kg_detectron.io.coco import read_json

ENDINGS = ("_classes.csv", "_classes.json", ".csv", ".json")  # of the table of one image, behind its name
_ID_COLUMNS, _CLASS_COLUMN, _IMAGE_COLUMN = ("id", "label"), "class", "image"


class ClassTables:
    """Tables of all images in one file, or a file an image in a folder.

    A CSV has the columns ``id`` (or ``label``), the cell's number in its label image, and ``class``, its name; one for
    all images has ``image`` as well, the image's file name. A JSON is ``{"1": "tumour", ...}``, of all images
    ``{"a.png": {"1": "tumour", ...}, ...}``. An empty class, or none, is a cell whose class is not known.

    An image in a subfolder is ``plate/a.png``, or ``a.png`` where no other image is called so.

    Args:
        path: the file of all images; or the folder, where that of the image ``a.png`` is the first there is of
            ``a_classes.csv``, ``a_classes.json``, ``a.csv`` and ``a.json``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is no such table.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder of classes")
        self._all = None if self.path.is_dir() else _read_all(self.path)
        self._images: dict[str, str] = {}  # the image that was taken to be meant by each name in the tables

    def of_image(self, name: str) -> dict[int, str]:
        """The class of each number of an image's label image; ``name`` is the image's, without ending.

        Raises:
            FileNotFoundError, ValueError: there is no table of the image, or it is none, or that of another image too.
        """
        for named in dict.fromkeys((name, PurePath(name).name)):
            classes = self._of_name(named)
            if classes is None:
                continue
            other = self._images.setdefault(named, name)
            if other != name:
                raise ValueError(
                    f"{self.path}: {named} may be the image {other} or {name}; expected names with their folders"
                )
            return classes
        if self._all is None:
            raise FileNotFoundError(f"{self.path}: there is no table of {name}: {', '.join(ENDINGS)}")
        raise ValueError(f"{self.path}: it has no cell of the image {name}")

    def _of_name(self, name: str) -> dict[int, str] | None:
        if self._all is not None:
            return self._all.get(name)
        files = (self.path / (name + ending) for ending in ENDINGS)
        file = next((file for file in files if file.is_file()), None)
        return None if file is None else read_class_table(file)


def _without_ending(name: str) -> str:
    return PurePath(name.replace("\\", "/")).with_suffix("").as_posix()  # of tables that Windows wrote too


def _read_all(file: Path) -> dict[str, dict[int, str]]:
    tables: dict[str, dict[int, str]] = {}
    if file.suffix.lower() == ".json":
        content = read_json(file, dict)
        for image, classes in content.items():
            if not isinstance(classes, dict):
                raise ValueError(f"{file}: expected {{image: {{number: class}}}}, got {image!r}: {str(classes)[:40]}")
            tables[_without_ending(image)] = _numbered(file, classes)
        return tables
    for row in _rows(file, (_IMAGE_COLUMN,)):
        _put(file, tables.setdefault(_without_ending(row[_IMAGE_COLUMN]), {}), row["id"], row[_CLASS_COLUMN])
    return tables


def read_class_table(file: Path) -> dict[int, str]:
    """The class of each number of one label image, see `ClassTables`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no such table.
    """
    if file.suffix.lower() == ".json":
        return _numbered(file, read_json(file, dict))
    classes: dict[int, str] = {}
    for row in _rows(file, ()):
        _put(file, classes, row["id"], row[_CLASS_COLUMN])
    return classes


def _numbered(file: Path, classes: Mapping[Any, Any]) -> dict[int, str]:
    numbered: dict[int, str] = {}
    for number, name in classes.items():
        _put(file, numbered, number, "" if name is None else name)
    return numbered


def _rows(file: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV with the number of the cell under ``id``."""
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened)
        columns = list(reader.fieldnames or ())
        number = next((name for name in _ID_COLUMNS if name in columns), None)
        absent = [name for name in (*needed, _CLASS_COLUMN) if name not in columns]
        if number is None or absent:
            expected = ", ".join((*needed, "id", _CLASS_COLUMN))
            raise ValueError(f"{file}: expected the columns {expected}, got {', '.join(columns) or 'none'}")
        for row in reader:
            yield row | {"id": row[number]}


def _put(file: Path, classes: dict[int, str], number: Any, name: Any) -> None:
    if not isinstance(name, str) or not str(number).strip().isdecimal():
        raise ValueError(f"{file}: expected a cell's number and the name of its class, got {number!r} and {name!r}")
    if int(number) in classes:
        raise ValueError(f"{file}: cell {number} has two classes, {classes[int(number)]!r} and {name!r}")
    if name.strip():
        classes[int(number)] = name.strip()

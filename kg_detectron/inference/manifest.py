"""The file ``run.json``: what was run on what, and what came out, so that it can be continued and repeated."""

import dataclasses
import importlib.util
import json
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version as installed_version
from pathlib import Path, PurePosixPath
from typing import Any

from kg_detectron._version import __version__
from kg_detectron.inference.run_settings import RUNTIMES, Settings
from kg_detectron.io.atomic import replacing
from kg_detectron.io.finding import Input
from kg_detectron.io.relative_path import checked_relative_path

MANIFEST = "run.json"
_VERSION = re.compile(r"""^__version__ = ['"]([^'"]+)['"]""", re.MULTILINE)  # in a file of PyTorch's

# Seconds between two states on disk, and how many times longer than the last writing took: a run of many files should
# not spend its time on writing what it did.
_WRITE_EVERY, _WRITE_PART = 2.0, 20


def versions(runtime: str = RUNTIMES[0]) -> dict[str, str]:
    """What the result of a prediction by one of `RUNTIMES` may depend on."""
    import cv2
    import numpy as np

    return {
        "kg_detectron": __version__,
        "torch": _torch_version(),
        "torchvision": installed_version("torchvision"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "Python": platform.python_version(),
        **({} if runtime == RUNTIMES[0] else {runtime: installed_version(runtime)}),
    }


def _torch_version() -> str:
    """``torch.__version__``, which takes PyTorch's import; the version of the package leaves out the build."""
    if "torch" not in sys.modules:
        spec = importlib.util.find_spec("torch")
        for folder in (spec and spec.submodule_search_locations) or []:
            file = Path(folder, "version.py")
            if file.is_file() and (match := _VERSION.search(file.read_text(encoding="utf-8"))):
                return match[1]
    import torch

    return torch.__version__


def note(record: "FileRecord", *notes: str) -> None:
    """Add sentences to a record, each once."""
    record.notes += [text for text in notes if text not in record.notes]


@dataclass
class PlaneRecord:
    """One image of a file.

    Attributes:
        name: of its results; that of the file where it has one image.
        page: its number, from 1; 0 where the file has one image.
        position: in the stack, by the letter of the axis, from 0.
        scene: name of its scene; None where the file has one.
        size: height and width, pixels.
        cells: number of cells.
        area_share: pixels of cells / pixels of the image.
        scale: network pixels for one image pixel, (y, x).
        scale_source: what set the scale.
    """

    name: str
    page: int
    position: dict[str, int]
    scene: str | None
    size: tuple[int, int]
    cells: int
    area_share: float
    scale: tuple[float, float]
    scale_source: str


@dataclass
class FileRecord:
    """One input of a run.

    Attributes:
        input: absolute path.
        name: of its results, relative to the manifest's folder, without ending.
        sha256: of the input; None where it could not be read.
        size: height and width of the (first) image, pixels.
        pages: images in the file.
        cells: on all pages.
        pixel_size: micrometres; None where it is unknown.
        pixel_size_source: where it is from: "given", "OME", "ImageJ", ...
        seconds: for reading, prediction and writing.
        outputs: files that were written, relative to the manifest's folder, with forward slashes; of a file that failed
            those of an earlier run, if there are any, which stay.
        planes: a record of each page.
        notes: what a user should know: what was assumed, ignored, left out.
        error: why it failed; None where it did not.
        superseded: a later run with other settings wrote its results anew; the outputs of this one are gone.
    """

    input: str
    name: str
    sha256: str | None = None
    size: tuple[int, int] | None = None
    pages: int = 0
    cells: int = 0
    pixel_size: float | None = None
    pixel_size_source: str | None = None
    seconds: float = 0.0
    outputs: list[str] = field(default_factory=list)
    planes: list[PlaneRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    superseded: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "FileRecord":
        """The record of a run.json; of versions before this one too."""
        values = {name: value for name, value in values.items() if name != "network_input"}
        planes = [PlaneRecord(**plane) for plane in values.pop("planes", [])]
        record = cls(**values, planes=planes)
        if not all(isinstance(text, str) for text in (record.input, record.name, *record.outputs)):
            raise TypeError("a name is no text")
        return record

    def is_done(self, folder: Path, path: Path, sha256: str) -> bool:
        """Whether this is the record of a file, by its path and SHA-256, and its results are in the folder."""
        same = self.error is None and not self.superseded and (self.input, self.sha256) == (str(path), sha256)
        return same and all((folder / output).exists() for output in self.outputs)

    @property
    def image(self) -> str:
        """What tables call the image: the name of the file, in the folder that its results have."""
        return (PurePosixPath(self.name).parent / Path(self.input).name).as_posix()


@dataclass
class Manifest:
    """A run: everything that its results depend on, every input's record, and the runs of before into its folder.

    Attributes:
        command: as it was given.
        model: absolute path.
        model_sha256: of the model file.
        device: "cpu", "cuda", ...
        settings: of the prediction, as JSON has them.
        threshold: score from which cells were kept: the one of the settings, or the model's own.
        speed: what the setting ``fast`` chose, and why; empty without it, and where workers chose.
        versions: see `versions`.
        started: date and time, UTC.
        seconds: since the run began.
        removed: files of former runs that were deleted, because this run wrote other results of the same image.
        files: by name of the results.
        former: earlier runs with other settings or another model, the oldest first. They have no `former`.
    """

    command: str
    model: str
    model_sha256: str
    device: str
    settings: dict[str, Any]
    threshold: float | None = None
    speed: str = ""
    versions: dict[str, str] = field(default_factory=versions)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    seconds: float = 0.0
    removed: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    former: list["Manifest"] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Read a manifest.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not one.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            former = [cls._from_json(run) for run in content.pop("former", [])]
            return dataclasses.replace(cls._from_json(content), former=former)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not the manifest of a prediction: {error}") from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> "Manifest":
        records = [FileRecord.from_json(record) for record in content.pop("files")]
        texts = [content["command"], content["model"], content["model_sha256"], content["device"]]
        if not all(isinstance(text, str) for text in texts) or not isinstance(content["settings"], dict):
            raise TypeError("an entry is of another type than it should be")
        return cls(**content, files={record.name: record for record in records})

    def write(self, folder: Path) -> None:
        """Write it to a folder: whole or not at all."""
        content = self._as_json() | {"former": [run._as_json() for run in self.former]}
        with replacing(folder / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _as_json(self) -> dict[str, Any]:
        content = {**vars(self), "files": [asdict(record) for record in self.files.values()]}
        del content["former"]
        return content

    @property
    def runs(self) -> list["Manifest"]:
        """All runs into the folder, the oldest first, this one last."""
        return [*self.former, self]

    def makes_the_same_as(self, other: "Manifest") -> bool:
        """Whether both runs would make the same of the same input."""
        # A setting that a run of an earlier version does not have was at its default then.
        defaults = Settings().as_json()
        pairs = ((run.model_sha256, defaults | run.settings) for run in (self, other))
        first, second = pairs
        return first == second

    def same_run(self, previous: "Manifest") -> "Manifest | None":
        """The run of a folder that made the same of the same input, if there is one."""
        return next((run for run in reversed(previous.runs) if run.makes_the_same_as(self)), None)

    def follow(self, previous: "Manifest") -> None:
        """Take over the records of the folder: of the same model and settings to go on, of others as former runs."""
        self.former = []
        for run in previous.runs:
            if run.makes_the_same_as(self):
                self.files, self.started, self.removed = run.files, run.started, run.removed
            else:
                self.former.append(dataclasses.replace(run, former=[]))

    def valid_records(self) -> Iterator[FileRecord]:
        """The records, of all runs, of results that are in the folder or failed; of each name one, the latest."""
        names = set()
        for run in reversed(self.runs):
            for record in run.files.values():
                if not record.superseded and record.name not in names:
                    names.add(record.name)
                    yield record


class ManifestFile:
    """A manifest in a folder that is kept up to date, at most every few seconds."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self.start = self.written = time.monotonic()
        self._pause = _WRITE_EVERY
        self._names: dict[str, set[str]] = {}  # that an image has had, by its path
        for run in manifest.runs:
            for record in run.files.values():
                self._names.setdefault(record.input, set()).add(record.name)

    def add(self, record: FileRecord) -> None:
        """Add a record, or replace the one of its name, whose results stay where this one is of a failure."""
        if record.error is not None and not record.outputs:
            earlier = (run.files.get(record.name) for run in reversed(self.manifest.runs))
            record.outputs = next((list(one.outputs) for one in earlier if one and not one.superseded), [])
        self.manifest.files[record.name] = record
        if time.monotonic() - self.written > self._pause:
            self.write()

    def remove_results(self, item: Input) -> list[str]:
        """Delete the results that earlier runs made of an image or under its name, before new ones are written.

        Returns:
            The files that were deleted. Those of runs with other settings are noted as superseded, on disk too, so that
            a run which is killed leaves no doubt about what made the files that are there.
        """
        deleted, is_changed, image = [], False, str(item.path)
        names = {item.name} | self._names.get(image, set())
        for run, record in [(run, run.files.get(name)) for run in self.manifest.runs for name in sorted(names)]:
            if record is None or record.superseded or (record.name != item.name and record.input != image):
                continue
            for output in record.outputs:
                path = self.folder / checked_relative_path(output)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                    deleted.append(output)
                elif path.is_file():
                    path.unlink()
                    deleted.append(output)
            if run is self.manifest:
                del run.files[record.name]
            else:
                record.superseded = is_changed = True
        if is_changed:
            self.write()
        return deleted

    def write(self) -> None:
        start = time.monotonic()
        self.manifest.seconds = round(start - self.start, 3)
        self.manifest.write(self.folder)
        self.written = time.monotonic()
        self._pause = max(_WRITE_EVERY, _WRITE_PART * (self.written - start))

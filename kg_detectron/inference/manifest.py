"""The file ``run.json``: what was run on what, and what came out, so that it can be continued and repeated."""

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision

from kg_detectron._version import __version__
from kg_detectron.io.atomic import replacing

MANIFEST = "run.json"

# Seconds between two states on disk: a run of many files should not spend its time on writing what it did.
_WRITE_EVERY = 2.0


def versions() -> dict[str, str]:
    """What the result of a prediction may depend on."""
    return {
        "kg_detectron": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "Python": platform.python_version(),
    }


@dataclass
class FileRecord:
    """One input of a run.

    Attributes:
        input: absolute path.
        name: of its results, relative to the manifest's folder, without ending.
        sha256: of the input; None where it could not be read.
        size: height and width of the (first) image, pixels.
        pages: images in the file.
        network_input: what the network saw: "256 x 256" (resized to height x width), "own pixels", or "tiles of 1024".
        cells: on all pages.
        seconds: for reading, prediction and writing.
        outputs: files that were written, relative to the manifest's folder, with forward slashes.
        error: why it failed; None where it did not.
    """

    input: str
    name: str
    sha256: str | None = None
    size: tuple[int, int] | None = None
    pages: int = 0
    network_input: str | None = None
    cells: int = 0
    seconds: float = 0.0
    outputs: list[str] = field(default_factory=list)
    error: str | None = None

    def is_done(self, folder: Path, path: Path, sha256: str) -> bool:
        """Whether this is the record of a file, by its path and SHA-256, and its results are in the folder."""
        same = self.error is None and (self.input, self.sha256) == (str(path), sha256)
        return same and all((folder / output).is_file() for output in self.outputs)


@dataclass
class Manifest:
    """A run: everything that its results depend on, and every input's record.

    Attributes:
        command: as it was given.
        versions: see `versions`.
        model: absolute path.
        model_sha256: of the model file.
        device: "cpu", "cuda", ...
        settings: of the prediction, as JSON has them.
        seconds: since the run began.
        files: by name of the results.
    """

    command: str
    model: str
    model_sha256: str
    device: str
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)
    seconds: float = 0.0
    files: dict[str, FileRecord] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Read a manifest.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not one.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            records = [FileRecord(**record) for record in content.pop("files")]
            texts = [content["command"], content["model"], content["model_sha256"], content["device"]]
            texts += [text for record in records for text in (record.input, record.name, *record.outputs)]
            if not all(isinstance(text, str) for text in texts) or not isinstance(content["settings"], dict):
                raise TypeError("an entry is of another type than it should be")
            return cls(**content, files={record.name: record for record in records})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not the manifest of a prediction: {error}") from error

    def write(self, folder: Path) -> None:
        """Write it to a folder: whole or not at all."""
        content = {**vars(self), "files": [asdict(record) for record in self.files.values()]}
        with replacing(folder / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def makes_the_same_as(self, other: "Manifest") -> bool:
        """Whether both runs would make the same of the same input."""
        own, its = ((m.model_sha256, m.settings) for m in (self, other))
        return own == its


class ManifestFile:
    """A manifest in a folder that is kept up to date, at most every few seconds."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self.start = self.written = time.monotonic()

    def add(self, record: FileRecord) -> None:
        """Add a record, or replace the one of its name."""
        self.manifest.files[record.name] = record
        if time.monotonic() - self.written > _WRITE_EVERY:
            self.write()

    def write(self) -> None:
        self.manifest.seconds = round(time.monotonic() - self.start, 3)
        self.manifest.write(self.folder)
        self.written = time.monotonic()

"""Reading the file of a task, and what is wrong with it; without PyTorch, which a run may not need."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kg_detectron.inference.manifest import FileRecord
from kg_detectron.inference.run_settings import Settings
from kg_detectron.inference.tasks import Task
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.images import MAX_PIXELS, ImageFile, open_image
from kg_detectron.io.normalisation import UnknownWhiteLevel
from kg_detectron.io.setting import SettingError

# Bytes of a file, or of its pixels, from which it is worked on alone: two such files would not fit into memory.
_LARGE = 2**26


@dataclass
class OpenedFile:
    """A file of a run, as far as it could be read.

    Attributes:
        task: the file, and what is known of it.
        record: what becomes of it. It is the one of an earlier run where nothing is to be done.
        image: its pages; None where nothing is to be done, or it could not be read.
    """

    task: Task
    record: FileRecord
    image: ImageFile | None = None

    @property
    def is_known(self) -> bool:
        """Whether the results of an earlier run are there."""
        return self.record is self.task.known

    @property
    def is_large(self) -> bool:
        """Whether no other file should be in memory at the same time."""
        pages = [] if self.image is None else self.image.pages
        return len(pages) > 1 or any(page.is_lazy or page.pixels.nbytes > _LARGE for page in pages)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do a part of what is done with the file: its time and its failure are the file's, unless it has failed."""
        if self.record.error is not None:
            return
        start = time.perf_counter()
        try:
            work()
        except Exception as error:
            self.record.error = reason(error, self.task.item.path)
        if not self.is_known:
            self.record.seconds = round(self.record.seconds + time.perf_counter() - start, 3)


def is_small_file(task: Task) -> bool:
    """Whether a file may be read while another one is predicted."""
    try:
        return task.item.path.is_file() and task.item.path.stat().st_size <= _LARGE
    except OSError:
        return True  # which is found out when it is read


def open_file(task: Task, settings: Settings, output: Path) -> OpenedFile:
    """Read the file of a task, if its results of an earlier run are not in a folder.

    Broken bytes, memory, a file that is gone are the file's alone: they are the `error` of its record.
    """
    opened = OpenedFile(task, FileRecord(str(task.item.path), task.item.name))

    def read() -> None:
        record, known = opened.record, task.known
        record.sha256 = file_sha256(task.item.path)
        if known is not None and known.is_done(output, task.item.path, record.sha256):
            opened.record = known
            return
        opened.image = open_pages(task, settings, record)

    opened.attempt(read)
    return opened


def open_pages(task: Task, settings: Settings, record: FileRecord) -> ImageFile:
    """The pages of a file, whose channels may have to be chosen yet; its pixel size goes to the record.

    Raises:
        OSError, ValueError: as `open_image`.
    """
    image = open_image(
        task.item.path,
        axes=settings.axes,
        channels=settings.channels,
        scene=settings.scene,
        max_pixels=settings.max_pixels or MAX_PIXELS,
        ask=False,
    )
    record.pixel_size, record.pixel_size_source = image.pixel_size, image.pixel_size_source
    if settings.pixel_size is not None:
        record.pixel_size, record.pixel_size_source = settings.pixel_size, "given"
    return image


def reason(error: Exception, path: Path) -> str:
    """What went wrong with a file, without its path, which stands before the reason everywhere."""
    if isinstance(error, OSError) and error.strerror:
        elsewhere = error.filename is not None and os.fspath(error.filename) != str(path)
        return f"{error.strerror}: {error.filename}" if elsewhere else error.strerror
    text = str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
    if isinstance(error, SettingError):
        text = error.as_options()
    elif isinstance(error, UnknownWhiteLevel):
        text += "; use --normalise percentile"
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"

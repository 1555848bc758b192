"""Prediction for many files: what ``kg-detectron predict`` and ``kg-detectron rerun`` do."""

import os
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from kg_detectron.inference.manifest import MANIFEST, FileRecord, Manifest, ManifestFile, note, versions
from kg_detectron.inference.model_names import model_path
from kg_detectron.inference.opened_file import OpenedFile, is_small_file, open_file
from kg_detectron.inference.run_settings import Settings, Workers, check_device, check_output
from kg_detectron.inference.run_tables import is_parquet_installed, remove_tables, write_tables
from kg_detectron.inference.tasks import STAGING, Task, remove_staging
from kg_detectron.inference.tile_store import TILES
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.finding import Input, find_images
from kg_detectron.io.lock import locked
from kg_detectron.io.relative_path import checked_relative_path
from kg_detectron.io.setting import SettingError

# PyTorch takes seconds to import: it is, with the model, where a file has to be predicted.
if TYPE_CHECKING:
    from kg_detectron.inference.file_prediction import FilePredictor

_PAGE = re.compile(r"(.+)_page\d{4,}")  # names of results that pages of a stack have too

Say = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """What became of a run's files; all three lists hold records of `Manifest.files`."""

    done: list[FileRecord]
    skipped: list[FileRecord]
    failed: list[FileRecord]

    @property
    def cells(self) -> int:
        """In all files that did not fail."""
        return sum(record.cells for record in (*self.done, *self.skipped))

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(self.done + other.done, self.skipped + other.skipped, self.failed + other.failed)

    def __str__(self) -> str:
        counts = f"{len(self.done)} done, {len(self.skipped)} done before, {len(self.failed)} failed"
        return f"{len(self.done) + len(self.skipped) + len(self.failed)} files: {counts}; {self.cells} cells"


def predict_files(
    inputs: Sequence[str | Path],
    model: str | Path,
    output: str | Path,
    settings: Settings | None = None,
    *,
    device: str | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    command: str = "predict_files",
    say: Say | None = None,
    complain: Say | None = None,
) -> Summary:
    """Predict the cells of many images and save them; `kg-detectron predict`.

    Every result appears whole or not at all. A file that fails does not stop the others. What a run has done is in
    ``output/run.json``, see `Manifest`. Files whose results are there, made by the same model and settings of the same
    content, are left as they are, so that calling it again resumes a run that was stopped. Results of an image that
    were made with other settings are removed before the new ones are written. ``output/cells.csv`` and ``images.csv``
    are tables of all results in the folder. A folder that another run writes into is refused.

    Args:
        inputs: files, folders and patterns, see `find_images`.
        model: the file, or the name of a kept model.
        output: folder of the results; made where absent. A file ``image.tif`` gives ``image_labels.tif`` and so on,
            its third page ``image_page0003_rois.zip``.
        settings: the defaults where None.
        device: as PyTorch names it; None takes the GPU where there is one.
        overwrite: predict again what is done.
        workers: processes that share the files; None predicts them in this one. The results are the same, as long as
            PyTorch has as many threads in each.
        command: how the manifest names this run.
        say: gets a line for every file, and lets a progress bar show.
        complain: gets a line for every file that fails; `say` where None.

    Raises:
        OSError, ValueError: nothing was done: a model that cannot be loaded, settings or inputs that do not fit, an
            output folder that cannot be written or whose run.json is something else.
    """
    settings = settings or Settings()
    check_device(device)
    check_output(output)
    found = find_images(inputs, output)
    run = _Run(model_path(model), settings, device, workers, command, Path(output), say, complain)
    run.tell(*found.notes, found.passed_over_text())
    return run(found.inputs, overwrite)


def rerun(
    manifest: str | Path,
    output: str | Path | None = None,
    *,
    number: int | None = None,
    device: str | None = None,
    workers: Workers | None = None,
    command: str = "rerun",
    say: Say | None = None,
    complain: Say | None = None,
) -> Summary:
    """Repeat the runs of a folder from its manifest: the same labels, as long as the libraries compute the same.

    Files that failed are left out. A message names the libraries whose versions differ.

    Args:
        manifest: ``run.json``, or its folder.
        output: folder of the results; by default beside the run's own, with ``_rerun`` behind its name.
        number: repeat this run only, whole, 1 for the oldest. By default all runs into the folder are repeated, less
            the files whose results a later one replaced, which gives the same folder again.
        device: by default the run's.
        workers, command, say, complain: see `predict_files`.

    Raises:
        OSError, ValueError: nothing was done: `manifest` is not one, the model or an input is missing or has another
            SHA-256, or as in `predict_files`.
    """
    path = Path(os.path.abspath(manifest))
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; expected the {MANIFEST} of a prediction, or its folder"
        )
    runs = Manifest.read(path).runs
    if number is not None and not 1 <= number <= len(runs):
        raise SettingError("run", f"expected a number of 1..{len(runs)}, the runs into {path.parent}, got {number}")
    folder = path.parent
    output = folder.with_name(folder.name + "_rerun") if output is None else Path(output)
    check_device(device)
    check_output(output)
    chosen = runs if number is None else [runs[number - 1]]
    repeated: list[tuple[_Run, list[Input]]] = []
    checksums: dict[str, str] = {}
    for run in chosen:
        try:
            settings = Settings.from_json(run.settings)
        except TypeError as error:
            raise ValueError(f"{path}: its settings are not of this version: {error}") from None
        records = [r for r in run.files.values() if r.error is None and not (r.superseded and number is None)]
        if not records:
            continue
        # A manifest may come from somebody else: its results must stay in the output folder.
        items = [Input(Path(record.input), checked_relative_path(record.name).as_posix()) for record in records]
        for used, expected in ((run.model, run.model_sha256), *((r.input, r.sha256) for r in records)):
            if used not in checksums:
                checksums[used] = file_sha256(used)
            if checksums[used] != expected:
                raise ValueError(
                    f"{used} is not what the run used: its SHA-256 is {checksums[used]}, in {path.name} {expected}"
                )
        again = _Run(Path(run.model), settings, device or run.device, workers, command, output, say, complain)
        again.load()
        for name, version in again.manifest.versions.items():
            if version != run.versions.get(name):
                again.tell(f"{name} is {version}, was {run.versions.get(name)}: the labels may differ")
        repeated.append((again, items))
    if not repeated:
        raise ValueError(f"{path}: the run has no file that succeeded")
    summary = Summary([], [], [])
    for again, items in repeated:
        summary += again(items, overwrite=True)
    return summary


class _Run:
    """A run of one model with one choice of settings.

    Args:
        model: the file.
        settings: of the prediction.
        device: as PyTorch names it; None takes the GPU where there is one.
        workers: see `predict_files`.
        command: how the manifest names this run.
        output: folder of the results.
        say, complain: see `predict_files`.
    """

    def __init__(
        self,
        model: Path,
        settings: Settings,
        device: str | None,
        workers: Workers | None,
        command: str,
        output: Path,
        say: Say | None,
        complain: Say | None,
    ) -> None:
        self.settings, self.output, self.workers, self.device = settings, output, workers, device
        self.say, self.complain = say, complain or say
        if settings.parquet and not is_parquet_installed():
            raise SettingError(
                "parquet", "it needs a package that is not installed: pip install 'kg_detectron[parquet]'"
            )
        self.predictor: FilePredictor | None = None
        self.model = model
        self.manifest = Manifest(
            command,
            os.path.abspath(model),
            file_sha256(model),
            device or "cpu",
            settings.as_json(),
            settings.min_score,
            versions=versions(settings.runtime),
        )

    def load(self) -> None:
        """Load the model, once.

        Raises:
            OSError, ValueError: see `FilePredictor`.
        """
        manifest = self.manifest
        if self.workers is not None:  # the device is the workers' business
            if manifest.threshold is None:
                from kg_detectron.inference.model_file import load_model

                manifest.threshold = load_model(self.model).threshold
        elif self.predictor is None:
            from kg_detectron.inference.file_prediction import FilePredictor

            self.predictor = predictor = FilePredictor(self.model, self.settings, self.device, manifest.model_sha256)
            manifest.device, manifest.threshold, manifest.speed = predictor.device, predictor.threshold, predictor.speed

    def tell(self, *lines: str) -> None:
        """Print lines, less empty ones."""
        if self.say is not None:
            for line in filter(None, lines):
                self.say(line)

    def __call__(self, items: list[Input], overwrite: bool) -> Summary:
        """Predict all files, with the manifest on disk from the start to the end, also where it is interrupted."""
        previous = self._previous()
        same = previous and self.manifest.same_run(previous)
        if overwrite or self.workers is not None or same is None or same.threshold is None:
            self.load()  # a model that cannot be loaded leaves no trace
        with locked(self.output):
            return self._predict_files(items, overwrite)

    def _previous(self) -> Manifest | None:
        """The manifest in the folder of the results."""
        return Manifest.read(self.output / MANIFEST) if (self.output / MANIFEST).exists() else None

    def _predict_files(self, items: list[Input], overwrite: bool) -> Summary:
        previous = self._previous()
        if previous is not None:
            self.manifest.follow(previous)
        known = {} if overwrite else dict(self.manifest.files)
        taken = _names_of_pages([item.name for item in items] + self._check_names(items, overwrite))
        tasks = (Task(item, known.get(item.name), taken.get(item.name, ())) for item in items)
        with ThreadPoolExecutor(1) as reader, closing(self._opened(tasks, reader)) as files:
            skipped, rest = self._skipped(files) if self.workers is None and self.predictor is None else ([], files)
            same = previous and self.manifest.same_run(previous)
            if self.predictor is None and self.workers is None and same:  # nothing is to be done
                self.manifest.device, self.manifest.threshold = same.device, same.threshold
                self.manifest.versions, self.manifest.speed = same.versions, same.speed
            self.tell(*self._header())
            if previous is not None and not previous.makes_the_same_as(self.manifest):
                self.tell(
                    f"{self.output} has results of another model or other settings: those of the same images are "
                    "replaced, the others stay"
                )
            return self._predict(items, tasks, skipped, rest)

    def _check_names(self, items: list[Input], overwrite: bool) -> list[str]:
        """The names that results of other images have in the folder.

        Raises:
            ValueError: results would replace those of another image, which nobody asked for, or of a page of one.
        """
        given = {str(item.path) for item in items}
        others = {r.name: r for r in self.manifest.valid_records() if r.outputs and r.input not in given}
        pages = {plane.name: record for record in others.values() for plane in record.planes if record.pages > 1}
        for item in items:
            other = pages.get(item.name) or (None if overwrite else others.get(item.name))
            if other is None or (other.name == item.name and _has_content(item.path, other.sha256)):
                continue
            way = "" if item.name in pages else ", or --overwrite to replace them"
            raise ValueError(
                f"{item.path} would have the same names of results, {item.name}, as {other.input}, whose results are "
                f"in {self.output}: choose another output folder{way}"
            )
        return list(others)

    def _opened(self, tasks: Iterator[Task], reader: ThreadPoolExecutor) -> Generator[OpenedFile, None, None]:
        """The files, the next one of which is read while somebody works on one."""
        waiting: deque[tuple[Task, Future[OpenedFile] | None]] = deque()

        def opened() -> OpenedFile:
            task, ahead = waiting.popleft()
            return open_file(task, self.settings, self.output) if ahead is None else ahead.result()

        for task in tasks:
            ahead = reader.submit(open_file, task, self.settings, self.output) if is_small_file(task) else None
            waiting.append((task, ahead))
            if len(waiting) > 1:
                yield opened()
        while waiting:
            yield opened()

    def _skipped(self, files: Iterator[OpenedFile]) -> tuple[list[OpenedFile], Iterator[OpenedFile]]:
        """The first files, as far as their results are there, and the others, for which the model is loaded."""
        skipped: list[OpenedFile] = []
        for opened in files:
            if not opened.is_known:
                self.load()
                return skipped, chain([opened], files)
            skipped.append(opened)
        return skipped, iter(())

    def _predict(
        self, items: list[Input], tasks: Iterator[Task], skipped: list[OpenedFile], files: Iterator[OpenedFile]
    ) -> Summary:
        summary = Summary([], [], [])
        remove_staging(self.output)
        self.file = ManifestFile(self.manifest, self.output)
        self.file.write()
        try:
            with tqdm(total=len(items), unit="image", disable=self.say is None) as bar:
                show = _StepsOfFiles(bar)
                here = self.workers is None
                predicted = (
                    self._in_this_process(chain(skipped, files), show) if here else self._on_workers(tasks, show)
                )
                with closing(predicted):
                    for record, is_known in predicted:
                        bar.update()
                        if is_known:
                            summary.skipped.append(record)
                            continue
                        (summary.done if record.error is None else summary.failed).append(record)
                        self.file.add(record)
                        bar.set_postfix(cells=summary.cells, refresh=False)
                        self._report(record)
        finally:
            self.file.write()
            remove_staging(self.output)
        if not summary.failed:  # the same command goes on with the tiles of a file that failed
            shutil.rmtree(self.output / TILES, ignore_errors=True)  # of files whose settings or content changed since
        faults = write_tables(self.output, self.manifest, parquet=self.settings.parquet)
        self.tell(*(f"note: {fault}" for fault in faults))
        return summary

    def _in_this_process(
        self, files: Iterator[OpenedFile], show: "_StepsOfFiles"
    ) -> Generator[tuple[FileRecord, bool], None, None]:
        """The record of each file, and whether it is one of an earlier run. Results are written while the next file is
        predicted, by one thread; everything else, what becomes of earlier results too, is done here, in turn."""
        with ThreadPoolExecutor(1) as writer:
            last: Callable[[], FileRecord] | None = None
            for opened in files:
                try:
                    writes = [] if opened.is_known or opened.is_large else list(self._writes(opened, show))
                except BaseException:  # an interruption; the results that are being written will be whole
                    if last is not None:
                        self.file.add(last())
                    raise
                if last is not None:
                    record, last = last(), None
                    yield record, False
                if opened.is_known:
                    yield opened.record, True
                    continue
                former: list[str] = []
                if opened.is_large:  # not two of them in memory, nor two pages of a stack
                    for number, write in enumerate(self._writes(opened, show)):
                        if number == 0:
                            self._make_room(opened, former)
                        opened.attempt(write)
                elif writes:
                    self._make_room(opened, former)
                    last = partial(self._finished, opened, former, writer.submit(_do, opened, writes))
                    continue
                yield self._finished(opened, former), False
            if last is not None:
                yield last(), False

    def _writes(self, opened: OpenedFile, show: "_StepsOfFiles") -> Iterator[Callable[[], None]]:
        """What writes the results of a file, see `FilePredictor.predict`, with the progress of a page on the bar."""
        assert self.predictor is not None  # loaded with the first file that is not done
        return self.predictor.predict(opened, self.output, self.output / TILES, partial(show, opened.task.item))

    def _make_room(self, opened: OpenedFile, former: list[str]) -> None:
        """Delete the earlier results of a file, when its new ones are about to be written."""
        opened.attempt(lambda: former.extend(self._remove_results(opened.task.item)))

    def _finished(self, opened: OpenedFile, former: list[str], written: Future[None] | None = None) -> FileRecord:
        """The record of a file, once its results are written."""
        if written is not None:
            written.result()
        self._note_removed(opened.record, former)
        return opened.record

    def _on_workers(
        self, tasks: Iterator[Task], show: "_StepsOfFiles"
    ) -> Generator[tuple[FileRecord, bool], None, None]:
        """The same by Dask, in the order in which the files are finished."""
        assert self.workers is not None
        from kg_detectron.inference.cluster import Cluster, Job

        output = Path(os.path.abspath(self.output))
        staging = output / (STAGING + uuid.uuid4().hex)
        staging.mkdir()
        with Cluster(self.workers, lambda line: self.tell(line)) as cluster:
            model, sha256 = Path(self.manifest.model), self.manifest.model_sha256
            job = Job(model, sha256, self.settings, self.device, output, staging, cluster.threads)
            self.manifest.device, versions = cluster.describe(job)
            for name, version in versions.items():
                if version != self.manifest.versions.get(name):
                    self.tell(f"{name} is {version} on a worker, {self.manifest.versions.get(name)} here")
            self.manifest.versions = versions
            for task, outcome in cluster.outcomes(job, tasks, show):
                if outcome.folder is not None:
                    former = self._remove_results(task.item)
                    self._move_results(outcome.folder, outcome.record)
                    self._note_removed(outcome.record, former)
                yield outcome.record, outcome.is_known

    def _remove_results(self, item: Input) -> list[str]:
        """Delete what earlier runs made of a file, when its new results are there: a wrong setting should not cost the
        results of the right one."""
        remove_tables(self.output)
        return self.file.remove_results(item)

    def _move_results(self, folder: Path, record: FileRecord) -> None:
        for output in record.outputs:
            place = self.output / output
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():  # of a run that was killed before it wrote this down; a folder is not replaced
                shutil.rmtree(place)
            os.replace(folder / output, place)
        shutil.rmtree(folder, ignore_errors=True)

    def _note_removed(self, record: FileRecord, former: list[str]) -> None:
        removed = [name for name in former if name not in record.outputs]
        self.manifest.removed += removed
        if removed:
            note(record, f"removed of an earlier run: {', '.join(removed)}.")

    def _header(self) -> list[str]:
        settings = ", ".join(f"{name} {value}" for name, value in self.manifest.settings.items() if value is not None)
        return [
            f"command: {self.manifest.command}",
            "versions: " + ", ".join(f"{name} {version}" for name, version in self.manifest.versions.items()),
            f"model: {self.manifest.model}, SHA-256 {self.manifest.model_sha256}",
            f"settings: {settings}, threshold {self.manifest.threshold:g}, device {self.manifest.device}",
            *([f"fast: {self.manifest.speed}"] if self.manifest.speed else []),
        ]

    def _report(self, record: FileRecord) -> None:
        if record.error is None:
            self.tell(_line(record), *(f"  note: {note}" for note in record.notes))
        elif self.complain is not None:
            self.complain(f"failed: {record.input}: {record.error}")


def _do(opened: OpenedFile, work: Sequence[Callable[[], None]]) -> None:
    for part in work:
        opened.attempt(part)


class _StepsOfFiles:
    """Shows on a progress bar how far large images are, and the time that is left for each."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._starts: dict[str, tuple[int, float]] = {}  # of each file, the first step that was seen done, and when

    def __call__(self, item: Input, step: int, steps: int) -> None:
        """So many steps of a file are done."""
        first, start = self._starts.setdefault(item.name, (step, time.perf_counter()))
        left = ""
        if step > first:
            rest = (time.perf_counter() - start) / (step - first) * (steps - step)
            left = f", {tqdm.format_interval(rest)} left"
        self._bar.set_postfix_str(f"{item.path.name}: step {step} of {steps}{left}")
        if step == steps:
            del self._starts[item.name]


def _names_of_pages(names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Of each name the names of other files that are called as its pages would be."""
    of_pages: dict[str, tuple[str, ...]] = {}
    for name in names:
        if match := _PAGE.fullmatch(name):
            of_pages[match[1]] = (*of_pages.get(match[1], ()), name)
    return of_pages


def _has_content(path: Path, sha256: str | None) -> bool:
    """Whether a file has a checksum, as one that was moved; one that cannot be read fails later, by itself."""
    try:
        return file_sha256(path) == sha256
    except OSError:
        return True


def _line(record: FileRecord) -> str:
    pages = f"{record.pages} pages of " if record.pages > 1 else ""
    height, width = record.size or (0, 0)
    plane = record.planes[0]
    scales = {plane.scale for plane in record.planes}
    values = f"{plane.scale[0]:.3g}" if len(scales) == 1 else f"{min(scales)[0]:.3g}..{max(scales)[0]:.3g}"
    source = f" ({plane.scale_source})" if plane.scale_source else ""
    size = f", pixel size {record.pixel_size:g} um ({record.pixel_size_source})" if record.pixel_size else ""
    return (
        f"{record.input}: {pages}{height} x {width} pixels, network saw scale {values}{source}{size}, "
        f"{record.cells} cells, {record.seconds} s"
    )

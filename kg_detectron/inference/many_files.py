"""Prediction for many files: what ``kg-detectron predict`` and ``kg-detectron rerun`` do."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kg_detectron.cells import Cells
from kg_detectron.cells.separation import separate_cells
from kg_detectron.export.kinds import EXPORTERS, KINDS_OF_STACKS, result_files
from kg_detectron.export.label_images import LabelStack, stack_shape
from kg_detectron.export.results import Result, write_results
from kg_detectron.inference.fast import make_fast
from kg_detectron.inference.manifest import MANIFEST, FileRecord, Manifest, ManifestFile, PlaneRecord
from kg_detectron.inference.model_file import load_model
from kg_detectron.inference.model_names import model_path
from kg_detectron.inference.predictor import predict
from kg_detectron.inference.run_settings import SettingError, Settings, check_device, check_output
from kg_detectron.inference.run_tables import remove_tables, write_tables
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.coco import checked_relative_path
from kg_detectron.io.finding import Input, find_images
from kg_detectron.io.images import MAX_PIXELS, Page, open_image
from kg_detectron.io.lock import locked
from kg_detectron.io.normalisation import UnknownWhiteLevel

# Pixels of an image above which its cells are separated on disk, not in memory.
_LARGE = 8192 * 8192

# Scales that the pixel size of a file may set. Beyond them it is a resolution for printing, not of a microscope.
_SCALES = (1 / 8, 8)

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
    run = _Run(model_path(model), settings, device, command, Path(output), say, complain)
    run.tell(*found.notes, found.passed_over_text())
    return run(found.inputs, overwrite)


def rerun(
    manifest: str | Path,
    output: str | Path | None = None,
    *,
    number: int | None = None,
    device: str | None = None,
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
        command, say, complain: see `predict_files`.

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
        again = _Run(Path(run.model), settings, device or run.device, command, output, say, complain)
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
        command: how the manifest names this run.
        output: folder of the results.
        say, complain: see `predict_files`.
    """

    def __init__(
        self,
        model: Path,
        settings: Settings,
        device: str | None,
        command: str,
        output: Path,
        say: Say | None,
        complain: Say | None,
    ) -> None:
        self.settings, self.output = settings, output
        self.say, self.complain = say, complain or say
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.network = load_model(model, device, channels_last=device == "cpu")  # faster there
        except (RuntimeError, AssertionError) as error:
            raise SettingError("device", f"{device} cannot be used: {error}") from error
        self.speed = make_fast(self.network) if settings.fast else ""
        threshold = self.network.threshold if settings.min_score is None else settings.min_score
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
        self.threshold = threshold
        self.manifest = Manifest(command, os.path.abspath(model), file_sha256(model), device, plain, threshold)

    def tell(self, *lines: str) -> None:
        """Print lines, less empty ones."""
        if self.say is not None:
            for line in filter(None, lines):
                self.say(line)

    def __call__(self, items: list[Input], overwrite: bool) -> Summary:
        """Predict all files, with the manifest on disk from the start to the end, also where it is interrupted."""
        with locked(self.output):
            return self._predict_files(items, overwrite)

    def _predict_files(self, items: list[Input], overwrite: bool) -> Summary:
        self.tell(*self._header())
        if (self.output / MANIFEST).exists():
            previous = Manifest.read(self.output / MANIFEST)
            self.manifest.follow(previous)
            if not previous.makes_the_same_as(self.manifest):
                self.tell(
                    f"{self.output} has results of another model or other settings: those of the same images are "
                    "replaced, the others stay"
                )
        known = {} if overwrite else dict(self.manifest.files)

        summary = Summary([], [], [])
        self.names = {item.name for item in items}
        self.file = ManifestFile(self.manifest, self.output)
        self.file.write()
        try:
            with tqdm(items, unit="image", disable=self.say is None) as bar:
                for item in bar:
                    record = FileRecord(str(item.path), item.name)
                    start = time.perf_counter()
                    try:
                        record.sha256 = file_sha256(item.path)
                        if item.name in known and known[item.name].is_done(self.output, item.path, record.sha256):
                            summary.skipped.append(known[item.name])
                            continue
                        self._predict_file(item, record, bar)
                    # Any failure is this file's alone: broken bytes, memory, a full disk.
                    except Exception as error:
                        record.error = _reason(error, item.path)
                    record.seconds = round(time.perf_counter() - start, 3)
                    (summary.done if record.error is None else summary.failed).append(record)
                    self.file.add(record)
                    bar.set_postfix(cells=summary.cells, refresh=False)
                    self._report(record)
        finally:
            self.file.write()
        write_tables(self.output, self.manifest)
        return summary

    def _predict_file(self, item: Input, record: FileRecord, bar: tqdm) -> None:
        """Predict and save all pages of a file, noting in its record what is done."""
        settings = self.settings
        image = open_image(
            item.path,
            axes=settings.axes,
            channels=settings.channels,
            scene=settings.scene,
            max_pixels=settings.max_pixels or MAX_PIXELS,
        )
        pages = image.pages
        record.pages, record.size = len(pages), pages[0].pixels.shape[:2]
        _note(record, *image.notes)
        record.pixel_size, record.pixel_size_source = image.pixel_size, image.pixel_size_source
        if settings.pixel_size is not None:
            record.pixel_size, record.pixel_size_source = settings.pixel_size, "given"
        names = [
            item.name if len(pages) == 1 else f"{item.name}_page{number:04d}" for number in range(1, len(pages) + 1)
        ]
        if len(pages) > 1:
            for number, name in enumerate(names, 1):
                if name in self.names:
                    raise ValueError(f"page {number} would have the same names of results as another file, {name}")
        classes = self.network.classes
        kinds = settings.kinds
        if len(classes) > 1 and "labels" in kinds and "classes" not in kinds:  # a label image tells no class
            kinds = (*kinds, "classes")
        stack = _Stack(item, kinds, settings.stack, self.output, pages)
        former: list[str] | None = None
        for number, (name, page) in enumerate(zip(names, pages, strict=True), 1):
            cells = self._predict_page(page, record, f"{item.path.name}", bar)
            result = Result(
                cells,
                page.pixels[..., 0] if page.pixels.strides[2] == 0 else page.pixels,  # grey
                item.path.name if len(pages) == 1 else Path(name).name,
                record.pixel_size,
                np.moveaxis(page.planes, 0, -1),
                tuple(f"channel{c}" if c.isdigit() else c for c in page.channel_names),
                number if len(pages) > 1 else 0,
                _position(page),
                classes.names if len(classes) > 1 else Result.category_names,
                classes.shown_colours(),
                scratch=self.output,
            )
            if former is None:
                # Only now, for a wrong setting should not cost the results of the right one.
                remove_tables(self.output)
                former = self.file.remove_results(item.name)
            target = self.output / name
            if stack.kinds_of_pages:
                saved = write_results(result, target.parent, target.name, stack.kinds_of_pages)
                record.outputs += [path.relative_to(self.output).as_posix() for path in saved.values()]
            stack.add(result)
            height, width = cells.size
            scene = page.position.get("scene")
            scale_y, scale_x = np.broadcast_to(cells.scale, 2)
            plane = PlaneRecord(
                name,
                result.page,
                dict(result.position),
                None if scene is None else str(scene),
                (height, width),
                len(cells),
                sum(np.count_nonzero(crop) for crop, _ in result.masks.pixels()) / (height * width),
                (float(scale_y), float(scale_x)),
                cells.scale_source,
            )
            record.planes.append(plane)
            record.cells += plane.cells
            prefix = f"page {number}: " if len(pages) > 1 else ""
            _note(record, *(prefix + note for note in cells.notes))
        record.outputs += [path.relative_to(self.output).as_posix() for path in stack.write(record.pixel_size)]
        removed = [name for name in former or () if name not in record.outputs]
        self.manifest.removed += removed
        if removed:
            _note(record, f"removed of an earlier run: {', '.join(removed)}.")

    def _predict_page(self, page: Page, record: FileRecord, name: str, bar: tqdm) -> Cells:
        """The cells of a page: those of a sufficient score, separated."""
        settings = self.settings
        start = time.perf_counter()

        def show(step: int, steps: int) -> None:
            rest = (time.perf_counter() - start) / step * (steps - step) if step else 0.0
            left = f", {tqdm.format_interval(rest)} left" if step else ""
            bar.set_postfix_str(f"{name}: step {step} of {steps}{left}")

        sizes: dict[str, float | None] = {"scale": settings.scale, "diameter": settings.diameter}
        if settings.scale is None and settings.diameter is None:
            sizes["pixel_size"] = self._pixel_size_for_scale(record)
        cells = predict(
            self.network,
            page.pixels,
            **sizes,
            normalisation=settings.normalise,
            tile=settings.tile,
            overlap=settings.overlap,
            ensemble=settings.ensemble,
            progress=show,
        )
        cells = cells.above(self.threshold)
        if settings.keep_overlaps:
            return cells
        height, width = cells.size
        if height * width <= _LARGE:
            return separate_cells(cells)
        with tempfile.TemporaryFile(dir=self.output) as file:
            return separate_cells(cells, np.memmap(file, np.uint32, shape=(height, width)))

    def _pixel_size_for_scale(self, record: FileRecord) -> float | None:
        """The pixel size, where the model knows its own and the two do not contradict each other."""
        trained = self.network.preprocessing.pixel_size
        if record.pixel_size is None or trained is None:
            return None
        low, high = _SCALES
        if record.pixel_size_source != "given" and not low <= record.pixel_size / trained <= high:
            _note(
                record,
                f"The file says {record.pixel_size:g} micrometres a pixel, which does not suit this model, trained at "
                f"{trained:g}; the scale is estimated instead.",
            )
            return None
        return record.pixel_size

    def _header(self) -> list[str]:
        settings = ", ".join(f"{name} {value}" for name, value in self.manifest.settings.items() if value is not None)
        return [
            f"command: {self.manifest.command}",
            "versions: " + ", ".join(f"{name} {version}" for name, version in self.manifest.versions.items()),
            f"model: {self.manifest.model}, SHA-256 {self.manifest.model_sha256}",
            f"settings: {settings}, threshold {self.threshold:g}, device {self.manifest.device}",
            *([f"fast: {self.speed}"] if self.speed else []),
        ]

    def _report(self, record: FileRecord) -> None:
        if record.error is None:
            self.tell(_line(record), *(f"  note: {note}" for note in record.notes))
        elif self.complain is not None:
            self.complain(f"failed: {record.input}: {record.error}")


class _Stack:
    """The files of a stack that hold all its pages; none where the file is no stack, or its pages differ in size."""

    def __init__(self, item: Input, kinds: Sequence[str], stack: str, output: Path, pages: list[Page]) -> None:
        self.target = output / item.name
        sizes = {page.pixels.shape[:2] for page in pages}
        joined: tuple[str, ...] = ()
        if len(pages) > 1 and len(sizes) == 1 and stack != "pages":
            joined = KINDS_OF_STACKS if stack == "one" else ("labels", "classes")  # which belong together
        self.kinds = [kind for kind in kinds if kind in joined]
        self.kinds_of_pages = [kind for kind in kinds if kind not in joined]
        self.results: list[Result] = []
        self.labels: LabelStack | None = None
        if "labels" in self.kinds:
            shape, axes = stack_shape([_position(page) for page in pages], sizes.pop())
            self.labels = LabelStack(shape, axes, output)

    def add(self, result: Result) -> None:
        """Take a page, without its pixels."""
        if self.labels is not None:
            self.labels.add(result.page - 1, result.label_image)
        if set(self.kinds) - {"labels"}:
            result.forget_pixels()
            self.results.append(result)

    def write(self, pixel_size: float | None) -> list[Path]:
        """Write the files."""
        paths = result_files(self.target.parent, self.target.name, self.kinds) if self.kinds else {}
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for kind, path in paths.items():
            if self.labels is not None and kind == "labels":
                self.labels.write(path, pixel_size)
            else:
                EXPORTERS[kind].write_stack(path, self.results)
        return list(paths.values())


def _position(page: Page) -> dict[str, int]:
    """Where a page lies in its stack, by the letter of the axis; {} where only its number is known."""
    return {axis.upper(): int(index) for axis, index in page.position.items() if axis not in ("scene", "page")}


def _note(record: FileRecord, *notes: str) -> None:
    record.notes += [note for note in notes if note not in record.notes]


def _reason(error: Exception, path: Path) -> str:
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

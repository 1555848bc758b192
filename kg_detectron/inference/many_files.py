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
from kg_detectron.export.results import KINDS, save_results
from kg_detectron.inference.manifest import MANIFEST, FileRecord, Manifest, ManifestFile
from kg_detectron.inference.model_file import load_model, model_path
from kg_detectron.inference.predictor import predict
from kg_detectron.inference.tiling import GRID
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.coco import checked_relative_path
from kg_detectron.io.images import MAX_PIXELS, read_pages
from kg_detectron.io.inputs import Input, find_inputs
from kg_detectron.modeling import InstanceNet

# Pixels of an image above which its cells are separated on disk, not in memory.
_LARGE = 8192 * 8192


@dataclass(frozen=True)
class Settings:
    """Everything but the model and the images that decides about the results.

    Attributes:
        save: kinds of results, of `kg_detectron.export.results.KINDS`.
        axes, channels, max_pixels: see `kg_detectron.io.images.read_pages`.
        normalise: "fixed" or "percentile" instead of the model's own normalisation; None keeps it.
        size: "training": images are resized to the model's training size; "native": they keep their pixels; "auto":
            they keep them where a side is more than twice the training size's.
        tile, overlap: images that keep their pixels are predicted in such tiles, see `predict_tiled`.
        min_score: cells of a lower score are left out.
        pixel_size: micrometres, for measurements; None where it is unknown.
        keep_overlaps: masks stay as predicted, where by default every pixel belongs to one cell at most and every cell
            is one piece. For COCO JSON alone.

    Raises:
        ValueError: a value that is not one of these.
    """

    save: tuple[str, ...] = ("labels", "overlay")
    axes: str | None = None
    channels: tuple[int, ...] | None = None
    normalise: str | None = None
    size: str = "auto"
    tile: int = 1024
    overlap: int = 256
    min_score: float = 0.0
    pixel_size: float | None = None
    keep_overlaps: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.save if kind not in KINDS]
        if unknown or not self.save:
            raise ValueError(f"save: expected some of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
        if self.keep_overlaps and set(self.save) != {"coco"}:
            refused = ", ".join(kind for kind in self.save if kind != "coco")
            raise ValueError(f"keep_overlaps: only coco can hold cells that overlap, not {refused} (use --save coco)")
        if self.channels is not None and (len(self.channels) not in (1, 3) or min(self.channels) < 1):
            raise ValueError(f"channels: expected one or three numbers from 1, got {list(self.channels)}")
        if self.tile < GRID or self.tile % GRID:
            raise ValueError(f"tile: expected a positive multiple of {GRID} pixels, got {self.tile}")
        if self.overlap < 0:
            raise ValueError(f"overlap: expected 0 or more pixels, got {self.overlap}")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score: expected a number of 0..1, got {self.min_score}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels: expected 1 or more, got {self.max_pixels}")
        if self.size not in ("auto", "training", "native"):
            raise ValueError(f"size: expected 'auto', 'training' or 'native', got {self.size!r}")
        if self.normalise not in (None, "fixed", "percentile"):
            raise ValueError(f"normalise: expected 'fixed' or 'percentile', got {self.normalise!r}")
        if self.pixel_size is not None and not 0 < self.pixel_size < float("inf"):
            raise ValueError(f"pixel_size: expected micrometres above 0, got {self.pixel_size}")


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
    say: Callable[[str], None] | None = None,
) -> Summary:
    """Predict the cells of many images and save them; `kg-detectron predict`.

    Every result appears whole or not at all. A file that fails does not stop the others. What a run has done is in
    ``output/run.json``, see `Manifest`; files of which the results are there, made by the same model and settings of
    the same content, are left as they are, so that a run which was stopped goes on when it is called again. Two runs at
    once need two folders.

    Args:
        inputs: files, folders and patterns, see `find_inputs`.
        model: the file, see `load_model`.
        output: folder of the results; made where absent. A file ``image.tif`` gives ``image_labels.tif`` and so on,
            its third page ``image_page0003_labels.tif``.
        settings: the defaults where None.
        device: as PyTorch names it; None takes the GPU where there is one.
        overwrite: predict again what is done.
        command: how the manifest names this run.
        say: gets a line for every file, and lets a progress bar show.

    Raises:
        OSError, ValueError: nothing was done: a model that cannot be loaded, settings or inputs that do not fit, an
            output folder that cannot be written or whose run.json is something else.
    """
    settings = settings or Settings()
    found = find_inputs(inputs, output)
    network, manifest = _prepare(model, settings, device, command)
    return _predict_all(found, network, manifest, settings, Path(output), overwrite, say)


def rerun(
    manifest: str | Path,
    output: str | Path | None = None,
    *,
    device: str | None = None,
    command: str = "rerun",
    say: Callable[[str], None] | None = None,
) -> Summary:
    """Repeat a run from its manifest: the same labels, as long as the libraries compute the same.

    Files that failed are left out. A message names the libraries whose versions differ.

    Args:
        manifest: ``run.json`` of the run.
        output: folder of the results; by default beside the run's own, with ``_rerun`` behind its name.
        device: by default the run's.
        command, say: see `predict_files`.

    Raises:
        OSError, ValueError: nothing was done: `manifest` is not one, the model or an input is missing or has another
            SHA-256, or as in `predict_files`.
    """
    manifest = Path(os.path.abspath(manifest))
    before = Manifest.read(manifest)
    folder = manifest.parent
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in before.settings.items()}
        settings = Settings(**fields)
    except TypeError as error:
        raise ValueError(f"{manifest}: its settings are not of this version: {error}") from None
    done = [record for record in before.files.values() if record.error is None]
    if not done:
        raise ValueError(f"{manifest}: the run has no file that succeeded")
    # A manifest may come from somebody else: its results must stay in the output folder.
    found = [Input(Path(record.input), checked_relative_path(record.name).as_posix()) for record in done]
    for path, expected in ((before.model, before.model_sha256), *((r.input, r.sha256) for r in done)):
        if (actual := file_sha256(path)) != expected:
            raise ValueError(f"{path} is not what the run used: its SHA-256 is {actual}, in {manifest.name} {expected}")
    network, again = _prepare(before.model, settings, device or before.device, command)
    if say is not None:
        for name, version in again.versions.items():
            if version != before.versions.get(name):
                say(f"{name} is {version}, was {before.versions.get(name)}: the labels may differ")
    output = folder.with_name(folder.name + "_rerun") if output is None else Path(output)
    return _predict_all(found, network, again, settings, output, True, say)


def _prepare(model: str | Path, settings: Settings, device: str | None, command: str) -> tuple[InstanceNet, Manifest]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = load_model(model, device)
    except RuntimeError as error:
        raise ValueError(f"device: {device} cannot be used: {error}") from error
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return network, Manifest(command, os.path.abspath(model_path(model)), file_sha256(model_path(model)), device, plain)


def _predict_all(
    found: list[Input],
    network: InstanceNet,
    manifest: Manifest,
    settings: Settings,
    output: Path,
    overwrite: bool,
    say: Callable[[str], None] | None,
) -> Summary:
    """The run: every file, with the manifest on disk from the start to the end, also where it is interrupted."""
    output.mkdir(parents=True, exist_ok=True)
    if say is not None:
        for line in _header(manifest):
            say(line)
    if (output / MANIFEST).exists():
        before = Manifest.read(output / MANIFEST)
        if before.makes_the_same_as(manifest):
            manifest.files.update(before.files)
        elif say is not None:
            say(f"{output} has results of another model or other settings: files of the same names are predicted again")
    known = {} if overwrite else dict(manifest.files)

    summary = Summary([], [], [])
    names = {item.name for item in found}
    file = ManifestFile(manifest, output)
    file.write()
    try:
        with tqdm(found, unit="image", disable=say is None) as bar:
            for item in bar:
                record = FileRecord(str(item.path), item.name)
                start = time.perf_counter()
                try:
                    record.sha256 = file_sha256(item.path)
                    if item.name in known and known[item.name].is_done(output, item.path, record.sha256):
                        summary.skipped.append(known[item.name])
                        continue
                    _predict_file(network, item, settings, output, names, record, bar)
                # Any failure is this file's alone: broken bytes, memory, a full disk.
                except Exception as error:
                    named = isinstance(error, (OSError, ValueError))
                    record.error = str(error) if named else f"{type(error).__name__}: {error}"
                record.seconds = round(time.perf_counter() - start, 3)
                (summary.done if record.error is None else summary.failed).append(record)
                file.add(record)
                bar.set_postfix(cells=summary.cells, refresh=False)
                if say is not None:
                    say(_line(record))
    finally:
        file.write()
    return summary


def _predict_file(
    network: InstanceNet,
    item: Input,
    settings: Settings,
    output: Path,
    names: set[str],
    record: FileRecord,
    bar: tqdm,
) -> None:
    """Predict and save all pages of a file, noting in its record what is done."""

    def show(tile: int, tiles: int) -> None:
        bar.set_postfix_str(f"{item.path.name}: {tile} of {tiles}")

    pages = read_pages(item.path, axes=settings.axes, channels=settings.channels, max_pixels=settings.max_pixels)
    record.pages, record.size = len(pages), pages[0].shape[:2]
    for number, page in enumerate(pages, 1):
        name = item.name if len(pages) == 1 else f"{item.name}_page{number:04d}"
        if len(pages) > 1 and name in names:
            raise ValueError(f"page {number} would have the same names of results as another file, {name}")
        cells, record.network_input = _predict_page(network, page, settings, show)
        cells = cells.above(settings.min_score)
        if not settings.keep_overlaps:
            cells = _separate(cells, output)
        stem = output / name
        saved = save_results(
            cells,
            page[..., 0] if page.strides[2] == 0 else page,  # grey
            stem.parent,
            stem.name,
            settings.save,
            pixel_size=settings.pixel_size,
            source=item.path.name if len(pages) == 1 else stem.name,
        )
        record.cells += len(cells)
        record.outputs += [path.relative_to(output).as_posix() for path in saved.values()]


def _predict_page(
    network: InstanceNet, page: np.ndarray, settings: Settings, show: Callable[[int, int], None]
) -> tuple[Cells, str]:
    """The cells of an image (H, W, 3), and what the network saw of it, see `FileRecord.network_input`."""
    scale = 1.0 if settings.size == "native" else None
    cells = predict(
        network,
        page,
        scale=scale,
        normalisation=settings.normalise,
        tile=settings.tile,
        overlap=settings.overlap,
        progress=show,
    )
    return cells, f"scale {cells.scale[0]:.3g}, {cells.scale_source}"


def _separate(cells: Cells, folder: Path) -> Cells:
    height, width = cells.size
    if height * width <= _LARGE:
        return separate_cells(cells)
    with tempfile.TemporaryFile(dir=folder) as file:
        return separate_cells(cells, np.memmap(file, np.uint32, shape=(height, width)))


def _header(manifest: Manifest) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in manifest.settings.items() if value is not None)
    return [
        f"command: {manifest.command}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        f"model: {manifest.model}, SHA-256 {manifest.model_sha256}",
        f"settings: {settings}, device {manifest.device}",
    ]


def _line(record: FileRecord) -> str:
    if record.error is not None:
        return f"{record.input}: failed: {record.error}"
    pages = f"{record.pages} pages of " if record.pages > 1 else ""
    size = f"{pages}{record.size[0]} x {record.size[1]}"
    return (
        f"{record.input}: {size} pixels, network saw {record.network_input}, {record.cells} cells, {record.seconds} s"
    )

"""Prediction for one file: reading it, its cells, and the files of its results. What every process of a run does."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kg_detectron.cells import Cells
from kg_detectron.cells.separation import separate_cells
from kg_detectron.export.kinds import (
    EXPORTERS,
    KINDS_OF_LABELS,
    KINDS_OF_PAGES_TOO,
    KINDS_OF_STACKS,
    KINDS_OF_WHOLE_STACKS,
    result_files,
)
from kg_detectron.export.label_images import LabelStack, stack_shape
from kg_detectron.export.ome_tiff import write_pyramid
from kg_detectron.export.ome_zarr import write_into, write_label_group
from kg_detectron.export.results import Result, write_results
from kg_detectron.inference.area import Area, area_of
from kg_detectron.inference.manifest import FileRecord, PlaneRecord, note, versions
from kg_detectron.inference.model_file import load_model
from kg_detectron.inference.opened_file import OpenedFile, open_file, open_pages
from kg_detectron.inference.predictor import channel_of_page, predict, tiled_steps
from kg_detectron.inference.run_settings import Settings
from kg_detectron.inference.tasks import Task
from kg_detectron.inference.tile_store import TILES, TileStore
from kg_detectron.inference.tiling import TiledDetection
from kg_detectron.io.checksum import file_sha256
from kg_detectron.io.finding import Input
from kg_detectron.io.images import Page, list_channels
from kg_detectron.io.ome_zarr import is_ome_zarr
from kg_detectron.io.setting import SettingError

# Scales that the pixel size of a file may set. Beyond them it is a resolution for printing, not of a microscope.
_SCALES = (1 / 8, 8)

# Sides of an image in tiles (of its own pixels) from which what is computed of tiles is kept on disk.
_KEPT_FROM = 2

# What label images are called in the images of OME-Zarr that they label.
LABELS_NAME = "kg_detectron"

# Writers of the label images of a stack as one pyramid, by kind.
_PYRAMIDS: dict[str, Callable[..., None]] = {"ome-tiff": write_pyramid, "zarr": write_label_group}

Progress = Callable[[int, int], None]


class FilePredictor:
    """A model with the settings of a run, ready for files.

    Args:
        model: the file.
        settings: of the prediction.
        device: as PyTorch names it; None takes the GPU where there is one.
        sha256: of the file, where it is known.

    Attributes:
        device: the name.
        speed: what the setting ``fast`` chose, and why; empty without it.
        threshold: score from which cells are kept: the one of the settings, or the model's own.

    Raises:
        OSError, ValueError: a model that cannot be loaded.
        SettingError: a device that is not there, or that the runtime does not use.
    """

    def __init__(self, model: Path, settings: Settings, device: str | None = None, sha256: str | None = None) -> None:
        self.settings, self.model_sha256 = settings, sha256 or file_sha256(model)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.network = load_model(model, self.device)
        self.speed = ""
        if settings.fast:
            from kg_detectron.inference.fast import make_fast

            self.speed = make_fast(self.network)
        if settings.runtime == "onnxruntime":
            self._run_by_onnxruntime()
        self.versions = versions(settings.runtime)
        self.threshold = self.network.threshold if settings.min_score is None else settings.min_score

    def _run_by_onnxruntime(self) -> None:
        if self.device != "cpu":
            raise SettingError("runtime", f"onnxruntime runs on the CPU here, not on {self.device}; add --device cpu")
        from kg_detectron.inference.dense_part import run_by_onnxruntime

        run_by_onnxruntime(self.network)

    def __call__(self, task: Task, folder: Path, output: Path) -> FileRecord:
        """Predict all pages of a file and save the results.

        Args:
            task: the file.
            folder: where the results are written.
            output: folder of the results of an earlier run.

        Returns:
            The record. It is that of the earlier run, and nothing was done, where that is of the same content and its
            results are there. A failure is in its `error`: broken bytes, memory, a full disk are the file's alone.
        """
        opened = open_file(task, self.settings, output)
        if not opened.is_known:
            for write in self.predict(opened, folder, output / TILES):
                opened.attempt(write)
        return opened.record

    def predict(
        self, opened: OpenedFile, folder: Path, tiles: Path, progress: Progress | None = None
    ) -> Iterator[Callable[[], None]]:
        """Predict the pages of a file one by one.

        Args:
            opened: the file. Its record gets what is done, and the error where prediction fails.
            folder: where the results are written.
            tiles: folder for what is computed of large images.
            progress: called after each step of a page with the number of steps done and of all.

        Yields:
            After each page what writes its results, at last what writes those of the whole file. They are called one
            after the other; of a stack each before the next page is asked for, which bounds the memory.
        """
        pages = self._predict_pages(opened, folder, tiles, progress)
        while opened.record.error is None:
            writes: list[Callable[[], None]] = []
            opened.attempt(lambda: writes.extend(islice(pages, 1)))  # noqa: B023  # called at once
            if not writes:
                return
            yield writes[0]

    def _predict_pages(
        self, opened: OpenedFile, folder: Path, tiles: Path, progress: Progress | None
    ) -> Iterator[Callable[[], None]]:
        settings, record, image, (item, _, taken) = self.settings, opened.record, opened.image, opened.task
        assert image is not None
        pages = self._of_channels(image.pages, record)
        record.pages, record.size = len(pages), pages[0].pixels.shape[:2]
        note(record, *image.notes)
        names = [
            item.name if len(pages) == 1 else f"{item.name}_page{number:04d}" for number in range(1, len(pages) + 1)
        ]
        if len(pages) > 1:
            for number, name in enumerate(names, 1):
                if name in taken:
                    raise ValueError(f"page {number} would have the same names of results as another file, {name}")
        classes = self.network.classes
        kinds = settings.kinds
        if len(classes) > 1 and set(kinds) & set(KINDS_OF_LABELS) and "classes" not in kinds:
            kinds = (*kinds, "classes")  # a label image tells no class
        stack = _Stack(item, kinds, settings, folder, pages)
        if any(page.is_lazy for page in pages) and "overlay" in settings.kinds:
            stack.kinds_of_pages = [kind for kind in stack.kinds_of_pages if kind != "overlay"]
            note(record, "An image of this size gets no overlay.")
        for number, (name, page) in enumerate(zip(names, pages, strict=True), 1):
            store = TileStore(tiles / self._key(record, number)) if self._is_kept(page) else None
            cells = self._predict_page(page, record, store, progress)
            yield partial(self._write_page, item, record, folder, stack, number, name, page, cells)

        def write_whole() -> None:
            record.outputs += [path.relative_to(folder).as_posix() for path in stack.write(record.pixel_size)]
            for number, page in enumerate(pages, 1):
                if self._is_kept(page):
                    TileStore(tiles / self._key(record, number)).discard()

        yield write_whole

    def _write_page(
        self,
        item: Input,
        record: FileRecord,
        folder: Path,
        stack: "_Stack",
        number: int,
        name: str,
        page: Page,
        cells: Cells,
    ) -> None:
        """Save the cells of a page, separated; the record of a page is the last that is made.

        Args:
            number: of the page, from 1.
            name: of its results.
        """
        if not self.settings.keep_overlaps:
            cells = separate_cells(cells)
        classes = self.network.classes
        several = record.pages > 1
        result = Result(
            cells,
            page.pixels if page.is_lazy or len(page.chosen) > 1 else page.pixels[..., 0],
            Path(name).name if several else item.path.name,
            record.pixel_size,
            page.source,
            tuple(f"channel{c}" if c.isdigit() else c for c in page.channel_names),
            number if several else 0,
            _position(page),
            classes.names if len(classes) > 1 else Result.category_names,
            classes.shown_colours(),
            scratch=folder,
        )
        target = folder / name
        if stack.kinds_of_pages:
            saved = write_results(result, target.parent, target.name, stack.kinds_of_pages)
            record.outputs += [path.relative_to(folder).as_posix() for path in saved.values()]
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
        prefix = f"page {number}: " if several else ""
        note(record, *(prefix + text for text in cells.notes))

    @torch.no_grad()
    def steps(self, item: Input, sha256: str, tiles: Path) -> list[TiledDetection]:
        """The steps of each page of a large image, for processes that share them by a folder.

        Args:
            item: the file.
            sha256: of it.
            tiles: the folder.

        Returns:
            Nothing for a file that one process had better predict: it is small, or must be read at once.
        """
        record = FileRecord(str(item.path), item.name, sha256)
        pages = open_pages(Task(item, None, ()), self.settings, record).pages
        if self.settings.ensemble or not all(page.is_lazy and self._is_kept(page) for page in pages):
            return []
        pages = self._of_channels(pages, record)
        found = [
            tiled_steps(
                self.network,
                page.pixels,
                **self._options(record),
                area=self._area(page),
                store=TileStore(tiles / self._key(record, number)),
            )
            for number, page in enumerate(pages, 1)
        ]
        steps = [page for page in found if page is not None]
        return steps if len(steps) == len(found) else []

    def _of_channels(self, pages: list[Page], record: FileRecord) -> list[Page]:
        """Pages with the channel in which cells are looked for, one for all pages with the same channels.

        Raises:
            ImageChoiceError: somebody has to choose it.
        """
        chosen: dict[tuple[str, ...], int] = {}
        for names in dict.fromkeys(page.channel_names for page in pages if not page.chosen):
            alike = [page for page in pages if page.channel_names == names]
            chosen[names] = self._channel(alike[len(alike) // 2], record)
        return [page if page.chosen else page.of_channels((chosen[page.channel_names],)) for page in pages]

    def _channel(self, page: Page, record: FileRecord) -> int:
        """The number of the channel that `channel_of_page` takes; the record gets a note of it."""
        options = self._options(record)
        given = {name: options[name] for name in ("scale", "diameter", "pixel_size", "normalisation")}
        number, why = channel_of_page(self.network, page, **given)
        names = page.channel_names
        name = names[number - 1]
        note(
            record,
            f"Cells were looked for in channel {name}, {why}; --channels takes another one ({list_channels(names)}).",
        )
        return number

    def _key(self, record: FileRecord, page: int) -> str:
        """A name for what is computed of the tiles of a page, with all that it depends on."""
        settings = {**asdict(self.settings), "save": None, "min_score": self.threshold, "stack": None}
        about = [self.network.precision, record.pixel_size, self.versions]
        content = [record.sha256, self.model_sha256, page, settings, *about]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _predict_page(
        self, page: Page, record: FileRecord, store: TileStore | None, progress: Progress | None
    ) -> Cells:
        """The cells of a page."""
        settings = self.settings
        area = self._area(page)
        if area is not None and self._is_slide(page) and not settings.all_tiles:
            note(record, f"Cells were looked for in {area.share:.1%} of it; --all-tiles looks everywhere.")
        elif area is not None and not area.share:
            note(record, "No cell was looked for, for the region is outside of it.")
        return predict(
            self.network,
            page.pixels,
            **self._options(record),
            ensemble=settings.ensemble,
            area=area,
            store=store,
            progress=progress,
        )

    def _is_slide(self, page: Page) -> bool:
        return page.is_lazy and len(page.chosen) == 3

    def _is_kept(self, page: Page) -> bool:
        """Whether what is computed of the tiles of a page is worth keeping."""
        return max(page.pixels.shape[:2]) > _KEPT_FROM * self.settings.tile

    def _area(self, page: Page) -> Area | None:
        settings = self.settings
        return area_of(page.pixels, settings.regions, tissue=self._is_slide(page) and not settings.all_tiles)

    def _options(self, record: FileRecord) -> dict[str, Any]:
        """What `predict` and `tiled_steps` are told alike, so that all processes of a run agree."""
        settings = self.settings
        given = settings.scale is not None or settings.diameter is not None
        return {
            "scale": settings.scale,
            "diameter": settings.diameter,
            "pixel_size": None if given else self._pixel_size_for_scale(record),
            "normalisation": settings.normalise,
            "single_colours": settings.channels is None,
            "min_score": self.threshold,
            "tile": settings.tile,
            "overlap": settings.overlap,
        }

    def _pixel_size_for_scale(self, record: FileRecord) -> float | None:
        """The pixel size, where the model knows its own and the two do not contradict each other."""
        trained = self.network.preprocessing.pixel_size
        if record.pixel_size is None or trained is None:
            return None
        low, high = _SCALES
        if record.pixel_size_source != "given" and not low <= record.pixel_size / trained <= high:
            note(
                record,
                f"The file says {record.pixel_size:g} micrometres a pixel, which does not suit this model, trained at "
                f"{trained:g}; the scale is estimated instead.",
            )
            return None
        return record.pixel_size


class _Stack:
    """The files of a stack that hold all its pages; none where the file is no stack, or its pages differ in size."""

    def __init__(self, item: Input, kinds: Sequence[str], settings: Settings, output: Path, pages: list[Page]) -> None:
        self.target = output / item.name
        sizes = {page.pixels.shape[:2] for page in pages}
        joined: tuple[str, ...] = ()
        if len(pages) > 1 and len(sizes) == 1 and settings.stack != "pages":
            joined = KINDS_OF_STACKS if settings.stack == "one" else KINDS_OF_WHOLE_STACKS
        self.kinds = [kind for kind in kinds if kind in joined]
        both = () if settings.stack == "one" else KINDS_OF_PAGES_TOO
        self.kinds_of_pages = [kind for kind in kinds if kind not in joined or kind in both]
        self.results: list[Result] = []
        self.labels: LabelStack | None = None
        self.z_spacing: float | None = None  # of its label images, along the axis z of the file
        is_into = settings.into_zarr and is_ome_zarr(item.path)
        self.image = item.path if is_into else None
        if set(self.kinds) & set(KINDS_OF_LABELS) or is_into:
            if len(sizes) > 1:
                raise ValueError("its planes differ in size: they make no label image of the whole")
            positions = [_position(page) for page in pages]
            shape, axes = stack_shape(positions, sizes.pop())
            self.labels = LabelStack(shape, axes, output)
            spacings = {page.z_spacing for page in pages}
            if "Z" in positions[0] and axes == f"{''.join(positions[0])}YX" and len(spacings) == 1:
                self.z_spacing = spacings.pop()

    def add(self, result: Result) -> None:
        """Take a page, without its pixels."""
        if self.labels is not None:
            self.labels.add(max(result.page - 1, 0), result.label_image)
        if set(self.kinds) - set(KINDS_OF_LABELS):
            result.forget_pixels(self.kinds)
            self.results.append(result)

    def write(self, pixel_size: float | None) -> list[Path]:
        """Write the files."""
        paths = result_files(self.target.parent, self.target.name, self.kinds) if self.kinds else {}
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for kind, path in paths.items():
            if self.labels is not None and kind == "labels":
                self.labels.write(path, pixel_size, self.z_spacing)
            elif self.labels is not None and kind in _PYRAMIDS:
                write = _PYRAMIDS[kind]
                write(path, self.labels.pages, self.labels.shape, self.labels.axes, pixel_size, self.z_spacing)
            else:
                EXPORTERS[kind].write_stack(path, self.results)
        if self.image is not None and self.labels is not None:
            write_into(self.image, LABELS_NAME, self.labels.pages, self.labels.shape, self.labels.axes, pixel_size)
        return list(paths.values())


def _position(page: Page) -> dict[str, int]:
    """Where a page lies in its stack, by the letter of the axis; {} where only its number is known."""
    return {axis.upper(): int(index) for axis, index in page.position.items() if axis not in ("scene", "page")}

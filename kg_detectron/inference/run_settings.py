"""Settings of a prediction of many files, and what can be checked of a run before PyTorch is imported."""

import importlib.util
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kg_detectron.export.kinds import KINDS_OF_OVERLAPS, fault_in_kinds
from kg_detectron.io.setting import SettingError, check_score, checked_channels

TILE_STEP = 32  # pixels; sides of tiles are multiples of it
RUNTIMES = ("pytorch", "onnxruntime")
_DEVICE = re.compile(r"(cpu|mps|(cuda|xpu)(:\d+)?)")
_ADDRESS = re.compile(r"(tcp|tls|ws|wss|ucx|ucxx)://\S+")


@dataclass(frozen=True)
class Settings:
    """Everything but the model and the images that decides about the results.

    Attributes:
        save: kinds of results, of `kg_detectron.export.kinds.KINDS`. The measurements ("csv") are always saved.
        stack: files of a stack. "auto": one label image with its axes, regions as one file and page by page, other
            results page by page; "one": one file for each kind that can hold a stack; "pages": all page by page.
        axes: axis order of stacks, instead of the one that the file declares, such as "ZCYX".
        channels: one, or three as red, green and blue, by name or by number from 1; None takes a grey or RGB image as
            it is.
        scene: the scene to take of a file with several, by name or by number from 1; None takes all.
        scale: network pixels for one image pixel; 1 keeps the pixels.
        diameter: of a typical cell, image pixels; it sets the scale.
        pixel_size: micrometres, instead of the one in the file; for the measurements, and for the scale where the
            model knows the pixel size of its training images.
        normalise: "fixed" or "percentile" instead of the model's own normalisation; None keeps it.
        tile, overlap: larger images are predicted in such tiles, network pixels.
        ensemble: the four mirror images are predicted and joined.
        fast: 16-bit numbers or onnxruntime where that is faster here and finds the same cells, see `make_fast`.
        runtime: what runs the dense part of the network: "pytorch", or "onnxruntime" on the CPU, see
            `kg_detectron.inference.dense_part.run_by_onnxruntime`.
        min_score: cells of a lower score are left out; None takes the model's own threshold.
        keep_overlaps: masks stay as predicted, where by default every pixel belongs to one cell at most and every cell
            is one piece. For COCO JSON and measurements alone.
        into_zarr: labels of OME-Zarr images are written into the images too.
        parquet: the table of all cells is written as Parquet too.
        regions: parts of the images in which cells are looked for, as `kg_detectron.inference.area.regions_of` gives
            them; everywhere where there are none.
        all_tiles: in slides, which are in colour and so large that they are read piece by piece, cells are looked for
            outside the tissue too.
        max_pixels: larger images are refused; None takes the limit of the reader.

    Raises:
        SettingError: a value that is not one of these.
    """

    save: tuple[str, ...] = ("labels", "overlay", "csv")
    stack: str = "auto"
    axes: str | None = None
    channels: tuple[int | str, ...] | None = None
    scene: int | str | None = None
    scale: float | None = None
    diameter: float | None = None
    pixel_size: float | None = None
    normalise: str | None = None
    tile: int = 2048
    overlap: int = 256
    ensemble: bool = False
    fast: bool = False
    runtime: str = RUNTIMES[0]
    min_score: float | None = None
    keep_overlaps: bool = False
    into_zarr: bool = False
    parquet: bool = False
    regions: tuple[str, ...] = ()
    all_tiles: bool = False
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if fault := fault_in_kinds(self.save):
            raise SettingError("save", fault)
        if self.keep_overlaps and (refused := [kind for kind in self.save if kind not in KINDS_OF_OVERLAPS]):
            raise SettingError(
                ("keep_overlaps", "save"),
                f"only coco can hold cells that overlap, and csv their measurements, not {', '.join(refused)}",
            )
        if self.keep_overlaps and self.into_zarr:
            raise SettingError(("keep_overlaps", "into_zarr"), "a label image cannot hold cells that overlap")
        if self.stack not in ("auto", "one", "pages"):
            raise SettingError("stack", f"expected auto, one or pages, got {self.stack!r}")
        if self.axes is not None and not (
            self.axes.isalpha() and len(set(self.axes)) == len(self.axes) and {"Y", "X"} <= set(self.axes)
        ):
            raise SettingError("axes", f"expected different letters with Y and X, such as ZCYX, got {self.axes!r}")
        if self.channels is not None:
            checked_channels(self.channels)
        if self.scene is not None and (self.scene < 1 if isinstance(self.scene, int) else not self.scene.strip()):
            raise SettingError("scene", f"expected a name or a number from 1, got {self.scene!r}")
        if self.scale is not None and self.diameter is not None:
            raise SettingError(("scale", "diameter"), "each sets the scale; expected one of them")
        for name, unit in (("scale", "a number"), ("diameter", "pixels"), ("pixel_size", "micrometres")):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SettingError(name, f"expected {unit} above 0, got {value}")
        if self.tile < TILE_STEP or self.tile % TILE_STEP:
            raise SettingError("tile", f"expected a positive multiple of {TILE_STEP} pixels, got {self.tile}")
        if self.overlap < 0:
            raise SettingError("overlap", f"expected 0 or more pixels, got {self.overlap}")
        check_score("min_score", self.min_score)
        if self.max_pixels is not None and self.max_pixels < 1:
            raise SettingError("max_pixels", f"expected 1 or more, got {self.max_pixels}")
        if self.normalise not in (None, "fixed", "percentile"):
            raise SettingError("normalise", f"expected fixed or percentile, got {self.normalise!r}")
        if self.runtime not in RUNTIMES:
            raise SettingError("runtime", f"expected {' or '.join(RUNTIMES)}, got {self.runtime!r}")
        if self.runtime == "onnxruntime":
            if self.fast:
                raise SettingError(("runtime", "fast"), "onnxruntime has no 16-bit numbers here; expected one of them")
            if importlib.util.find_spec("onnxruntime") is None:
                raise SettingError("runtime", 'onnxruntime is not installed: pip install "kg_detectron[onnx]"')

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """The settings of a run.json; lists become tuples.

        Raises:
            TypeError: unknown names.
            SettingError: a wrong value.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        # Of version 0.1.0: what size the network saw. Own pixels are a scale of 1; the rest is the model's business.
        if values.pop("size", None) == "native":
            values["scale"] = 1.0
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """The settings as a run.json has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds that are written: those of `save`, and the measurements."""
        return tuple(dict.fromkeys((*self.save, "csv")))


@dataclass(frozen=True)
class Workers:
    """The processes that predict files. They decide about nothing in the results.

    Attributes:
        count: of workers on this machine.
        scheduler: address of a Dask scheduler whose workers are taken instead, such as "tcp://login:8786".
        tries: how many workers may die over a file before it is given up.

    Raises:
        SettingError: a value that is not one of these, or none or both of the first two.
    """

    count: int | None = None
    scheduler: str | None = None
    tries: int = 5

    def __post_init__(self) -> None:
        if (self.count is None) == (self.scheduler is None):
            raise SettingError(("workers", "scheduler"), "expected one of them: a number, or an address")
        if self.count is not None and self.count < 1:
            raise SettingError("workers", f"expected 1 or more, got {self.count}")
        if self.scheduler is not None and not _ADDRESS.fullmatch(self.scheduler):
            raise SettingError("scheduler", f"expected an address such as tcp://HOST:8786, got {self.scheduler!r}")
        if self.tries < 1:
            raise SettingError("tries", f"expected 1 or more, got {self.tries}")


def check_device(device: str | None) -> None:
    """Refuse a device whose name PyTorch would not know.

    Raises:
        SettingError: another name.
    """
    if device is not None and not _DEVICE.fullmatch(device):
        raise unknown_device(device)


def unknown_device(device: object) -> SettingError:
    """The error for a device that PyTorch does not know."""
    return SettingError("device", f"expected cpu, cuda, cuda:1 or mps, got {device!r}")


def check_output(output: str | Path) -> None:
    """Refuse a file as the folder of the results.

    Raises:
        SettingError: there is a file of that name.
    """
    if Path(output).exists() and not Path(output).is_dir():
        raise SettingError("output", f"expected a folder, but {output} is a file")

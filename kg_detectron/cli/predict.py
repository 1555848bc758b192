"""``kg-detectron predict``: find the cells of images."""

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kg_detectron.export.kinds import EXPORTERS, KINDS, OTHER_KINDS
from kg_detectron.inference.model_names import DEFAULT_MODEL, model_path
from kg_detectron.inference.run_settings import RUNTIMES, Settings, Workers, check_device, check_output
from kg_detectron.io.setting import checked_channels

if TYPE_CHECKING:
    from kg_detectron.inference.many_files import Summary

_SETTINGS = (
    "stack",
    "axes",
    "scene",
    "scale",
    "diameter",
    "pixel_size",
    "normalise",
    "tile",
    "overlap",
    "min_score",
    "ensemble",
    "fast",
    "runtime",
    "keep_overlaps",
    "into_zarr",
    "parquet",
    "all_tiles",
    "max_pixels",
)
MODEL_HELP = f"model file, checkpoint of tools/train_net.py, or name of a kept model (default: {DEFAULT_MODEL})"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "predict",
        help="find the cells of images",
        description="Find the cells of images and save them. OUT/run.json records what was done. Files that are done "
        "are skipped when the same command is given again. OUT/cells.csv and OUT/images.csv are tables of all images.",
        epilog="Example: kg-detectron predict images -o cells --save labels,roi --channels DAPI. "
        "Exit status: 0, all is done; 1, some files failed; 2, nothing could be done.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FILE|DIR|GLOB",
        help="images (PNG, JPEG, JPEG 2000, WebP, TIFF, OME-Zarr); of a folder, those directly in it; of a pattern in "
        "quotes such as 'plates/**/*.tif' all that match, with the folders below its fixed part kept in OUT",
    )
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder of the results, made where absent")
    kinds = ", ".join(f"{kind} ({exporter.text})" for kind, exporter in EXPORTERS.items())
    parser.add_argument(
        "--save",
        nargs="+",
        metavar="KIND",
        help=f"{kinds}, or all, which is these without {' and '.join(OTHER_KINDS)}; also as a list with commas "
        f"(default: {','.join(Settings.save)}). csv is always saved",
    )
    parser.add_argument(
        "--stack",
        choices=("auto", "one", "pages"),
        help="files of a stack: auto (default), one label image, ROIs as one zip and one a page, the rest by page; "
        "one, one file for each kind that can hold a stack; pages, all page by page",
    )
    parser.add_argument(
        "--into-zarr",
        action="store_true",
        default=None,
        help="write the labels of images in OME-Zarr into the images too, as labels/kg_detectron",
    )
    parser.add_argument(
        "--parquet", action="store_true", default=None, help="write OUT/cells.parquet, with the content of cells.csv"
    )
    parser.add_argument("--overwrite", action="store_true", help="predict again what is done")
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME|N",
        help="channel to find cells in, by name or by number from 1, or three as red, green and blue (default: the one "
        "with the name of a stain of nuclei, or that the model is surest of); all channels are measured",
    )
    parser.add_argument(
        "--axes", type=str.upper, help="axis order of stacks that do not declare it, such as ZCYX: C for channels"
    )
    parser.add_argument(
        "--region",
        action="append",
        metavar="X,Y,W,H|FILE",
        help="look for cells in this rectangle only (pixels), or in the polygons of a GeoJSON, such as QuPath exports; "
        "may be given several times",
    )
    parser.add_argument(
        "--all-tiles",
        action="store_true",
        default=None,
        help="look everywhere in whole slides; by default where there is tissue",
    )
    parser.add_argument(
        "--scene", type=name_or_number, metavar="NAME|N", help="scene of files with several (default: all)"
    )
    parser.add_argument(
        "--diameter", type=float, metavar="PIXELS", help="diameter of a typical cell in the image; it sets the scale"
    )
    parser.add_argument(
        "--pixel-size",
        type=float,
        metavar="UM",
        help="micrometres of a pixel, instead of the ones in the file: for the measurements, and for the scale where "
        "the model knows its own",
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="S",
        help="network pixels for one image pixel; 1 keeps the pixels. By default the model estimates it",
    )
    parser.add_argument("--size", choices=("auto", "training", "native"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="leave out cells of a lower score, 0..1; 0 keeps all (default: the threshold that belongs to the model)",
    )
    parser.add_argument(
        "--normalise",
        choices=("fixed", "percentile"),
        help="normalisation instead of the model's own; percentile suits images of any range, such as 12 bits",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help=f"side of the tiles in which larger images are predicted (default: {Settings.tile})",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="PIXELS",
        help=f"by how much tiles overlap: the largest cell (default: {Settings.overlap})",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        default=None,
        help="predict the four mirror images and join them: more accurate, three times as slow",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        default=None,
        help="16-bit numbers or onnxruntime, if a test at the start shows that it is faster and finds the same cells",
    )
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help=f"what runs the network (default: {RUNTIMES[0]}); onnxruntime is faster on CPUs, for images without tiles",
    )
    parser.add_argument(
        "--keep-overlaps",
        action="store_true",
        default=None,
        help="save the masks as predicted, in several pieces and with overlaps (COCO JSON and measurements only)",
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse images of more pixels; default: 1000000000")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
    add_worker_options(parser)
    parser.set_defaults(run=run)


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that share the files of a run among processes."""
    group = parser.add_argument_group("many processes", "by Dask: pip install 'kg_detectron[dask]'")
    group.add_argument("--workers", type=int, metavar="N", help="share the files among N processes on this machine")
    group.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="share them among the workers of a Dask scheduler, tcp://HOST:PORT, which see the same folders",
    )
    group.add_argument(
        "--tries",
        type=int,
        metavar="N",
        help=f"give up a file over which N workers died (default: {Workers.tries})",
    )


def chosen_workers(arguments: argparse.Namespace) -> Workers | None:
    """The processes that the options ask for; None for this one alone.

    Raises:
        SettingError: a wrong value, or both kinds.
    """
    values = {"count": arguments.workers, "scheduler": arguments.scheduler, "tries": arguments.tries}
    given = {name: value for name, value in values.items() if value is not None}
    return Workers(**given) if given else None


def run(arguments: argparse.Namespace) -> int:
    """Check everything that needs no PyTorch, then predict."""
    inputs = list(arguments.inputs)
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _SETTINGS}
    if arguments.save is not None:
        kinds = [kind for value in _list(arguments.save, inputs, set(EXPORTERS) | {"all"}) for kind in value.split(",")]
        named = [kind for kind in kinds if kind != "all"]
        given["save"] = tuple(dict.fromkeys((*KINDS, *named) if "all" in kinds else named))
    if arguments.channels is not None:
        values = [part for value in _list(arguments.channels, inputs, set()) for part in value.split(",")]
        given["channels"] = checked_channels(values)
    if arguments.size is not None:
        print("note: --size is no longer needed, for cells decide about the scale; --scale 1 keeps the pixels")
        if arguments.size == "native" and given["scale"] is None and given["diameter"] is None:
            given["scale"] = 1.0
    if arguments.region is not None:
        from kg_detectron.inference.area import regions_of

        given["regions"] = regions_of(arguments.region)
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    if not inputs:
        raise ValueError("expected at least one FILE, DIR or GLOB")
    check_device(arguments.device)
    workers = chosen_workers(arguments)
    check_output(arguments.output)
    model_path(arguments.model)
    for name in inputs:
        if not _is_input(name):
            raise FileNotFoundError(f"{name}: there is no such file or folder")

    from kg_detectron.io.finding import find_images

    find_images(inputs, arguments.output)  # as a check: PyTorch takes longer to import

    from kg_detectron.cli.memory import give_back_maps
    from kg_detectron.inference.many_files import predict_files

    give_back_maps()
    summary = predict_files(
        inputs,
        arguments.model,
        arguments.output,
        settings,
        device=arguments.device,
        overwrite=arguments.overwrite,
        workers=workers,
        command=arguments.command_line,
        say=say,
        complain=complain,
    )
    return exit_status(summary)


def _list(values: Sequence[str], inputs: list[str], known: set[str]) -> list[str]:
    """The values of an option that takes several; images at their end, which belong to the inputs, go there."""
    values = list(values)
    while len(values) > 1 and not set(values[-1].split(",")) & known and _is_input(values[-1]):
        inputs.insert(0, values.pop())
    return values


def _is_input(value: str) -> bool:
    return os.path.exists(value) or glob.has_magic(value)


def name_or_number(value: str) -> str | int:
    """A scene as it was typed: a number where it is one."""
    return int(value) if value.lstrip("-").isdigit() else value


def say(line: str) -> None:
    """Print above the progress bar."""
    from tqdm import tqdm

    tqdm.write(line)


def complain(line: str) -> None:
    """Print above the progress bar, as an error."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def exit_status(summary: "Summary") -> int:
    """Print the summary of a run; 0, 1 or 2 as the help text says."""
    print(summary)
    if not summary.failed:
        return 0
    return 1 if summary.done or summary.skipped else 2

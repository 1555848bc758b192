"""The command ``kg-detectron``."""

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING

from kg_detectron import __version__

if TYPE_CHECKING:
    from kg_detectron.inference.batch import Summary


def versions() -> str:
    """Versions that a bug report needs, one ``name version`` a line; an absent package is "not installed".

    They come from the packages' metadata, so that a package which does not import is named too.
    """
    lines = [f"kg_detectron {__version__}"]
    for name, distribution in (("torch", "torch"), ("torchvision", "torchvision"), ("Detectron2", "detectron2")):
        try:
            lines.append(f"{name} {installed_version(distribution)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"Python {platform.python_version()}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``kg-detectron``."""
    parser = argparse.ArgumentParser(
        prog="kg-detectron",
        description="Keypoint-graph cell instance segmentation.",
        # argparse's default formatter would join the lines of --version into a paragraph.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=versions(),
        help="print the versions of kg_detectron, PyTorch, torchvision, Detectron2 and Python, and exit",
    )
    # Each command adds itself here, with set_defaults(run=a function of the arguments that returns the exit status).
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_predict(commands)
    _add_rerun(commands)
    return parser


# The functions behind the commands are imported where they are called: PyTorch takes seconds, --help should not.


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "predict",
        help="find the cells of images",
        description="Find the cells of images and save them. What was done is in OUT/run.json; files that are done are "
        "skipped when the command is given again.",
        epilog="Exit status: 0, all is done; 1, some files failed; 2, nothing could be done.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|DIR|GLOB",
        help="images (PNG, JPEG, TIFF); of a folder, those directly in it; of a pattern in quotes such as "
        "'plates/**/*.tif' all that match, with the folders below its fixed part kept in OUT",
    )
    parser.add_argument("-m", "--model", required=True, help="model file, or checkpoint of tools/train_net.py")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder of the results, made where absent")
    parser.add_argument(
        "--save",
        nargs="+",
        metavar="KIND",
        help="labels (TIFF), overlay (PNG), coco (JSON), geojson (QuPath), roi (ImageJ), csv (measurements), or all; "
        "default: labels overlay",
    )
    parser.add_argument("--overwrite", action="store_true", help="predict again what is done")
    parser.add_argument(
        "--axes",
        type=str.upper,
        help="axis order of TIFF stacks, such as ZCYX: C for channels, other letters for pages",
    )
    parser.add_argument(
        "--channels",
        nargs="+",
        type=int,
        metavar="N",
        help="channels to take, from 1: one as grey, or three as red, green and blue",
    )
    parser.add_argument(
        "--normalise",
        choices=("fixed", "percentile"),
        help="normalisation instead of the model's own; percentile suits images of any range",
    )
    parser.add_argument(
        "--size",
        choices=("auto", "training", "native"),
        help="training: resize images to the model's training size; native: keep their pixels; auto (default): keep "
        "them where a side is more than twice the training size's",
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="side of the tiles in which large images are predicted"
    )
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="by how much tiles overlap: the largest cell")
    parser.add_argument("--pixel-size", type=float, metavar="UM", help="micrometres a pixel, for the measurements")
    parser.add_argument(
        "--keep-overlaps",
        action="store_true",
        default=None,
        help="save the masks as predicted, in several pieces and with overlaps (COCO JSON only)",
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse images of more pixels; default: 1000000000")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from kg_detectron.inference.batch import Settings, predict_files
    from kg_detectron.io.cells import KINDS

    names = ("axes", "channels", "normalise", "size", "tile", "overlap", "pixel_size", "keep_overlaps", "max_pixels")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "channels" in given:
        given["channels"] = tuple(given["channels"])
    if arguments.save is not None:
        kinds = [kind for value in arguments.save for kind in value.split(",")]
        given["save"] = KINDS if "all" in kinds else tuple(dict.fromkeys(kinds))
    summary = predict_files(
        arguments.inputs,
        arguments.model,
        arguments.output,
        Settings(**given),
        device=arguments.device,
        overwrite=arguments.overwrite,
        command=arguments.command_line,
        say=_say,
    )
    return _exit_status(summary)


def _add_rerun(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "rerun",
        help="repeat a prediction from its run.json",
        description="Repeat a prediction with the same model, images and settings, and get the same labels. Refused "
        "where the model or an image has changed.",
    )
    parser.add_argument("manifest", metavar="run.json", help="written by kg-detectron predict")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="folder of the results; default: beside the run's, OUT_rerun"
    )
    parser.add_argument("--device", help="default: the run's")
    parser.set_defaults(run=_rerun)


def _rerun(arguments: argparse.Namespace) -> int:
    from kg_detectron.inference.batch import rerun

    summary = rerun(
        arguments.manifest, arguments.output, device=arguments.device, command=arguments.command_line, say=_say
    )
    return _exit_status(summary)


def _say(line: str) -> None:
    """Print above the progress bar."""
    from tqdm import tqdm

    tqdm.write(line)


def _exit_status(summary: "Summary") -> int:
    print(summary)
    for record in summary.failed:
        print(f"failed: {record.input}: {record.error}", file=sys.stderr)
    if not summary.failed:
        return 0
    return 1 if summary.done or summary.skipped else 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kg-detectron`` on ``argv`` (``sys.argv[1:]`` where None); the result is the exit status.

    0: done; 1: done in part, or the answer is bad news; 2: nothing was done, for the reason that is printed; 130:
    interrupted from the keyboard.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.command_line = shlex.join(["kg-detectron", *(sys.argv[1:] if argv is None else argv)])
    if "run" not in arguments:
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:  # what users can mend; anything else is ours, with its traceback
        print(f"kg-detectron: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kg-detectron: interrupted", file=sys.stderr)
        return 130

"""The command ``kg-detectron``."""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from kg_detectron import __version__


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
    _add_report(commands)
    _add_explain(commands)
    return parser


# The functions behind the commands are imported where they are called: PyTorch takes seconds, --help should not.


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="compare predictions with ground truth on one HTML page",
        description="Compare the predictions of one or several models with the ground truth on one HTML page, which "
        "needs no other file: figures, curves, and the images, the worst first, with what was missed, false, merged or "
        "split.",
    )
    parser.add_argument("ground_truth", metavar="GT", help="COCO JSON, or folder of label images")
    parser.add_argument("predictions", nargs="+", metavar="PRED", help="the same, or COCO results; one for each model")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("-o", "--output", required=True, metavar="HTML", help="the file to write")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the models (default: by their files)")
    parser.add_argument("--title", help="of the page (default: the name of GT)")
    parser.add_argument(
        "--iou",
        nargs="+",
        type=float,
        default=[0.5, 0.7],
        metavar="T",
        help="thresholds of the figures; the first ranks the images (default: 0.5 0.7)",
    )
    parser.add_argument(
        "--score",
        type=float,
        metavar="S",
        help="show and count instances from this score on (default: for each model, that of the highest F1)",
    )
    parser.add_argument(
        "--details",
        type=int,
        default=100,
        metavar="N",
        help="draw outlines for the N worst images, which bounds the size of the file (default: 100)",
    )
    parser.add_argument(
        "--explain",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="show how the boxes of these images came about, in the model of --model",
    )
    parser.add_argument("-m", "--model", help="model file, or checkpoint of tools/train_net.py, for --explain")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from .report import explain_image, model_names, report_dataset

    names = arguments.names or model_names(arguments.predictions)
    if len(set(names)) < len(arguments.predictions) or len(names) > len(arguments.predictions):
        raise ValueError(f"expected {len(arguments.predictions)} different names of models, got {', '.join(names)}")
    if bool(arguments.explain) != bool(arguments.model):
        raise ValueError("--explain and --model belong together: expected both or none")
    report_dataset(
        arguments.ground_truth,
        dict(zip(names, arguments.predictions, strict=True)),
        arguments.images,
        arguments.output,
        title=arguments.title,
        ious=arguments.iou,
        score=arguments.score,
        details=arguments.details,
        explanations=[explain_image(arguments.model, image) for image in arguments.explain],
        progress=sys.stderr.isatty(),
    )
    print(f"wrote {arguments.output}")
    return 0


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "explain",
        help="draw how the boxes of one image came about",
        description="Draw heatmaps, votes, peaks, groups and boxes of one image at every scale, and why groups were "
        "rejected.",
    )
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG or TIFF")
    parser.add_argument("-m", "--model", required=True, help="model file, or checkpoint of tools/train_net.py")
    parser.add_argument("-o", "--output", required=True, metavar="PNG", help="the file to write")
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from .io.files import replacing
    from .report import explain_image

    explanation = explain_image(arguments.model, arguments.image)
    with replacing(arguments.output) as unfinished:
        unfinished.write_bytes(explanation.png)
    print(f"wrote {arguments.output}: {explanation.text}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kg-detectron`` on ``argv`` (``sys.argv[1:]`` where None); the result is the exit status.

    0: done; 1: done in part, or the answer is bad news; 2: nothing was done, for the reason that is printed.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:  # what users can mend; anything else is ours, with its traceback
        print(f"kg-detectron: error: {error}", file=sys.stderr)
        return 2

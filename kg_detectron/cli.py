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
    parser.add_subparsers(title="commands", metavar="COMMAND")
    return parser


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

"""The command ``kg-detectron``: its parser and what becomes of errors. Each command is a file beside this one."""

import argparse
import atexit
import gc
import os
import platform
import shlex
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from kg_detectron._version import __version__

# Each is a module whose add_parser(commands) adds the command, with run(arguments), which returns the exit status. The
# functions behind a command are imported in `run`: PyTorch takes seconds, --help and a wrong option should not.
COMMANDS = (
    "predict",
    "train",
    "rerun",
    "models",
    "evaluate",
    "report",
    "explain",
    "check_data",
    "convert",
    "export",
    "doctor",
)

_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as shells name the ends by signals 2 and 13


def versions() -> str:
    """Versions that a bug report needs, one ``name version`` a line; an absent package is "not installed".

    They come from the packages' metadata, so that a package which does not import is named too.
    """
    from importlib.metadata import PackageNotFoundError, version  # slow

    lines = [f"kg_detectron {__version__}"]
    for name, distribution in (("torch", "torch"), ("torchvision", "torchvision"), ("Detectron2", "detectron2")):
        try:
            lines.append(f"{name} {version(distribution)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"Python {platform.python_version()}")
    return "\n".join(lines)


class _PrintVersions(argparse.Action):
    """argparse's own action for versions wants them before anybody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(versions())
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``kg-detectron``."""
    parser = argparse.ArgumentParser(
        prog="kg-detectron",
        description="Keypoint-graph cell instance segmentation.",
    )
    parser.add_argument(
        "--version",
        action=_PrintVersions,
        nargs=0,
        help="print the versions of kg_detectron, PyTorch, torchvision, Detectron2 and Python, and exit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"kg_detectron.cli.{name}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kg-detectron`` on ``argv`` (``sys.argv[1:]`` where None).

    Returns:
        The exit status. 0: done; 1: done in part, or the answer is bad news; 2: nothing was done, for the reason that
        is printed; 130: interrupted from the keyboard; 141: nobody reads the output any more.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.command_line = shlex.join(["kg-detectron", *(sys.argv[1:] if argv is None else argv)])
    if "run" not in arguments:
        parser.print_help()
        return 0
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _forget_output()
        return _BROKEN_PIPE
    except (OSError, ValueError) as error:  # what users can mend; anything else is ours, with its traceback
        print(f"kg-detectron: error: {_message(error, arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kg-detectron: interrupted; give the same command again to go on", file=sys.stderr)
        return _INTERRUPTED


def program() -> NoReturn:
    """The process of the command: `main`, with three settings that only a program may choose.

    Threads that wait for others soon sleep. Those of GNU OpenMP spin thirty times as long by default, and a prediction
    beside other processes, four on two cores, then took five times as long. Imports make many objects that stay, and to
    look for unreachable ones after each 700 of them took 0.2 s. At the end PyTorch's libraries are left to the system:
    to unload those for CUDA takes half a second and 140 MB, on machines without a GPU too.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when PyTorch is imported
    gc.set_threshold(50_000)
    status = main()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _message(error: Exception, arguments: argparse.Namespace) -> str:
    if hasattr(error, "as_options"):
        return error.as_options()
    option = getattr(error, "option", None)  # that an ImageChoiceError advises
    if option is not None and option.removeprefix("--") not in arguments:
        return f"{error.plain}, and this command has no {option}"  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _forget_output() -> None:
    """Send the rest of the output nowhere, so that Python does not complain when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())

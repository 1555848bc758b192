"""``kg-detectron rerun``: repeat a prediction."""

import argparse
from pathlib import Path

from kg_detectron.cli.predict import add_worker_options, chosen_workers, complain, exit_status, say
from kg_detectron.inference.run_settings import check_device, check_output


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "rerun",
        help="repeat a prediction from its folder or run.json",
        description="Repeat a prediction with the same model, images and settings, and get the same labels. Refused "
        "where the model or an image has changed. Of a folder with several runs all are repeated.",
    )
    parser.add_argument("manifest", metavar="FOLDER", help="of the results of kg-detectron predict, or its run.json")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="folder of the results; default: beside the run's, FOLDER_rerun"
    )
    parser.add_argument(
        "--run", dest="number", type=int, metavar="N", help="repeat only the Nth run into the folder, 1 for the oldest"
    )
    parser.add_argument("--device", help="default: the run's")
    add_worker_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check what needs no PyTorch, then repeat."""
    if not Path(arguments.manifest).exists():
        raise FileNotFoundError(f"{arguments.manifest}: no such folder or file")
    check_device(arguments.device)
    workers = chosen_workers(arguments)
    if arguments.output is not None:
        check_output(arguments.output)

    from kg_detectron.cli.memory import give_back_maps
    from kg_detectron.inference.many_files import rerun

    give_back_maps()
    summary = rerun(
        arguments.manifest,
        arguments.output,
        number=arguments.number,
        device=arguments.device,
        workers=workers,
        command=arguments.command_line,
        say=say,
        complain=complain,
    )
    return exit_status(summary)

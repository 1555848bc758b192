"""``kg-detectron export``: make a model file of a training run."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="make a model file for prediction from a training run",
        description="Write the weights of a run of tools/train_net.py, with all that prediction needs to know of them.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="its model_best.pth, or else model_final.pth; or a checkpoint"
    )
    parser.add_argument("-o", "--output", required=True, metavar="MODEL", help="name.safetensors, name.pt or name.pth")
    parser.add_argument(
        "--half", action="store_true", help="weights of 16 bits: half the size, results not quite equal"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the model file."""
    from kg_detectron.inference import export_run
    from kg_detectron.io.checksum import file_sha256

    checkpoint = export_run(arguments.run_dir, arguments.output, half=arguments.half)
    print(f"{arguments.output}: the model of {checkpoint}\nSHA-256 {file_sha256(arguments.output)}")
    return 0

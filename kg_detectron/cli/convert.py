"""``kg-detectron convert``: make a COCO JSON for training."""

import argparse
import sys

from kg_detectron.cli.layout import LAYOUT_HELP


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="make a COCO JSON for training from images and their masks",
        description="Write a COCO JSON that tools/train_net.py takes as a dataset: DATASETS.TRAIN \"('FILE.json',)\".",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, in that of the JSON or below")
    parser.add_argument("masks", metavar="MASKS", help="folder of their masks")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json", help="an existing one is replaced")
    parser.add_argument("--layout", choices=("labels", "cells"), help=LAYOUT_HELP)
    parser.add_argument("--category", default="cell", help="name of the only category (default: cell)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the JSON."""
    from kg_detectron.io.convert import convert

    images, cells, faults = convert(
        arguments.images, arguments.masks, arguments.output, layout=arguments.layout, category=arguments.category
    )
    for fault in faults:
        print(f"{fault.kind}: {fault}", file=sys.stderr)
    print(f"{arguments.output}: {images} images, {cells} cells")
    return 0

"""``kg-detectron check-data``: find what is wrong with images and their masks."""

import argparse

from kg_detectron.cli.layout import LAYOUT_HELP


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check-data",
        help="find what is wrong with images and their masks",
        description="List all that is wrong with a dataset, and count it by kind. Exit status 1 where anything is.",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or a COCO JSON")
    parser.add_argument("masks", metavar="MASKS", nargs="?", help="folder of their masks; none for a COCO JSON")
    parser.add_argument("--layout", choices=("labels", "cells"), help=LAYOUT_HELP)
    parser.add_argument("--images", dest="root", metavar="DIR", help="of a COCO JSON (default: its folder)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the faults."""
    from collections import Counter

    from kg_detectron.io.dataset_check import check_coco, check_masks

    if arguments.images.lower().endswith(".json"):
        if arguments.masks is not None or arguments.layout is not None:
            raise ValueError("MASKS and --layout go with a folder of images; a COCO JSON holds its masks")
        faults, images = check_coco(arguments.images, arguments.root)
    elif arguments.masks is None or arguments.root is not None:
        raise ValueError(
            "expected IMAGES MASKS, two folders, or a COCO JSON with --images DIR where they are elsewhere"
        )
    else:
        faults, images = check_masks(arguments.images, arguments.masks, arguments.layout)
    for fault in faults:
        print(f"{fault.kind}: {fault}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(fault.kind for fault in faults).items()))
    print(f"{images} images looked at: {counts or 'nothing found'}")
    return 1 if faults else 0

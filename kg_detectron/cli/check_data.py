"""``kg-detectron check-data``: find what is wrong with images and their masks."""

import argparse

from kg_detectron.cli.layout import LAYOUT_HELP, add_choice, choice


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check-data",
        help="find what is wrong with images and their masks",
        description="List all that is wrong with a dataset, and count it by kind.",
        epilog="Exit status: 0, nothing is wrong (notes may be printed); 1, something is; 2, nothing was checked.",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or a COCO JSON")
    parser.add_argument(
        "masks", metavar="MASKS", nargs="?", help="folder of their masks; none for a COCO JSON, or where one has both"
    )
    parser.add_argument("--layout", choices=("labels", "cells"), help=LAYOUT_HELP)
    parser.add_argument("--images", dest="root", metavar="DIR", help="of a COCO JSON (default: its folder)")
    parser.add_argument(
        "--normalise",
        choices=("fixed", "percentile"),
        help="INPUT.NORMALISATION of the training that is planned; default: name what fixed cannot take",
    )
    add_choice(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the faults."""
    from collections import Counter

    from kg_detectron.io.dataset_check import check_coco, check_masks
    from kg_detectron.io.fault import Severity
    from kg_detectron.io.normalisation import Normalisation

    normalisation = arguments.normalise and Normalisation(arguments.normalise)
    if arguments.images.lower().endswith(".json"):
        if arguments.masks is not None or arguments.layout is not None:
            raise ValueError("MASKS and --layout go with a folder of images; a COCO JSON holds its masks")
        faults, images = check_coco(
            arguments.images, arguments.root, normalisation=normalisation, choice=choice(arguments)
        )
    elif arguments.root is not None:
        raise ValueError("--images names the folder of the images of a COCO JSON; expected IMAGES MASKS, two folders")
    else:
        faults, images = check_masks(
            arguments.images, arguments.masks, arguments.layout, choice=choice(arguments), normalisation=normalisation
        )
    for fault in faults:
        print(f"{'note: ' if fault.severity == Severity.NOTE else ''}{fault.kind}: {fault}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(fault.kind for fault in faults).items()))
    print(f"{images} images looked at: {counts or 'no faults'}")
    return 1 if any(fault.severity > Severity.NOTE for fault in faults) else 0

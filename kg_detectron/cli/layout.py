"""Options that say how images and masks are read, which several commands have."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kg_detectron.io.dataset_check import Choice

LAYOUT_HELP = (
    "labels: one label image an image, NAME.tif, NAME_labels.tif or NAME_masks.tif; cells: one file a cell, "
    "NAME/*.png, or where IMAGES and MASKS are one folder, NAME/images/*.png and NAME/masks/*.png; default: what is "
    "there"
)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say what of a file is read, as in predict."""
    parser.add_argument("--axes", type=str.upper, help="axis order of TIFF stacks, such as ZCYX: C for channels")
    parser.add_argument(
        "--channels", nargs="+", metavar="N", help="channels to take, from 1: one as grey, or three as red, green, blue"
    )
    parser.add_argument("--scene", metavar="N", help="scene to take of files that hold several")
    parser.add_argument(
        "--background", type=int, default=0, metavar="LABEL", help="number of the background in label images"
    )


def choice(arguments: argparse.Namespace) -> "Choice":
    """What `add_choice` asked for."""
    from kg_detectron.io.dataset_check import Choice

    channels = arguments.channels and tuple(int(c) if c.isdigit() else c for c in arguments.channels)
    scene = int(arguments.scene) if arguments.scene and arguments.scene.isdigit() else arguments.scene
    return Choice(arguments.axes, channels, scene, arguments.background)

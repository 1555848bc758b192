"""Options that say what is read of images and their masks, which several commands have."""

import argparse
from typing import TYPE_CHECKING, Any

from kg_detectron.cli.predict import name_or_number
from kg_detectron.io.setting import checked_channels

if TYPE_CHECKING:
    from kg_detectron.io.dataset_check import Choice

LAYOUT_HELP = (
    "labels: one label image an image, NAME.tif, NAME_labels.tif or NAME_masks.tif; cells: one file a cell, "
    "NAME/*.png, or where IMAGES and MASKS are one folder, NAME/images/*.png and NAME/masks/*.png; default: what is "
    "there"
)


def add_planes(parser: argparse.ArgumentParser) -> None:
    """The options that say what of a file is the image, as in predict."""
    parser.add_argument("--axes", type=str.upper, help="axis order of TIFF stacks, such as ZCYX: C for channels")
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME|N",
        help="channels to take, by name or from 1: one as grey, or three as red, green, blue",
    )
    parser.add_argument(
        "--scene", type=name_or_number, metavar="NAME|N", help="scene to take of files that hold several"
    )


def planes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of a file is the image, as the options say and `read_image` takes it."""
    channels = None if arguments.channels is None else checked_channels(arguments.channels)
    return {"axes": arguments.axes, "channels": channels, "scene": arguments.scene}


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say what of images and label images is read."""
    add_planes(parser)
    parser.add_argument(
        "--background", type=int, default=0, metavar="LABEL", help="number of the background in label images"
    )


def choice(arguments: argparse.Namespace) -> "Choice":
    """What of images and label images is read, as the options say."""
    from kg_detectron.io.dataset_check import Choice

    return Choice(**planes(arguments), background=arguments.background)

"""``kg-detectron convert``: make a COCO JSON for training, or mend one."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kg_detectron.cli.layout import LAYOUT_HELP, add_choice, choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kg_detectron.io.fault import Fault


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="make a COCO JSON for training from images and their masks",
        description="Write a COCO JSON that tools/train_net.py takes as a dataset: DATASETS.TRAIN \"('FILE.json',)\". "
        "MASKS may also be a folder of GeoJSON files, as QuPath exports its objects. "
        "A COCO JSON instead of images is mended: ids, boxes, polygons beyond the image, categories that nothing uses.",
    )
    parser.add_argument(
        "images", metavar="IMAGES", help="folder of images, in that of the JSON or below; or a COCO JSON to mend"
    )
    parser.add_argument(
        "masks", metavar="MASKS", nargs="?", help="folder of their masks; none for a COCO JSON, or where one has both"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json", help="an existing one is replaced")
    parser.add_argument("--layout", choices=("labels", "cells"), help=LAYOUT_HELP)
    parser.add_argument("--images", dest="root", metavar="DIR", help="of a COCO JSON (default: its folder)")
    parser.add_argument(
        "--classes",
        metavar="TABLE",
        help="CSV or JSON with the class of each number of the label images, a folder of such tables, or 'folders': "
        "MASKS has a folder for each class",
    )
    parser.add_argument("--category", help="name of the only category (default: cell, or that of a COCO JSON)")
    parser.add_argument("--merge-categories", action="store_true", help="make one of several categories of a COCO JSON")
    parser.add_argument(
        "--crowds",
        choices=("cells", "leave-out"),
        help="take the crowd annotations of a COCO JSON as one cell each, or leave them out (default: refuse them)",
    )
    add_choice(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the JSON."""
    from kg_detectron.io.convert import convert, convert_coco, convert_geojson
    from kg_detectron.io.qupath import GEOJSON

    chosen = choice(arguments)
    if arguments.images.lower().endswith(".json"):
        if arguments.masks is not None or arguments.layout is not None or arguments.classes is not None:
            raise ValueError("MASKS, --layout and --classes go with a folder of images; a COCO JSON holds its masks")
        images, cells, faults = convert_coco(
            arguments.images,
            arguments.output,
            image_root=arguments.root,
            merge_categories=arguments.merge_categories,
            category=arguments.category,
            crowds=arguments.crowds or "refuse",
            choice=chosen,
        )
    else:
        if arguments.root is not None or arguments.merge_categories or arguments.crowds is not None:
            raise ValueError("--images, --merge-categories and --crowds go with a COCO JSON")
        outlines = arguments.masks is not None and arguments.layout is None and arguments.classes is None
        if outlines and next(Path(arguments.masks).rglob("*" + GEOJSON), None) is not None:
            if arguments.category is not None:
                raise ValueError("--category goes with masks; GeoJSON names the class of each cell")
            images, cells, faults = convert_geojson(arguments.images, arguments.masks, arguments.output, choice=chosen)
            return _tell(arguments.output, images, cells, faults)
        if arguments.classes is not None and arguments.category is not None:
            raise ValueError("--category names the only category; expected it or --classes")
        images, cells, faults = convert(
            arguments.images,
            arguments.masks,
            arguments.output,
            layout=arguments.layout,
            category=arguments.category or "cell",
            classes=arguments.classes,
            choice=chosen,
        )
    return _tell(arguments.output, images, cells, faults)


def _tell(output: str, images: int, cells: int, faults: "Sequence[Fault]") -> int:
    """Say what was written, and what is conspicuous."""
    for fault in faults:
        print(f"{fault.kind}: {fault}", file=sys.stderr)
    print(f"{output}: {images} images, {cells} cells")
    return 0

"""``kg-detectron explain``: draw how the boxes of one image came about."""

import argparse

from kg_detectron.cli.layout import add_planes, planes
from kg_detectron.cli.predict import MODEL_HELP
from kg_detectron.inference.model_names import DEFAULT_MODEL, model_path
from kg_detectron.io.setting import SettingError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "explain",
        help="draw how the boxes of one image came about",
        description="Draw heatmaps, votes, peaks, groups and boxes of one image at every scale, and why groups were "
        "rejected.",
    )
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG or TIFF")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=MODEL_HELP)
    parser.add_argument("-o", "--output", required=True, metavar="PNG", help="the file to write")
    add_planes(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw one image, as PNG."""
    if not arguments.output.lower().endswith(".png"):
        raise SettingError(
            "output", f"expected a name that ends in .png, for the picture is a PNG; got {arguments.output}"
        )
    model = model_path(arguments.model)

    from kg_detectron.io.atomic import replacing
    from kg_detectron.report import explain_image

    explanation = explain_image(model, arguments.image, **planes(arguments))
    with replacing(arguments.output) as unfinished:
        unfinished.write_bytes(explanation.png)
    print(f"wrote {arguments.output}: {explanation.text}")
    return 0

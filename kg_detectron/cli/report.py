"""``kg-detectron report``: compare predictions with ground truth on one HTML page."""

import argparse
import sys

from kg_detectron.cli.predict import MODEL_HELP
from kg_detectron.inference.model_names import DEFAULT_MODEL, model_path
from kg_detectron.io.setting import SettingError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="compare predictions with ground truth on one HTML page",
        description="Compare the predictions of one or several models with the ground truth on one HTML page, which "
        "needs no other file: figures, curves, and the images, the worst first, with what was missed, false, merged or "
        "split.",
    )
    parser.add_argument("ground_truth", metavar="GT", help="COCO JSON, or folder of label images")
    parser.add_argument("predictions", nargs="+", metavar="PRED", help="the same, or COCO results; one for each model")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("-o", "--output", required=True, metavar="HTML", help="the file to write")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the models (default: by their files)")
    parser.add_argument("--title", help="of the page (default: the name of GT)")
    parser.add_argument(
        "--iou",
        nargs="+",
        type=float,
        default=[0.5, 0.7],
        metavar="T",
        help="thresholds of the figures; the first ranks the images (default: 0.5 0.7)",
    )
    parser.add_argument(
        "--score",
        type=float,
        metavar="S",
        help="show and count instances from this score on (default: for each model, that of the highest F1)",
    )
    parser.add_argument(
        "--details",
        type=int,
        default=100,
        metavar="N",
        help="draw outlines for the N worst images, which bounds the size of the file (default: 100)",
    )
    parser.add_argument(
        "--explain",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="show how the boxes of these images came about, in the model of --model; of several channels, in the one "
        "that predict takes",
    )
    parser.add_argument("-m", "--model", help=f"for --explain: {MODEL_HELP}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from kg_detectron.report import explain_image, model_names, report_dataset

    names = arguments.names or model_names(arguments.predictions)
    if len(set(names)) < len(arguments.predictions) or len(names) > len(arguments.predictions):
        expected = f"expected {len(arguments.predictions)} different names of models"
        raise SettingError("names", f"{expected}, got {', '.join(names)}")
    if arguments.model is not None and not arguments.explain:
        raise SettingError("model", "needed with --explain only, which names the images; expected both or none")
    model = model_path(arguments.model or DEFAULT_MODEL) if arguments.explain else None
    report_dataset(
        arguments.ground_truth,
        dict(zip(names, arguments.predictions, strict=True)),
        arguments.images,
        arguments.output,
        title=arguments.title,
        ious=arguments.iou,
        score=arguments.score,
        details=arguments.details,
        explanations=[] if model is None else [explain_image(model, image, ask=False) for image in arguments.explain],
        progress=sys.stderr.isatty(),
    )
    print(f"wrote {arguments.output}")
    return 0

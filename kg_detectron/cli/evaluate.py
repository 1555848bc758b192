"""``kg-detectron evaluate``: compare predictions with ground truth."""

import argparse
import sys
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="compare predictions with ground truth",
        description="Print the paper's AP and mean IoU, COCO's AP, F1, panoptic quality, the DSB score, AJI and Dice, "
        "fractions of 0..1, with a definition of each. Images are found by their names without ending and '_labels'; "
        "one without prediction counts as without detections.",
    )
    parser.add_argument("ground_truth", metavar="GT", help="folder of label images, or COCO JSON")
    parser.add_argument(
        "predictions",
        metavar="PRED",
        help="folder of label images or of the *_coco.json that predict writes, COCO JSON with scores, or COCO results",
    )
    parser.add_argument(
        "--iou", nargs="+", type=float, default=[0.5, 0.7], metavar="T", help="thresholds of IoU (default: 0.5 0.7)"
    )
    parser.add_argument(
        "--min-score",
        type=float,
        default=0.0,
        metavar="S",
        help="leave detections of a lower score out of all figures but the APs, which rank them (default: 0)",
    )
    parser.add_argument(
        "--max-detections", type=int, default=10000, metavar="N", help="an image, for COCO's AP (default: 10000)"
    )
    parser.add_argument(
        "--only-common",
        action="store_true",
        help="evaluate the images that GT and PRED both have; by default one without prediction counts as without "
        "detections, and one that GT lacks is an error",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE, those of every image too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print all figures."""
    from kg_detectron.inference.manifest import MANIFEST
    from kg_detectron.metrics.scoring import evaluate, report, write_report

    if Path(arguments.ground_truth, MANIFEST).exists() and not Path(arguments.predictions, MANIFEST).exists():
        print(
            f"note: {arguments.ground_truth} holds results of kg-detectron predict ({MANIFEST}), and "
            f"{arguments.predictions} does not; the ground truth comes first: evaluate GT PRED",
            file=sys.stderr,
        )
    figures = evaluate(
        arguments.ground_truth,
        arguments.predictions,
        ious=arguments.iou,
        min_score=arguments.min_score,
        max_detections=arguments.max_detections,
        only_common=arguments.only_common,
    )
    if arguments.json is not None:
        write_report(arguments.json, figures)
    print(report(figures))
    return 0

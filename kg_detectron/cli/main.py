"""The command ``kg-detectron``."""

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING

from kg_detectron._version import __version__
from kg_detectron.cli import train

if TYPE_CHECKING:
    from kg_detectron.inference.many_files import Summary


def versions() -> str:
    """Versions that a bug report needs, one ``name version`` a line; an absent package is "not installed".

    They come from the packages' metadata, so that a package which does not import is named too.
    """
    lines = [f"kg_detectron {__version__}"]
    for name, distribution in (("torch", "torch"), ("torchvision", "torchvision"), ("Detectron2", "detectron2")):
        try:
            lines.append(f"{name} {installed_version(distribution)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"Python {platform.python_version()}")
    return "\n".join(lines)


# The functions behind the commands are imported where they are called: PyTorch takes seconds, --help should not.


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "predict",
        help="find the cells of images",
        description="Find the cells of images and save them. What was done is in OUT/run.json; files that are done are "
        "skipped when the command is given again.",
        epilog="Exit status: 0, all is done; 1, some files failed; 2, nothing could be done.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|DIR|GLOB",
        help="images (PNG, JPEG, TIFF); of a folder, those directly in it; of a pattern in quotes such as "
        "'plates/**/*.tif' all that match, with the folders below its fixed part kept in OUT",
    )
    parser.add_argument("-m", "--model", required=True, help="model file, or checkpoint of tools/train_net.py")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder of the results, made where absent")
    parser.add_argument(
        "--save",
        nargs="+",
        metavar="KIND",
        help="labels (TIFF), overlay (PNG), coco (JSON), geojson (QuPath), roi (ImageJ), csv (measurements), or all; "
        "default: labels overlay",
    )
    parser.add_argument("--overwrite", action="store_true", help="predict again what is done")
    parser.add_argument(
        "--axes",
        type=str.upper,
        help="axis order of TIFF stacks, such as ZCYX: C for channels, other letters for pages",
    )
    parser.add_argument(
        "--channels",
        nargs="+",
        type=int,
        metavar="N",
        help="channels to take, from 1: one as grey, or three as red, green and blue",
    )
    parser.add_argument(
        "--normalise",
        choices=("fixed", "percentile"),
        help="normalisation instead of the model's own; percentile suits images of any range",
    )
    parser.add_argument(
        "--size",
        choices=("auto", "training", "native"),
        help="training: resize images to the model's training size; native: keep their pixels; auto (default): keep "
        "them where a side is more than twice the training size's",
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="side of the tiles in which large images are predicted"
    )
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="by how much tiles overlap: the largest cell")
    parser.add_argument(
        "--min-score", type=float, metavar="S", help="leave out cells of a lower score, 0..1; default: 0, all are kept"
    )
    parser.add_argument("--pixel-size", type=float, metavar="UM", help="micrometres a pixel, for the measurements")
    parser.add_argument(
        "--keep-overlaps",
        action="store_true",
        default=None,
        help="save the masks as predicted, in several pieces and with overlaps (COCO JSON only)",
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse images of more pixels; default: 1000000000")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from kg_detectron.export.results import KINDS
    from kg_detectron.inference.many_files import Settings, predict_files

    names = ("axes", "channels", "normalise", "size", "tile", "overlap", "min_score", "pixel_size")
    names += ("keep_overlaps", "max_pixels")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "channels" in given:
        given["channels"] = tuple(given["channels"])
    if arguments.save is not None:
        kinds = [kind for value in arguments.save for kind in value.split(",")]
        given["save"] = KINDS if "all" in kinds else tuple(dict.fromkeys(kinds))
    summary = predict_files(
        arguments.inputs,
        arguments.model,
        arguments.output,
        Settings(**given),
        device=arguments.device,
        overwrite=arguments.overwrite,
        command=arguments.command_line,
        say=_say,
    )
    return _exit_status(summary)


def _add_rerun(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "rerun",
        help="repeat a prediction from its run.json",
        description="Repeat a prediction with the same model, images and settings, and get the same labels. Refused "
        "where the model or an image has changed.",
    )
    parser.add_argument("manifest", metavar="run.json", help="written by kg-detectron predict")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="folder of the results; default: beside the run's, OUT_rerun"
    )
    parser.add_argument("--device", help="default: the run's")
    parser.set_defaults(run=_rerun)


def _rerun(arguments: argparse.Namespace) -> int:
    from kg_detectron.inference.many_files import rerun

    summary = rerun(
        arguments.manifest, arguments.output, device=arguments.device, command=arguments.command_line, say=_say
    )
    return _exit_status(summary)


def _say(line: str) -> None:
    """Print above the progress bar."""
    from tqdm import tqdm

    tqdm.write(line)


def _exit_status(summary: "Summary") -> int:
    print(summary)
    for record in summary.failed:
        print(f"failed: {record.input}: {record.error}", file=sys.stderr)
    if not summary.failed:
        return 0
    return 1 if summary.done or summary.skipped else 2


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from kg_detectron.metrics.scoring import evaluate, report, write_report

    figures = evaluate(
        arguments.ground_truth,
        arguments.predictions,
        ious=arguments.iou,
        min_score=arguments.min_score,
        max_detections=arguments.max_detections,
    )
    if arguments.json is not None:
        write_report(arguments.json, figures)
    print(report(figures))
    return 0


_LAYOUT = (
    "labels: one label image an image, NAME.tif or NAME_labels.tif; cells: one file a cell, NAME/*.png, or where "
    "IMAGES and MASKS are one folder, NAME/images/*.png and NAME/masks/*.png; default: what is there"
)


def _add_check_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check-data",
        help="find what is wrong with images and their masks",
        description="List all that is wrong with a dataset, and count it by kind. Exit status 1 where anything is.",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or a COCO JSON")
    parser.add_argument("masks", metavar="MASKS", nargs="?", help="folder of their masks; none for a COCO JSON")
    parser.add_argument("--layout", choices=("labels", "cells"), help=_LAYOUT)
    parser.add_argument("--images", dest="root", metavar="DIR", help="of a COCO JSON (default: its folder)")
    parser.set_defaults(run=_check_data)


def _check_data(arguments: argparse.Namespace) -> int:
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


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "convert",
        help="make a COCO JSON for training from images and their masks",
        description="Write a COCO JSON that tools/train_net.py takes as a dataset: DATASETS.TRAIN \"('FILE.json',)\".",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, in that of the JSON or below")
    parser.add_argument("masks", metavar="MASKS", help="folder of their masks")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json", help="an existing one is replaced")
    parser.add_argument("--layout", choices=("labels", "cells"), help=_LAYOUT)
    parser.add_argument("--category", default="cell", help="name of the only category (default: cell)")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from kg_detectron.io.convert import convert

    images, cells, faults = convert(
        arguments.images, arguments.masks, arguments.output, layout=arguments.layout, category=arguments.category
    )
    for fault in faults:
        print(f"{fault.kind}: {fault}", file=sys.stderr)
    print(f"{arguments.output}: {images} images, {cells} cells")
    return 0


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from kg_detectron.inference import export_run
    from kg_detectron.io.checksum import file_sha256

    checkpoint = export_run(arguments.run_dir, arguments.output, half=arguments.half)
    print(f"{arguments.output}: the model of {checkpoint}\nSHA-256 {file_sha256(arguments.output)}")
    return 0


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="see whether everything installed works",
        description="Try PyTorch, torchvision, the compiled operators, CUDA and Detectron2, and name the command that "
        "mends what does not work. Exit status 1 where something cannot run.",
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from kg_detectron.cli.doctor import FAULT, examine

    findings = examine()
    print(*findings, sep="\n")
    return 1 if any(finding.state == FAULT for finding in findings) else 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        help="show how the boxes of these images came about, in the model of --model",
    )
    parser.add_argument("-m", "--model", help="model file, or checkpoint of tools/train_net.py, for --explain")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from kg_detectron.report import explain_image, model_names, report_dataset

    names = arguments.names or model_names(arguments.predictions)
    if len(set(names)) < len(arguments.predictions) or len(names) > len(arguments.predictions):
        raise ValueError(f"expected {len(arguments.predictions)} different names of models, got {', '.join(names)}")
    if bool(arguments.explain) != bool(arguments.model):
        raise ValueError("--explain and --model belong together: expected both or none")
    report_dataset(
        arguments.ground_truth,
        dict(zip(names, arguments.predictions, strict=True)),
        arguments.images,
        arguments.output,
        title=arguments.title,
        ious=arguments.iou,
        score=arguments.score,
        details=arguments.details,
        explanations=[explain_image(arguments.model, image) for image in arguments.explain],
        progress=sys.stderr.isatty(),
    )
    print(f"wrote {arguments.output}")
    return 0


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "explain",
        help="draw how the boxes of one image came about",
        description="Draw heatmaps, votes, peaks, groups and boxes of one image at every scale, and why groups were "
        "rejected.",
    )
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG or TIFF")
    parser.add_argument("-m", "--model", required=True, help="model file, or checkpoint of tools/train_net.py")
    parser.add_argument("-o", "--output", required=True, metavar="PNG", help="the file to write")
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from kg_detectron.io.atomic import replacing
    from kg_detectron.report import explain_image

    explanation = explain_image(arguments.model, arguments.image)
    with replacing(arguments.output) as unfinished:
        unfinished.write_bytes(explanation.png)
    print(f"wrote {arguments.output}: {explanation.text}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``kg-detectron``."""
    parser = argparse.ArgumentParser(
        prog="kg-detectron",
        description="Keypoint-graph cell instance segmentation.",
        # argparse's default formatter would join the lines of --version into a paragraph.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=versions(),
        help="print the versions of kg_detectron, PyTorch, torchvision, Detectron2 and Python, and exit",
    )
    # Each command adds itself here, with set_defaults(run=a function of the arguments that returns the exit status).
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_predict(commands)
    train.add_parser(commands)
    _add_rerun(commands)
    _add_evaluate(commands)
    _add_check_data(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_doctor(commands)
    _add_report(commands)
    _add_explain(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kg-detectron`` on ``argv`` (``sys.argv[1:]`` where None); the result is the exit status.

    0: done; 1: done in part, or the answer is bad news; 2: nothing was done, for the reason that is printed; 130:
    interrupted from the keyboard.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.command_line = shlex.join(["kg-detectron", *(sys.argv[1:] if argv is None else argv)])
    if "run" not in arguments:
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:  # what users can mend; anything else is ours, with its traceback
        print(f"kg-detectron: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kg-detectron: interrupted", file=sys.stderr)
        return 130

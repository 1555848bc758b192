"""``kg-detectron export``: make a model file of a training run, or write a model's dense part for other programs."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from kg_detectron.io.setting import SettingError

# The formats, and what the names of their files end in.
FORMATS = {
    "model": (".safetensors", ".pt", ".pth"),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "bioimageio": (".zip",),
}

# Packages that a format needs; the extra that brings them has its name.
NEEDED = {"onnx": ("onnx", "onnxscript"), "bioimageio": ("bioimageio", "onnx", "onnxscript")}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="make a model file of a training run, or write a model for other programs",
        description="Write the weights of a run of tools/train_net.py, with all that prediction needs to know of them. "
        "Or write the dense part of a model, image in and keypoint maps out, as ONNX, for torch.export.load, "
        "or as a package of bioimage.io.",
        epilog="Example: kg-detectron export nuclei -o nuclei.onnx",
    )
    parser.add_argument(
        "model",
        metavar="RUN_DIR|MODEL",
        help="a run, whose model_best.pth is taken, or else model_final.pth; a checkpoint; a model, by file or name",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="name.safetensors, .pt, .pth, .onnx, .pt2, .zip"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: as the name of the output ends")
    parser.add_argument(
        "--half", action="store_true", help="weights of 16 bits: half the size, results not quite equal"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file."""
    output = Path(arguments.output)
    form = _format(output, arguments.format)
    if form != "model" and arguments.half:
        raise SettingError(["half", "format"], f"{form} holds weights of 32 bits")
    missing = [name for name in NEEDED.get(form, ()) if find_spec(name) is None]
    if missing:
        raise SettingError("format", f"{form} needs {' and '.join(missing)}: pip install 'kg_detectron[{form}]'")

    from kg_detectron.inference.model_file import export_run, load_model, run_checkpoint
    from kg_detectron.io.checksum import file_sha256

    checkpoint = run_checkpoint(arguments.model)
    if form == "model":
        export_run(checkpoint, output, half=arguments.half)
        what = "the model"
    else:
        from kg_detectron.inference.dense_part import OPSET, save_onnx, save_program

        model, what = load_model(checkpoint), "the dense part"
        if form == "bioimageio":
            from kg_detectron.inference.bioimage_package import save_bioimage_package

            save_bioimage_package(model, output, f"kg_detectron {checkpoint.stem}")
            what = "a package of bioimage.io"
        elif form == "onnx":
            save_onnx(model, output)
            what = f"the dense part in ONNX, opset {OPSET},"
        else:
            save_program(model, output)
    print(f"{output}: {what} of {checkpoint}\nSHA-256 {file_sha256(output)}")
    return 0


def _format(output: Path, given: str | None) -> str:
    """The format of a file, which the end of its name must be of."""
    fitting = next((form for form, endings in FORMATS.items() if output.suffix in endings), None)
    if fitting is None or given not in (None, fitting):
        expected = FORMATS[given] if given else tuple(ending for endings in FORMATS.values() for ending in endings)
        raise SettingError("output", f"expected a name that ends in {', '.join(expected)}, got {output}")
    return fitting

"""``kg-detectron export``: make a model file of a training run, or write a model's dense part for other programs."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from kg_detectron.inference.run_settings import SettingError

# The formats, and what the names of their files end in.
FORMATS = {"model": (".safetensors", ".pt", ".pth"), "onnx": (".onnx",), "torch-export": (".pt2",)}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="make a model file of a training run, or ONNX of a model",
        description="Write the weights of a run of tools/train_net.py, with all that prediction needs to know of them. "
        "Or write the dense part of a model, image in and keypoint maps out, as ONNX or for torch.export.load.",
        epilog="Example: kg-detectron export nuclei -o nuclei.onnx",
    )
    parser.add_argument(
        "model",
        metavar="RUN_DIR|MODEL",
        help="a run, whose model_best.pth is taken, or else model_final.pth; a checkpoint; a model, by file or name",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="name.safetensors, name.pt, name.pth, name.onnx, name.pt2"
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
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise SettingError("format", f"onnx needs {' and '.join(missing)}: pip install 'kg_detectron[onnx]'")

    from kg_detectron.inference.model_file import export_run, load_model, run_checkpoint
    from kg_detectron.io.checksum import file_sha256

    checkpoint = run_checkpoint(arguments.model)
    if form == "model":
        export_run(checkpoint, output, half=arguments.half)
        what = "the model"
    else:
        from kg_detectron.inference.dense_part import OPSET, save_onnx, save_program

        output.parent.mkdir(parents=True, exist_ok=True)
        (save_onnx if form == "onnx" else save_program)(load_model(checkpoint), output)
        what = f"the dense part in ONNX, opset {OPSET}," if form == "onnx" else "the dense part"
    print(f"{output}: {what} of {checkpoint}\nSHA-256 {file_sha256(output)}")
    return 0


def _format(output: Path, given: str | None) -> str:
    """The format of a file, which the end of its name must be of."""
    fitting = next((form for form, endings in FORMATS.items() if output.suffix in endings), None)
    if fitting is None or given not in (None, fitting):
        expected = FORMATS[given] if given else tuple(ending for endings in FORMATS.values() for ending in endings)
        raise SettingError("output", f"expected a name that ends in {', '.join(expected)}, got {output}")
    return fitting

"""The dense part of a keypoint graph as ONNX or as a program of `torch.export`: image in, maps out.

What follows works on a varying number of cells, and stays with our operators: decoding, masks, ranking. `with_onnx`
puts a file in the place of a network's own dense part, `run_by_onnxruntime` the network's own in another form.

N, h, w: images, height and width of the network's input.
"""

import copy
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kg_detectron.inference.model_file import DESCRIPTION_KEY
from kg_detectron.io.atomic import replacing
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.modeling.backbone import STRIDES
from kg_detectron.modeling.keypoint_graph.heads import KeypointMaps

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 20  # of ONNX, which onnxruntime reads since version 1.17
INPUT = "image"
_KINDS = ("heatmap", "single_offset", "group_offset")


class DensePart(nn.Module):
    """Backbone and keypoint branch, with flat outputs.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: KeypointGraphNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, h, w), the network's input -> the maps in the order of `output_names`."""
        # The network's own, also where another library stands in for them.
        maps, crop_maps = type(self.network).maps(self.network, image)
        parts = [getattr(scale, kind) for scale in maps for kind in _KINDS]
        return (*parts, *crop_maps)


def output_names(network: KeypointGraphNet) -> list[str]:
    """``heatmap_s1`` (N, 5, h, w; logits), ``single_offset_s1`` (N, 10, h, w), ``group_offset_s1`` (N, 40, h, w), the
    same of further scales, and the maps that masks are cut from: ``c0`` .. ``c4``, or ``s1``."""
    crops = ["s1"] if network.segmentation.settings.cut_from == "s1" else [f"c{level}" for level in range(5)]
    return [f"{kind}_s{scale}" for scale in network.keypoint_branch.scales for kind in _KINDS] + crops


def export_program(model: InstanceNet) -> "ExportedProgram":
    """The dense part as a program of `torch.export`, for any number of images of any size.

    Sides are multiples of the network's divisor, 16 or 32, as `Preprocessing.batch` makes them.

    Raises:
        ValueError: a model that is no keypoint graph.
    """
    network = _checked(model)
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    shapes = {INPUT: {0: batch, 2: network.divisor * rows, 3: network.divisor * columns}}
    with torch.no_grad():
        return torch.export.export(DensePart(network).eval(), (_example(network),), dynamic_shapes=shapes)


def save_program(model: InstanceNet, path: str | Path) -> None:
    """Write the dense part for `torch.export.load`; the file appears whole or not at all.

    Raises:
        OSError, ValueError: the file cannot be written; see `export_program`.
    """
    program = export_program(model)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        torch.export.save(program, file, extra_files={DESCRIPTION_KEY: json.dumps(model.description())})


def save_onnx(model: InstanceNet, path: str | Path) -> None:
    """Write the dense part as ONNX, opset `OPSET`; the file appears whole or not at all.

    Its metadata have the model's description (preprocessing, decoding) as JSON, under ``kg_detectron``.

    Raises:
        ImportError: onnx or onnxscript is not installed (the extra ``onnx``).
        OSError, ValueError: the file cannot be written; see `export_program`.
    """
    program = export_program(model)
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=output_names(_checked(model)),
                verbose=False,
            )
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    content = exported.model_proto
    entry = content.metadata_props.add()
    entry.key, entry.value = DESCRIPTION_KEY, json.dumps(model.description())
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.SerializeToString())


def with_onnx(model: InstanceNet, path: str | Path) -> KeypointGraphNet:
    """A copy of a model whose dense part is run by onnxruntime on the CPU.

    Images that are larger than a tile still run by PyTorch: `kg_detectron.inference.tiling` calls the parts of the
    dense part one by one. So predict with a ``tile`` of the image's size.

    Args:
        model: a keypoint graph, with the weights of decoding and masks.
        path: a file of `save_onnx` of the same model.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: a model that is no keypoint graph, a file that is no dense part, or one of another model.
    """
    network = copy.deepcopy(_checked(model))
    try:
        session = _session(str(path))
    except ImportError:
        raise
    except Exception as error:  # onnxruntime's own, of many names
        raise ValueError(f"{path} cannot be read as ONNX: {error}") from error
    given = json.loads(session.get_modelmeta().custom_metadata_map.get(DESCRIPTION_KEY, "{}"))
    names = [output.name for output in session.get_outputs()]
    if names != output_names(network) or given != network.description():
        raise ValueError(f"{path} is not the dense part of this model")
    network.maps = _maps_by(session, network)  # type: ignore[method-assign, assignment]
    return network


def run_by_onnxruntime(model: InstanceNet) -> None:
    """Let onnxruntime run the dense part of a model on the CPU, in place, until its weights are loaded or trained anew.

    It takes some seconds: the dense part is traced, which needs neither onnx nor onnxscript. Larger images than a tile
    still run by PyTorch, see `with_onnx`.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: a model that is no keypoint graph.
    """
    network = _checked(model)
    names = output_names(network)
    axes = {name: {0: "batch", 2: f"rows_{name}", 3: f"columns_{name}"} for name in (INPUT, *names)}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "dense_part.onnx"))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are the same for every image, and of this way's age
            torch.onnx.export(
                DensePart(network).eval(),
                (_example(network),),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes=axes,
            )
        network.maps = _maps_by(_session(path), network)  # type: ignore[method-assign, assignment]


def _session(path: str) -> Any:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _maps_by(session: Any, network: KeypointGraphNet) -> Callable[[Tensor], tuple[list[KeypointMaps], list[Tensor]]]:
    scales = network.keypoint_branch.scales

    def maps(batch: Tensor) -> tuple[list[KeypointMaps], list[Tensor]]:
        found = [torch.from_numpy(part).to(batch) for part in session.run(None, {INPUT: batch.float().cpu().numpy()})]
        rest = iter(found)
        keypoints = [KeypointMaps(**{kind: next(rest) for kind in _KINDS}, stride=STRIDES[s - 1]) for s in scales]
        return keypoints, list(rest)

    return maps


def _example(network: KeypointGraphNet) -> Tensor:
    return torch.zeros(2, 3, 3 * network.divisor, 4 * network.divisor)


def _checked(model: InstanceNet) -> KeypointGraphNet:
    if not isinstance(model, KeypointGraphNet):
        raise ValueError(f"model: expected a keypoint graph, got the method {model.method!r}, which has no such export")
    return model.eval()

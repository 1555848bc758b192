"""A model as a package of bioimage.io: the dense part in ONNX, its preprocessing, and tensors to test it with.

Programs that read bioimage.io run the network; decoding and masks stay with `kg_detectron`. The format is that of the
package bioimageio.spec, https://github.com/bioimage-io/spec-bioimage-io, version 0.5.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from kg_detectron._version import __version__
from kg_detectron.inference.dense_part import INPUT, OPSET, DensePart, output_names, save_onnx
from kg_detectron.io.atomic import replacing
from kg_detectron.modeling import InstanceNet, KeypointGraphNet
from kg_detectron.modeling.backbone import STRIDES
from kg_detectron.synthetic import nuclei_image

PAPER = "Yi et al.: Multi-scale Cell Instance Segmentation with Keypoint Graph Based Bounding Boxes, MICCAI 2019"
PAPER_DOI = "10.1007/978-3-030-32239-7_41"
# Added to the range of the levels, as bioimageio.core does, so that an image of one level is no division by zero.
EPSILON = 1e-6
_TEST_SIDE, _TEST_CELLS = 128, 6
_COVER_SIZE = (512, 256)  # width and height, of which bioimage.io asks for 2 to 1


_OF_STAINS = """
Of sections in haematoxylin and eosin kg_detectron also shows the network a grey image of the density of haematoxylin,
dark on bright, and takes the view in which it expects more cells; here the user has to."""
_OF_DYES = """
Of pictures of several dyes in fluorescence kg_detectron also shows the network each colour alone, as a grey image, and
takes the one in which it is surest of the cells; here the user has to."""


def save_bioimage_package(model: InstanceNet, path: str | Path, name: str) -> None:
    """Write a model as a package of bioimage.io, a zip file, which appears whole or not at all.

    The package takes raw images (1, 3, h, w), channels blue, green, red, sides multiples of the network's divisor, at
    the scale of a prediction: cells of about ``model.preprocessing.predicted_diameter`` pixels.

    Args:
        model: a keypoint graph with percentile normalisation; bioimage.io has no words for the other.
        path: the zip file.
        name: of the model, letters, digits, spaces and ``_+-()``.

    Raises:
        ImportError: bioimageio.core or onnx is not installed (the extra ``bioimageio``).
        OSError, ValueError: the file cannot be written; a model that is no such keypoint graph; a bad name.
    """
    save: Any = importlib.import_module("bioimageio.spec").save_bioimageio_package
    if not isinstance(model, KeypointGraphNet):
        raise ValueError(f"model: expected a keypoint graph, got the method {model.method!r}")
    if model.preprocessing.normalisation != "percentile":
        raise ValueError(f"model: expected percentile normalisation, got {model.preprocessing.normalisation!r}")
    with tempfile.TemporaryDirectory() as folder:
        described = _described(model, Path(folder), name)
        with replacing(path) as unfinished:
            save(described, output_path=unfinished, allow_invalid=False)


def preprocessed(model: InstanceNet, image: np.ndarray) -> np.ndarray:
    """What the package makes of an image (1, 3, h, w): the steps of `_steps`, float32."""
    low, high = np.percentile(image, model.preprocessing.percentiles, axis=(2, 3), keepdims=True)
    levels = np.clip((image.astype(np.float32) - low) / (high - low + EPSILON), 0, 1)
    gain, offset = _gain_and_offset(model)
    return (levels * gain + offset).astype(np.float32)


def _gain_and_offset(model: InstanceNet) -> tuple[float, float]:
    """Of levels in 0..1; the network's mean and deviation are those of levels in 0..255."""
    mean, std = model.preprocessing.pixel_mean, model.preprocessing.pixel_std
    if len({*mean}) > 1 or len({*std}) > 1:
        raise ValueError(f"model: expected equal means and deviations of the channels, got {mean} and {std}")
    return 255 / std[0], -mean[0] / std[0]


def _described(model: KeypointGraphNet, folder: Path, name: str) -> Any:
    """The description of bioimageio.spec, with its files in a folder."""
    spec: Any = importlib.import_module("bioimageio.spec.model.v0_5")
    save_onnx(model, folder / "dense_part.onnx")
    (folder / "README.md").write_text(_readme(model, name), encoding="utf-8")
    image, _ = nuclei_image(np.random.default_rng(0), _TEST_SIDE, _TEST_SIDE, _TEST_CELLS)
    given = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
    with torch.no_grad():
        results = DensePart(model)(torch.from_numpy(preprocessed(model, given)))
    np.save(folder / "image.npy", given)
    cv2.imwrite(str(folder / "cover.png"), cv2.resize(image, _COVER_SIZE, interpolation=cv2.INTER_CUBIC))
    outputs = []
    for output, result in zip(output_names(model), results, strict=True):
        np.save(folder / f"{output}.npy", result.numpy())
        stride = _TEST_SIDE / result.shape[-1]
        axes: list[Any] = [spec.BatchAxis(), _channels(spec, result.shape[1])]
        for axis in ("y", "x"):
            size = spec.SizeReference(tensor_id=spec.TensorId(INPUT), axis_id=spec.AxisId(axis))
            axes.append(spec.SpaceOutputAxis(id=spec.AxisId(axis), size=size, scale=stride))
        outputs.append(
            spec.OutputTensorDescr(
                id=spec.TensorId(output),
                description=_meaning(output, stride),
                axes=axes,
                test_tensor=spec.FileDescr(source=folder / f"{output}.npy"),
                data=spec.IntervalOrRatioDataDescr(type="float32"),
            )
        )
    return spec.ModelDescr(
        name=name,
        description="Keypoint graph for cells: heatmaps and offsets of five keypoints a cell, and features of masks",
        authors=[spec.Author(name="The authors of kg_detectron")],
        cite=[spec.CiteEntry(text=PAPER, doi=PAPER_DOI)],
        license=spec.LicenseId("Apache-2.0"),
        documentation=spec.FileDescr(source=folder / "README.md"),
        covers=[spec.FileDescr(source=folder / "cover.png")],
        tags=["instance-segmentation", "nuclei", "cells", "2d", "keypoint-graph"],
        inputs=[
            spec.InputTensorDescr(
                id=spec.TensorId(INPUT),
                description="blue, green, red; a grey image three times",
                axes=[
                    spec.BatchAxis(),
                    spec.ChannelAxis(channel_names=[spec.Identifier(c) for c in ("blue", "green", "red")]),
                    *(_side(spec, axis, model.divisor) for axis in ("y", "x")),
                ],
                test_tensor=spec.FileDescr(source=folder / "image.npy"),
                data=spec.IntervalOrRatioDataDescr(type="uint8"),
                preprocessing=_steps(spec, model),
            )
        ],
        outputs=outputs,
        weights=spec.WeightsDescr(onnx=spec.OnnxWeightsDescr(source=folder / "dense_part.onnx", opset_version=OPSET)),
    )


def _side(spec: Any, axis: str, divisor: int) -> Any:
    return spec.SpaceInputAxis(id=spec.AxisId(axis), size=spec.ParameterizedSize(min=2 * divisor, step=divisor))


def _channels(spec: Any, count: int) -> Any:
    return spec.ChannelAxis(channel_names=[spec.Identifier(f"channel{number}") for number in range(count)])


def _steps(spec: Any, model: InstanceNet) -> list[Any]:
    """The preprocessing in the words of bioimage.io."""
    low, high = model.preprocessing.percentiles
    gain, offset = _gain_and_offset(model)
    axes = [spec.AxisId("y"), spec.AxisId("x")]
    levels = spec.ScaleRangeKwargs(axes=axes, min_percentile=low, max_percentile=high, eps=EPSILON)
    return [
        spec.EnsureDtypeDescr(kwargs=spec.EnsureDtypeKwargs(dtype="float32")),
        spec.ScaleRangeDescr(kwargs=levels),
        spec.ClipDescr(kwargs=spec.ClipKwargs(min=0.0, max=1.0)),
        spec.ScaleLinearDescr(kwargs=spec.ScaleLinearKwargs(gain=gain, offset=offset)),
        spec.EnsureDtypeDescr(kwargs=spec.EnsureDtypeKwargs(dtype="float32")),
    ]


def _meaning(output: str, stride: float) -> str:
    meanings = {
        "heatmap": "logits of the keypoints: four corners and the centre",
        "single": "offset of each keypoint from its pixel (x, y)",
        "group": "displacements between the keypoints of a cell (x, y)",
    }
    what = meanings.get(output.split("_")[0], "features that masks are cut from")
    return f"{what}; stride {stride:g}"


def _readme(model: KeypointGraphNet, name: str) -> str:
    stains = _OF_STAINS if model.preprocessing.haematoxylin else ""
    stains += _OF_DYES if model.preprocessing.single_colours else ""
    strides = ", ".join(f"s{scale} has stride {STRIDES[scale - 1]}" for scale in model.keypoint_branch.scales)
    return f"""# {name}

The dense part of a keypoint-graph network for cells, written by kg_detectron {__version__} ({PAPER}).

Resize the image so that a typical cell has a diameter of {model.preprocessing.predicted_diameter:g} pixels, and pad its
sides to multiples of {model.divisor}.{stains} The outputs are keypoint maps at several scales ({strides}) and features.
Boxes and masks come of them by kg_detectron: `kg-detectron predict`.

## Validation

The figures of the kept models stand in the file README.md beside them in the package kg_detectron.
"""

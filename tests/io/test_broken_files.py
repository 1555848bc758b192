"""Valid files, broken in any way: every reader says so by a ValueError or OSError that names the file, or reads on.

The corpus is made here, and broken by hypothesis: bytes changed, cut, repeated; parts of JSON replaced by others.
"""

import copy
import io
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import prepare_dsb2018
import pytest
import tifffile
import torch
from builders import tiny_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kg_detectron import load_model
from kg_detectron.inference import save_model
from kg_detectron.inference.manifest import FileRecord, Manifest
from kg_detectron.inference.many_files import rerun
from kg_detectron.io.cell_sets import read_cells, read_predictions
from kg_detectron.io.coco import coco_annotation, load_coco, read_coco
from kg_detectron.io.images import read_pages
from kg_detectron.io.labels import read_label_image
from kg_detectron.io.safe_load import read_checkpoint

MASK = np.pad(np.ones((4, 5), bool), 2)
MAX_PIXELS = 10**6  # what a broken header may claim, so that the test stays small
broken = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_zip(path: Path) -> None:
    with prepare_dsb2018.open_download(path) as (names, read):
        for name in names:
            read(name)


def read_weights(path: Path) -> None:
    """As every tool does that copies them."""
    for value in read_checkpoint(path).get("model", {}).values():
        value.clone()


@cache
def corpus() -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """Valid files, each with its reader, by file name."""
    rng = np.random.default_rng(0)
    colour, grey = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8), rng.integers(0, 2**16, (12, 15), dtype=np.uint16)

    def tiff(image: np.ndarray, **options: Any) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, image, **options)
        return buffer.getvalue()

    def pages(path: Path) -> None:
        read_pages(path, max_pixels=MAX_PIXELS)

    image_files = {
        "colour.png": cv2.imencode(".png", colour)[1].tobytes(),
        "grey.png": cv2.imencode(".png", grey)[1].tobytes(),
        "colour.jpg": cv2.imencode(".jpg", colour)[1].tobytes(),
        "grey.tif": tiff(grey),
        "zlib.tif": tiff(colour, compression="zlib", photometric="rgb"),
        "stack.tif": tiff(np.stack([grey] * 3), imagej=True, metadata={"axes": "ZYX"}),
        "stack.ome.tif": tiff(np.stack([grey] * 3), ome=True, metadata={"axes": "ZYX"}),
        "tiles.tif": tiff(grey, tile=(16, 16), compression="lzma"),
        "lzw.tif": tiff(colour, photometric="rgb", compression="lzw", predictor=True),
        "zstd.tif": tiff(grey, compression="zstd"),
        "png.tif": tiff(colour, photometric="rgb", compression="png"),
        "jpeg.tif": tiff(colour, photometric="rgb", compression="jpeg"),
        "jpeg2000.tif": tiff(grey, compression="jpeg2000"),
        "jpegxl.tif": tiff(colour, photometric="rgb", compression="jpegxl"),
    }
    made = {name: (data, pages) for name, data in image_files.items()}
    made |= {
        "labels.png": (cv2.imencode(".png", MASK.astype(np.uint16))[1].tobytes(), read_label_image),
        "labels.tif": (tiff(MASK.astype(np.uint16), compression="zlib"), read_label_image),
    }
    zipped, weights = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/images/a.png", image_files["colour.png"])
        archive.writestr("a/masks/m.png", image_files["grey.png"])
    torch.save({"model": {"a": torch.ones(3, 4), "b": torch.ones(5)}, "iteration": 3}, weights)
    return made | {"download.zip": (zipped.getvalue(), read_zip), "weights.pth": (weights.getvalue(), read_weights)}


def survives(read: Callable[[Path], Any], path: Path) -> None:
    """The reader reads the file, or names it in an error that is meant for users."""
    try:
        read(path)
    except (ValueError, OSError) as error:
        assert path.name in str(error), f"{error!r} does not name the file"


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        match draw(st.sampled_from(["set", "set", "set", "number", "cut", "repeat", "remove"])):
            case "set" if changed:
                changed[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, changed[place] ^ 1]))
            case "number":
                changed[place : place + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)]))
            case "cut":
                del changed[place:]
            case "repeat":
                changed[place:place] = changed[place : place + 20]
            case "remove":
                del changed[place : place + 5]
    return bytes(changed)


@pytest.mark.parametrize("name", corpus())
def test_the_corpus_is_sound(tmp_path: Path, name: str):
    data, read = corpus()[name]
    (tmp_path / name).write_bytes(data)
    read(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", corpus())
@broken
@given(data=st.data())
def test_broken_files(tmp_path: Path, name: str, data: st.DataObject):
    valid, read = corpus()[name]
    (tmp_path / name).write_bytes(data.draw(damages(valid)))
    survives(read, tmp_path / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    model = tiny_network(c0_channels=2, widths=(2, 2, 2, 2), head_kernel=1, cut_from="s1")
    for name in ("model.pth", "model.safetensors"):
        save_model(model, folder / name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@settings(broken, max_examples=8)
@given(data=st.data())
def test_broken_models(tmp_path: Path, models: dict[str, bytes], name: str, data: st.DataObject):
    """Broken where the description and the names stand: at the beginning and the end."""
    valid = models[name]
    head, tail = data.draw(damages(valid[:4000])), data.draw(damages(valid[-4000:]))
    (tmp_path / name).write_bytes(head + valid[4000:-4000] + tail)
    survives(load_model, tmp_path / name)


# JSON

# The integer is beyond any float; NaN is no JSON, but Python reads it.
ODD = [None, True, -1, 0, 2, 10**400, 1e300, float("nan"), "", "x", "../x", "\0", [], {}, [[]], [1, "x"]]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    own = [path]
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        own += [place for key, part in items for place in places(part, (*path, key))]
    return own


@st.composite
def replacements(draw: st.DrawFn, valid: Any) -> Any:
    """The value with one or two parts replaced, removed or doubled."""
    changed = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(st.sampled_from(places(changed)[1:] or [("",)]))
        node = changed
        for key in above:
            node = node[key]
        if not isinstance(node, (dict, list)) or last == "":
            continue
        match draw(st.sampled_from(["replace", "replace", "remove", "double"])):
            case "replace":
                node[last] = draw(st.sampled_from(ODD))
            case "remove":
                del node[last]
            case "double" if isinstance(node, list):
                node.append(node[last])
    return changed


def dataset() -> dict:
    images = [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 9} for i in (1, 2)]
    annotations = [coco_annotation(MASK, image_id=i, annotation_id=i) | {"score": 0.5} for i in (1, 2)]
    annotations[1]["segmentation"] = [[2, 2, 7, 2, 7, 6, 2, 6]]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}


def manifest(folder: Path) -> dict:
    record = FileRecord("a.png", "a", "0" * 64, (8, 9), 1, "own pixels", 3, 0.5, ["a_labels.tif"])
    Manifest("predict", "model.pth", "0" * 64, "cpu", {"tile": 64}, files={"a": record}).write(folder)
    return json.loads((folder / "run.json").read_text())


@broken
@given(data=st.data())
def test_broken_datasets(tmp_path: Path, data: st.DataObject):
    for name in ("1.png", "2.png"):
        (tmp_path / name).touch()
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data.draw(replacements(dataset()))))
    survives(lambda path: load_coco(path, tmp_path), path)
    survives(lambda path: read_coco(path, tmp_path), path)
    survives(read_cells, path)


@broken
@given(data=st.data())
def test_broken_results(tmp_path: Path, data: st.DataObject):
    (tmp_path / "truth.json").write_text(json.dumps(dataset()))
    truth = read_cells(tmp_path / "truth.json")
    for valid in (dataset(), dataset()["annotations"]):
        (tmp_path / "found.json").write_text(json.dumps(data.draw(replacements(valid))))
        survives(lambda path: read_predictions(path, truth), tmp_path / "found.json")


@broken
@given(data=st.data())
def test_broken_manifests(tmp_path: Path, data: st.DataObject):
    valid = manifest(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(data.draw(replacements(valid))))
    survives(Manifest.read, tmp_path / "run.json")
    with pytest.raises((ValueError, OSError)):  # at the latest because there is no such model
        rerun(tmp_path / "run.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{", b"null", b"1" * 5000])
def test_what_is_no_json(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    for read in (read_cells, lambda path: read_coco(path, tmp_path), Manifest.read):
        with pytest.raises(ValueError, match=r"bad\.json"):
            read(path)

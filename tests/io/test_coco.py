"""COCO masks and datasets."""

import copy
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pycocotools import mask as coco_mask

from kg_detectron.io.coco import (
    coco_annotation,
    decode_mask,
    decode_runs,
    encode_mask,
    load_coco,
    read_coco,
    rewrite,
    write_coco,
    write_split,
)
from kg_detectron.io.fault import Severity
from kg_detectron.io.images import read_image
from kg_detectron.io.relative_path import checked_relative_path

MASKS = npst.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def runs_of(mask: np.ndarray) -> list[int]:
    """Uncompressed COCO counts, column by column, pixel by pixel."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@given(MASKS)
def test_encode_and_decode(mask: np.ndarray):
    rle = encode_mask(mask)
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(decode_mask(rle, *mask.shape), mask)
    np.testing.assert_array_equal(decode_mask(rle | {"counts": rle["counts"].encode()}, *mask.shape), mask)
    np.testing.assert_array_equal(np.cumsum(decode_runs(rle["counts"])), np.cumsum(runs_of(mask)))
    uncompressed = {"size": list(mask.shape), "counts": runs_of(mask)}
    np.testing.assert_array_equal(decode_mask(uncompressed, *mask.shape), mask)


def test_decode_long_runs():
    mask = np.zeros((1500, 2000), bool)
    mask[3:1400, 5:1990] = True
    mask[700, 100:900] = False
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), *mask.shape), mask)


def test_decode_polygons():
    polygons = [[1, 2, 5, 2, 5, 6, 1, 6], [7.0, 0.0, 9.0, 0.0, 9.0, 3.0, 7.0, 3.0]]
    expected = np.zeros((8, 10), bool)
    expected[2:6, 1:5] = True
    expected[0:3, 7:9] = True
    np.testing.assert_array_equal(decode_mask(polygons, 8, 10), expected)


@pytest.mark.parametrize("mask", [np.zeros((3, 4), np.uint8), np.zeros((0, 4), bool), np.zeros((1, 3, 4), bool)])
def test_encode_refuses(mask: np.ndarray):
    with pytest.raises(ValueError, match="mask must be a bool array"):
        encode_mask(mask)


@pytest.mark.parametrize("segmentation", [None, [], {}, {"size": [3, 4]}, {"size": [3, 4], "counts": ""}, "mask", 7])
def test_decode_without_mask(segmentation: object):
    with pytest.raises(ValueError, match="has no mask"):
        decode_mask(segmentation, 3, 4)


GOOD = encode_mask(np.eye(3, 4, dtype=bool))["counts"]


@pytest.mark.parametrize(
    "counts",
    [
        GOOD[:-1],
        GOOD + "1",
        "\x00",
        "0",
        "zz",
        "P" * 40 + "0",
        "é",
        "o" * 100,
        [5],
        [5, 8],
        [-1, 13],
        [[12]],
        [0.5, 11.5],
    ]
    + [[12, 2**63 - 1, 2**63 - 1, 2], {"a": 1}, 5],
)
def test_decode_corrupt(counts: object):
    with pytest.raises(ValueError, match="corrupt"):
        decode_mask({"size": [3, 4], "counts": counts}, 3, 4)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), min_size=1, max_size=12))
def test_decode_nonsense_never_crashes(counts: str):
    """pycocotools on its own writes beyond its memory for such strings."""
    try:
        mask = decode_mask({"size": [5, 6], "counts": counts}, 5, 6)
    except ValueError:
        return
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), 5, 6), mask)


def test_decode_other_size():
    with pytest.raises(ValueError, match=r"size \[3, 4\], expected that of its image, \[4, 3\]"):
        decode_mask(encode_mask(np.ones((3, 4), bool)), 4, 3)


@given(MASKS)
def test_annotation(mask: np.ndarray):
    if not mask.any():
        with pytest.raises(ValueError, match="annotation 5 is empty"):
            coco_annotation(mask, image_id=3, annotation_id=5)
        return
    annotation = coco_annotation(mask, image_id=3, annotation_id=5, category_id=2)
    rows, columns = np.nonzero(mask)
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    assert annotation == {
        "id": 5,
        "image_id": 3,
        "category_id": 2,
        "segmentation": encode_mask(mask),
        "bbox": [columns.min(), rows.min(), width, height],
        "area": mask.sum(),
        "iscrowd": 0,
    }
    json.dumps(annotation)


def test_write_is_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "set.json"
    write_coco(path, [], [], [{"id": 1, "name": "cell"}], "first")
    before = path.read_bytes()
    for unwritable, error in ((object(), TypeError), (float("nan"), ValueError)):
        with pytest.raises(error):
            write_coco(path, [{"id": unwritable}], [], [], "second")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# A small sound dataset, and every way to spoil it.


@pytest.fixture
def dataset(tmp_path: Path) -> dict:
    """Two images, the second without cells; written to tmp_path by :func:`load`."""
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 2:6, 3:9] = True
    masks[1, 10:20, 25:30] = True
    image = np.zeros((20, 30, 3), np.uint8)
    samples = [("a", image, masks), ("b", image, [])]
    assert write_split(tmp_path, "train", samples, category="cell", description="test") == [2, 0]
    return json.loads((tmp_path / "instances_train.json").read_text())


def load(folder: Path, data: dict):
    (folder / "instances_train.json").write_text(json.dumps(data))
    return load_coco(folder / "instances_train.json", folder / "train")


def cell_of(annotation: dict, **fields: object) -> dict:
    return {"id": annotation["id"], "segmentation": annotation["segmentation"], "iscrowd": 0, **fields}


def test_load(tmp_path: Path, dataset: dict):
    dataset["categories"] = [{"id": 7, "name": "neuron"}, {"id": 1, "name": "cell"}]
    dataset["annotations"][1]["category_id"] = 7
    loaded = load(tmp_path, dataset)
    first, second = dataset["annotations"]
    assert loaded.category_names == ["cell", "neuron"]
    assert loaded.category_ids == [1, 7]
    assert loaded.records == [
        {
            "file_name": str(tmp_path / "train" / "a.png"),
            "image_id": 1,
            "height": 20,
            "width": 30,
            "annotations": [
                cell_of(first, bbox=[3, 2, 6, 4], category_id=0),
                cell_of(second, bbox=[25, 10, 5, 10], category_id=1),
            ],
        },
        {
            "file_name": str(tmp_path / "train" / "b.png"),
            "image_id": 2,
            "height": 20,
            "width": 30,
            "annotations": [],
        },
    ]


def test_load_polygons_and_uncompressed(tmp_path: Path, dataset: dict):
    expected = load(tmp_path, dataset).records[0]["annotations"]
    dataset["annotations"][0]["segmentation"] = [[3, 2, 9, 2, 9, 6, 3, 6]]
    dataset["annotations"][1]["segmentation"]["counts"] = runs_of(decode_mask(expected[1]["segmentation"], 20, 30))
    for got, want in zip(load(tmp_path, dataset).records[0]["annotations"], expected, strict=True):
        assert got["bbox"] == want["bbox"]
        np.testing.assert_array_equal(
            decode_mask(got["segmentation"], 20, 30), decode_mask(want["segmentation"], 20, 30)
        )


def spoil(*path: object, value: object = None, drop: bool = False):
    def apply(data: dict) -> None:
        *parents, last = path
        for key in parents:
            data = data[key]
        if drop:
            del data[last]
        else:
            data[last] = value

    return apply


FIRST = ("annotations", 0)
EMPTY = encode_mask(np.zeros((20, 30), bool))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (spoil("images", drop=True), "expected a list under 'images', got NoneType"),
        (spoil("annotations", value={}), "expected a list under 'annotations', got dict"),
        (spoil("images", 0, value=3), r"images\[0\]: expected an object with an integer 'id', got 3"),
        (spoil(*FIRST, "id", drop=True), r"annotations\[0\]: expected an object with an integer 'id'"),
        (spoil("images", 1, "id", value="2"), r"images\[1\]: expected an object with an integer 'id'"),
        (spoil("images", 0, "file_name", drop=True), r"images\[0\] of id 1: missing key 'file_name'"),
        (spoil(*FIRST, "segmentation", drop=True), "annotation 1: missing key 'segmentation'"),
        (spoil(*FIRST, "area", drop=True), "annotation 1: missing key 'area'"),
        (spoil("categories", 0, "name", drop=True), r"categories\[0\] of id 1: missing key 'name'"),
        (spoil("images", 1, "id", value=1), r"images\[1\]: duplicate id 1"),
        (spoil("annotations", 1, "id", value=1), r"annotations\[1\]: duplicate id 1"),
        (spoil("images", 0, "file_name", value="../a.png"), r"image 1: refused the file name '\.\./a\.png'"),
        (spoil("images", 0, "file_name", value="/a.png"), "image 1: refused the file name '/a.png'"),
        (spoil("images", 0, "file_name", value=5), "image 1: expected a file name, got 5"),
        (spoil("images", 0, "height", value="20"), "image 1: height must be a positive integer, got '20'"),
        (spoil("images", 0, "width", value=0), "image 1: width must be a positive integer, got 0"),
        (spoil(*FIRST, "image_id", value=9), "annotation 1: unknown image_id 9"),
        (spoil(*FIRST, "image_id", value=[1]), r"annotation 1: unknown image_id \[1\]"),
        (spoil(*FIRST, "category_id", value=0), "annotation 1: unknown category_id 0"),
        (spoil(*FIRST, "segmentation", value=[]), "annotation 1: it has no mask"),
        (spoil(*FIRST, "segmentation", value=None), "annotation 1: it has no mask"),
        (spoil(*FIRST, "segmentation", "size", value=[30, 20]), r"annotation 1: its mask has size \[30, 20\]"),
        (spoil("images", 0, "height", value=21), r"annotation 1: its mask has size .* expected .* \[21, 30\]"),
        (spoil(*FIRST, "segmentation", "counts", value="0"), "annotation 1: its mask is corrupt"),
        (spoil(*FIRST, "segmentation", "counts", value="o"), "annotation 1: counts are corrupt"),
        (spoil(*FIRST, "segmentation", value=EMPTY), "annotation 1: its mask is empty"),
        (spoil(*FIRST, "segmentation", value=[[3, 2, 9, 2]]), "annotation 1: a polygon must be"),
        (spoil(*FIRST, "segmentation", value=[3, 2, 9, 2, 9, 6]), "annotation 1: a polygon must be"),
        (
            spoil(*FIRST, "segmentation", value=[[3, 2, 151, 2, 9, 6]]),
            "annotation 1: its polygon reaches 121 pixels outs",
        ),
        (
            spoil(*FIRST, "segmentation", value=[[3, 2, 9, 2, 9, -81]]),
            "annotation 1: its polygon reaches 81 pixels outs",
        ),
        (
            spoil(*FIRST, "segmentation", value=[[33, 2, 39, 2, 39, 6]]),
            "annotation 1: its mask is empty, or lies outside",
        ),
        (spoil(*FIRST, "bbox", value=[3, 2, 6]), r"annotation 1: bbox must be \[x, y, width, height\]"),
        (spoil(*FIRST, "bbox", value=[3, 2, 0, 4]), "annotation 1: bbox must be .* got"),
        (spoil(*FIRST, "bbox", value=[3, 2, float("nan"), 4]), "annotation 1: bbox must be .* nan"),
        (spoil(*FIRST, "bbox", value=[-1, 2, 6, 4]), r"annotation 1: bbox .* is outside its image of width 30"),
        (spoil("annotations", 1, "bbox", value=[25, 10, 6, 10]), "annotation 2: bbox .* is outside its image"),
        (spoil("annotations", 1, "bbox", value=[25, 10, 5, 11]), "annotation 2: bbox .* is outside its image"),
        (spoil(*FIRST, "bbox", value=[9, 2, 6, 4]), "annotation 1: bbox .* is not the box of its mask"),
        (spoil(*FIRST, "iscrowd", value="no"), "annotation 1: iscrowd must be 0 or 1, got 'no'"),
    ],
)
def test_load_refuses(tmp_path: Path, dataset: dict, fault, message: str):
    spoilt = copy.deepcopy(dataset)
    fault(spoilt)
    with pytest.raises(ValueError, match=r"instances_train\.json: " + message):
        load(tmp_path, spoilt)


def test_polygons_are_cut_at_the_image_as_pycocotools_does(tmp_path: Path, dataset: dict):
    """Whether the box is that of the whole polygon or of what is left of it."""
    polygon = [-4.0, 2, 9, 2, 9, 26.5, -4, 26.5]
    for box in ([-4.0, 2, 13, 24.5], [0, 2, 9, 18]):
        dataset["annotations"][0] |= {"segmentation": [polygon], "bbox": box}
        cell = load(tmp_path, dataset).records[0]["annotations"][0]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 20, 30)))
        np.testing.assert_array_equal(decode_mask(cell["segmentation"], 20, 30), expected)
        assert cell["bbox"] == [0, 2, 9, 18] and expected.sum() == 9 * 18


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_of_windows(tmp_path: Path, dataset: dict, encoding: str):
    (tmp_path / "train" / "plate 1").mkdir()
    (tmp_path / "train" / "a.png").rename(tmp_path / "train" / "plate 1" / "ä.png")
    dataset["images"][0]["file_name"] = "plate 1\\ä.png"
    (tmp_path / "windows.json").write_text(json.dumps(dataset, ensure_ascii=False), encoding=encoding)
    records = load_coco(tmp_path / "windows.json", tmp_path / "train").records
    assert records[0]["file_name"] == str(tmp_path / "train" / "plate 1" / "ä.png")


def test_names_that_differ_in_case_only_are_named(tmp_path: Path, dataset: dict):
    dataset["images"][0]["file_name"] = "A.PNG"
    (tmp_path / "set.json").write_text(json.dumps(dataset))
    _, (fault,) = read_coco(tmp_path / "set.json", tmp_path / "train")
    assert str(fault).endswith(
        "A.PNG: there is no such file, but a.png, whose name differs in upper and lower case only; rename one of them"
    )


def test_what_a_file_lacks_is_derived(tmp_path: Path, dataset: dict):
    expected = load(tmp_path, dataset).records
    for annotation in dataset["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["bbox"], annotation["id"]
    (tmp_path / "set.json").write_text(json.dumps(dataset))
    loaded, faults = read_coco(tmp_path / "set.json", tmp_path / "train")
    assert {fault.severity for fault in faults} == {Severity.HARMLESS}
    assert rewrite(loaded, tmp_path / "train" / "new.json", tmp_path / "train", "mended") == (2, 2)
    assert load_coco(tmp_path / "train" / "new.json", tmp_path / "train").records == expected


def test_rewriting_numbers_annotations_and_drops_what_is_not_used(tmp_path: Path, dataset: dict):
    dataset["categories"] = [{"id": 0, "name": "cells"}, {"id": 5, "name": "cell"}]
    crowd = copy.deepcopy(dataset["annotations"][0]) | {"iscrowd": 1}
    for annotation in dataset["annotations"]:
        annotation |= {"id": 0, "category_id": 5}
    dataset["annotations"].append(crowd | {"category_id": 0})
    (tmp_path / "set.json").write_text(json.dumps(dataset))
    loaded, faults = read_coco(tmp_path / "set.json", tmp_path / "train")
    assert [str(fault) for fault in faults] == ["annotations[1]: duplicate id 0; kg-detectron convert renumbers"]
    rewrite(loaded, tmp_path / "train" / "new.json", tmp_path / "train", "mended")
    written = json.loads((tmp_path / "train" / "new.json").read_text())
    assert written["categories"] == [{"id": 5, "name": "cell"}]
    assert [(one["id"], one["category_id"]) for one in written["annotations"]] == [(1, 5), (2, 5)]


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"[]", b"\xff\xfe{}"])
def test_load_corrupt_json(tmp_path: Path, content: bytes):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json: (corrupt JSON|expected a COCO dataset)"):
        load_coco(tmp_path / "bad.json", tmp_path)


def test_load_missing_files(tmp_path: Path, dataset: dict):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_coco(tmp_path / "none.json", tmp_path)
    dataset["images"] += [{"id": i, "file_name": f"{i}.png", "height": 1, "width": 1} for i in range(10, 15)]
    with pytest.raises(FileNotFoundError, match=r"5 of 7 images are missing: .*10\.png, .*11\.png, .*12\.png, \.\.\."):
        load(tmp_path, dataset)


@pytest.mark.parametrize(
    "name", ["/a", "../a", "a/../b", "a/..", "C:/a", "C:a", "\\a", "..\\a", "//host/share/a", "", None]
)
def test_unsafe_names(name: object):
    with pytest.raises(ValueError, match="file name"):
        checked_relative_path(name)


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "..a/b..png", "./a.png"])
def test_safe_names(name: str):
    assert checked_relative_path(name) == Path(name)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_set(shared: Path, split: str):
    folder = shared / "dsb2018"
    start = time.process_time()
    loaded = load_coco(folder / f"instances_{split}.json", folder / split)
    assert time.process_time() - start < 10  # about one second
    data = json.loads((folder / f"instances_{split}.json").read_text())
    assert loaded.category_names == ["nucleus"]
    assert [record["image_id"] for record in loaded.records] == [image["id"] for image in data["images"]]
    annotations = [annotation for record in loaded.records for annotation in record["annotations"]]
    for got, annotation in zip(annotations, data["annotations"], strict=True):
        assert got["bbox"] == annotation["bbox"]
        assert got["segmentation"] == annotation["segmentation"]
    for record in loaded.records[:10]:
        image = read_image(record["file_name"])
        assert image.shape == (record["height"], record["width"], 3)
        np.testing.assert_array_equal(image, cv2.imread(record["file_name"]))

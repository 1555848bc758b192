"""``kg-detectron check-data`` and ``convert``: every fault is named, and sound data becomes a COCO dataset."""

import copy
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from kg_detectron.cli.main import main
from kg_detectron.io import fault
from kg_detectron.io.coco import decode_mask, load_coco
from kg_detectron.io.convert import convert
from kg_detectron.io.dataset_check import check_coco, check_masks
from kg_detectron.io.labels import write_label_image

SIZE = 24, 32


def image(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def labels() -> np.ndarray:
    """Three cells with gaps between their numbers."""
    pixels = np.zeros(SIZE, np.uint16)
    pixels[2:6, 3:9] = 1
    pixels[10:14, 20:24] = 300
    pixels[23, 31] = 5
    return pixels


@pytest.fixture
def label_set(tmp_path: Path) -> Path:
    """images/{a,b}.png and images/well/c.png with masks/*_labels.tif."""
    for seed, name in enumerate(("a", "b", "well/c")):
        write_image(tmp_path / "images" / f"{name}.png", image(seed))
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        write_label_image(tmp_path / "masks" / f"{name}_labels.tif", labels())
    return tmp_path


@pytest.fixture
def cell_set(tmp_path: Path) -> Path:
    """The Data Science Bowl's layout: raw/{a,b}/images/*.png, raw/{a,b}/masks/*.png."""
    for seed, name in enumerate("ab"):
        write_image(tmp_path / "raw" / name / "images" / f"{name}.png", image(seed))
        for number in (1, 5, 300):
            write_image(tmp_path / "raw" / name / "masks" / f"{number}.png", (labels() == number) * np.uint8(255))
    return tmp_path


def found(faults: list[fault.Fault]) -> list[tuple[str, str]]:
    return [(one.kind, Path(one.where).name) for one in faults]


def test_sound_data_has_no_fault(label_set, cell_set, capsys):
    assert check_masks(label_set / "images", label_set / "masks") == ([], 3)
    assert check_masks(cell_set / "raw", cell_set / "raw") == ([], 2)
    assert main(["check-data", str(label_set / "images"), str(label_set / "masks")]) == 0
    assert capsys.readouterr().out == "3 images looked at: no faults\n"


def spoil_labels(folder: Path) -> dict[str, str]:
    """Put a fault of every kind into a set of label images; the kind by the name of the file that it is found in."""
    images, masks = folder / "images", folder / "masks"

    def add(name: str, mask: np.ndarray | None, pixels: np.ndarray | None = None) -> None:
        write_image(images / f"{name}.png", image(len(name) + 100) if pixels is None else pixels)
        if mask is not None:
            write_label_image(masks / f"{name}.tif", mask)

    split, binary = labels(), (labels() > 0) * np.uint8(255)
    split[20, 0] = 1
    add("size", labels()[:-1])
    add("empty", np.zeros(SIZE, np.uint8))
    add("split___", split)
    add("binary____", binary)
    add("lonely_image__", None)
    add("copy____________", labels(), cv2.imread(str(images / "a.png"), cv2.IMREAD_GRAYSCALE))
    write_label_image(masks / "lonely_mask.tif", labels())
    add("broken_mask_______", labels())
    (masks / "broken_mask_______.tif").write_bytes((masks / "a_labels.tif").read_bytes()[:60])
    add("colours__________________", None)
    write_image(masks / "colours__________________.png", np.full((*SIZE, 3), (1, 2, 3), np.uint8))
    add("broken_image", labels())
    (images / "broken_image.png").write_text("no image")
    return {
        "size.tif": fault.SIZE,
        "empty.tif": fault.NO_CELL,
        "split___.tif": fault.SPLIT,
        "binary____.tif": fault.BINARY,
        "lonely_image__.png": fault.NO_PARTNER,
        "lonely_mask.tif": fault.NO_PARTNER,
        "copy____________.png": fault.DUPLICATE_IMAGE,
        "broken_mask_______.tif": fault.UNREADABLE,
        "colours__________________.png": fault.UNREADABLE,
        "broken_image.png": fault.UNREADABLE,
    }


def test_every_fault_of_label_images_is_named_at_once(label_set, capsys):
    expected = spoil_labels(label_set)
    faults, pairs = check_masks(label_set / "images", label_set / "masks")
    assert sorted(found(faults)) == sorted((kind, file) for file, kind in expected.items())
    assert pairs == 3 + 8
    texts = {Path(one.where).name: one.text for one in faults}
    assert "(23, 32)" in texts["size.tif"] and "(24, 32)" in texts["size.tif"]
    assert "1 (2 pieces)" in texts["split___.tif"] and "300" not in texts["split___.tif"]
    assert "255" in texts["binary____.tif"] and texts["copy____________.png"].endswith("a.png")
    assert main(["check-data", str(label_set / "images"), str(label_set / "masks")]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) and all(any(file in line for line in lines) for file in expected)
    assert summary == (
        "11 images looked at: 1 binary mask, 1 duplicate image, 1 empty, 2 missing partner, 1 size mismatch, "
        "1 split label, 3 unreadable file"
    )


def test_every_fault_of_cell_files_is_named_at_once(cell_set):
    masks = cell_set / "raw" / "a" / "masks"
    write_image(masks / "copy.png", (labels() == 1) * np.uint8(1))
    write_image(masks / "empty.png", np.zeros(SIZE, np.uint8))
    write_image(masks / "pieces.png", (labels() > 1) * np.uint8(255))
    write_image(masks / "size.png", np.ones((3, 4), np.uint8))
    (masks / "text.png").write_text("")
    shutil.copytree(cell_set / "raw" / "b", cell_set / "raw" / "c")
    write_image(cell_set / "raw" / "d" / "images" / "d.png", image(9))
    shutil.copytree(masks, cell_set / "raw" / "e" / "masks")
    assert sorted(found(check_masks(cell_set / "raw", cell_set / "raw")[0])) == [
        (fault.DUPLICATE_CELL, "copy.png"),
        (fault.DUPLICATE_IMAGE, "b.png"),
        (fault.NO_CELL, "empty.png"),
        (fault.NO_PARTNER, "1.png"),
        (fault.NO_PARTNER, "d.png"),
        (fault.SIZE, "size.png"),
        (fault.SPLIT, "pieces.png"),
        (fault.UNREADABLE, "text.png"),
    ]


def test_two_masks_for_an_image_are_a_fault(label_set):
    write_label_image(label_set / "masks" / "a.tif", labels())
    faults, pairs = check_masks(label_set / "images", label_set / "masks")
    assert pairs == 2 and [one.kind for one in faults] == [fault.NO_PARTNER]
    assert "a_labels.tif" in str(faults[0]) and "a.tif" in str(faults[0])


def test_bad_arguments_are_named(label_set, capsys):
    for command, message in (
        (["nowhere", str(label_set)], "nowhere: no such folder"),
        ([str(label_set / "images")], "expected a second folder, of the masks"),
        ([str(label_set / "images"), str(label_set / "images"), "--layout", "labels"], "another folder"),
        (["x.json", str(label_set)], "MASKS and --layout"),
        (["x.json"], "x.json"),
    ):
        assert main(["check-data", *command]) == 2
        assert message in capsys.readouterr().err
    (label_set / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no image"):
        check_masks(label_set / "none", label_set / "masks")


# COCO JSON


@pytest.fixture
def coco(label_set: Path) -> tuple[Path, dict]:
    path = label_set / "all.json"
    convert(label_set / "images", label_set / "masks", path)
    return path, json.loads(path.read_text())


def test_every_fault_of_a_coco_file_is_named_at_once(coco, capsys):
    path, data = coco
    assert check_coco(path) == ([], 3)
    folder = path.parent / "images"
    cells = data["annotations"]  # three an image
    assert [one["image_id"] for one in cells] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    cells[0]["bbox"] = [3, 2, 0, 4]
    cells[1]["bbox"] = [25, 20, 9, 9]
    cells[2]["bbox"][0] -= 4
    cells[3]["category_id"] = 8
    cells[4]["segmentation"]["counts"] = "o"
    cells[5]["image_id"] = 77
    cells.append({**copy.deepcopy(cells[6]), "id": 50})
    cells.append({**copy.deepcopy(cells[6]), "id": 50})
    del cells[8]["area"]
    data["images"] += [
        {"id": 20, "file_name": "images/gone.png", "height": 24, "width": 32},
        {"id": 21, "file_name": "../a.png", "height": 24, "width": 32},
        {"id": 22, "file_name": "images/again.png", "height": 24, "width": 33},
    ]
    shutil.copyfile(folder / "a.png", folder / "again.png")
    path.write_text(json.dumps(data))
    faults, images = check_coco(path)
    assert images == 5  # and one of a refused name
    assert sorted(found(faults)) == sorted(
        [
            (fault.BOX_AREA, "annotation 1"),
            (fault.BOX_OUTSIDE, "annotation 2"),
            (fault.BOX_OFF_MASK, "annotation 3"),
            (fault.UNKNOWN_ID, "annotation 4"),
            (fault.MASK, "annotation 5"),
            (fault.UNKNOWN_ID, "annotation 6"),
            (fault.INCOMPLETE, "annotation 9"),
            (fault.DUPLICATE_ID, "annotations[10]"),
            (fault.DUPLICATE_CELL, "c.png"),
            (fault.DUPLICATE_CELL, "c.png"),
            (fault.MISSING_IMAGE, "gone.png"),
            (fault.FILE_NAME, "image 21"),
            (fault.SIZE, "again.png"),
            (fault.DUPLICATE_IMAGE, "again.png"),
            *[(fault.NO_CELL, name) for name in ("a.png", "b.png", "gone.png", "again.png")],
        ]
    )
    assert main(["check-data", str(path)]) == 1
    assert "4 empty" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="all.json: "):
        load_coco(path, path.parent)


def test_split_cells_and_unreadable_images_of_a_coco_file(coco):
    path, data = coco
    split = np.zeros(SIZE, np.uint8)
    split[2:4, 3:9] = split[5, 3:9] = 1
    contours = [[3, 2, 9, 2, 9, 4, 3, 4], [3, 5, 9, 5, 9, 6, 3, 6]]
    data["annotations"][0]["segmentation"] = contours
    assert np.array_equal(decode_mask(contours, *SIZE), split)
    path.write_text(json.dumps(data))
    (path.parent / "images" / "b.png").write_bytes(b"")
    assert sorted(found(check_coco(path)[0])) == [(fault.SPLIT, "a.png"), (fault.UNREADABLE, "b.png")]


def test_images_of_a_coco_file_may_be_elsewhere(coco, tmp_path_factory):
    path, _ = coco
    moved = tmp_path_factory.mktemp("json") / path.name
    shutil.copyfile(path, moved)
    assert len(check_coco(moved)[0]) == 3
    assert main(["check-data", str(moved), "--images", str(path.parent)]) == 0


# Conversion


@pytest.mark.parametrize("layout", ["labels", "cells"])
def test_conversion_keeps_every_pixel(label_set, cell_set, layout, capsys):
    folders = ["images", "masks"] if layout == "labels" else ["raw", "raw"]
    output = label_set / "train.json"
    command = ["convert", *(str(label_set / folder) for folder in folders), "-o", str(output), "--category", "nucleus"]
    assert main(command) == 0
    names = ["images/a.png", "images/b.png", "images/well/c.png"]
    names = names if layout == "labels" else ["raw/a/images/a.png", "raw/b/images/b.png"]
    assert f"{len(names)} images, {3 * len(names)} cells" in capsys.readouterr().out
    data = load_coco(output, output.parent)
    assert data.category_names == ["nucleus"]
    assert [Path(record["file_name"]).relative_to(label_set).as_posix() for record in data.records] == names
    for record in data.records:
        masks = [decode_mask(cell["segmentation"], *SIZE) for cell in record["annotations"]]
        expected = [labels() == number for number in np.unique(labels())[1:]]
        assert sorted(mask.tobytes() for mask in masks) == sorted(mask.tobytes() for mask in expected)
    before = output.read_bytes()
    assert main(command) == 0 and output.read_bytes() == before


def test_conversion_refuses_what_cannot_be_trained_on(label_set):
    spoil_labels(label_set)
    output = label_set / "train.json"
    with pytest.raises(ValueError, match=r"7 faults, which kg-detectron check-data lists; the first: .*lonely_"):
        convert(label_set / "images", label_set / "masks", output)
    assert not output.exists()


def test_conversion_says_what_is_conspicuous(label_set, capsys):
    split = labels()
    split[20, 0] = 1
    write_label_image(label_set / "masks" / "a_labels.tif", split)
    write_label_image(label_set / "masks" / "b_labels.tif", 0 * split)
    assert main(["convert", str(label_set / "images"), str(label_set / "masks"), "-o", str(label_set / "x.json")]) == 0
    out, err = capsys.readouterr()
    assert "3 images, 6 cells" in out and "split label: " in err and "empty: " in err


def test_conversion_of_images_outside_the_folder_of_the_file(label_set, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(ValueError, match=r"train\.json: the images must lie in its folder or below"):
        convert(label_set / "images", label_set / "masks", elsewhere / "train.json")
    (elsewhere / "linked").symlink_to(label_set / "images")
    convert(elsewhere / "linked", label_set / "masks", elsewhere / "train.json")
    assert len(load_coco(elsewhere / "train.json", elsewhere).records) == 3
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert(label_set / "images", label_set / "masks", elsewhere / "none" / "train.json")


def test_the_data_science_bowl(shared):
    folder = shared / "dsb2018" / "stage1_train_sample"
    assert check_masks(folder, folder) == ([], 12)

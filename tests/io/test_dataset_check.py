"""``kg-detectron check-data`` and ``convert``: every fault is named, and sound data becomes a COCO dataset."""

import copy
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from kg_detectron.cli.main import main
from kg_detectron.io import fault
from kg_detectron.io.coco import decode_mask, load_coco
from kg_detectron.io.convert import convert, convert_coco
from kg_detectron.io.dataset_check import Choice, check_coco, check_masks
from kg_detectron.io.fault import Severity
from kg_detectron.io.images import read_image
from kg_detectron.io.labels import write_label_image
from kg_detectron.io.normalisation import Normalisation
from kg_detectron.modeling import Preprocessing
from kg_detectron.training.dataset import read_dataset

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


def test_a_choice_of_channels_is_told_by_its_error_not_by_the_name_of_the_file(label_set, monkeypatch):
    tifffile.imwrite(label_set / "images" / "d.tif", np.stack([image(6), image(7)]), metadata={"axes": "CYX"})
    write_label_image(label_set / "masks" / "d.tif", labels())
    for folder, ending in (("images", ".png"), ("masks", ".tif")):
        (label_set / folder / f"b{'_labels' * (folder == 'masks')}{ending}").rename(
            label_set / folder / f"b--channels{ending}"
        )
    read = Choice.read_image

    def failing(self: Choice, path: Path) -> np.ndarray:
        if path.name == "b--channels.png":
            raise OSError(5, "Input/output error", str(path))
        return read(self, path)

    monkeypatch.setattr(Choice, "read_image", failing)
    assert sorted(found(check_masks(label_set / "images", label_set / "masks")[0])) == [
        (fault.CHANNELS, "d.tif"),
        (fault.UNREADABLE, "b--channels.png"),
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


# What people really have


def kinds(faults: list[fault.Fault], severity: Severity = Severity.NOTE) -> list[str]:
    return sorted(one.kind for one in faults if one.severity >= severity)


def write_cell_files(folder: Path, picture, ending: str = "png") -> list[int]:
    """images/a.png and masks/a/*.png, every cell drawn by `picture` -> the areas of the cells."""
    big = np.kron(labels(), np.ones((5, 5), np.uint16))
    write_image(folder / "images" / "a.png", image(3, big.shape))
    (folder / "masks" / "a").mkdir(parents=True)
    for number in np.unique(big)[1:]:
        Image.fromarray(picture(big == number)).save(folder / "masks" / "a" / f"{number}.{ending}")
    return sorted(np.unique(big, return_counts=True)[1][1:].tolist())


def soft(cell: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    return (ndimage.gaussian_filter(cell.astype(float), sigma) * 255).astype(np.uint8)


def opacity(cell: np.ndarray) -> np.ndarray:
    return np.dstack([np.full((*cell.shape, 3), 255, np.uint8), cell.astype(np.uint8) * 255])


@pytest.mark.parametrize(
    ("picture", "ending", "expected"),
    [
        (lambda cell: cell.astype(np.uint8), "png", []),
        (lambda cell: cell.astype(np.uint8) * 255, "png", []),
        (lambda cell: cell.astype(np.uint16) * 65535, "png", []),
        (soft, "png", [fault.GREY] * 3),
        (lambda cell: cell.astype(np.uint8) * 255, "jpg", [fault.GREY] * 3),
        (opacity, "png", []),
        (opacity, "tif", []),
    ],
)
def test_cell_files_of_other_kinds_keep_their_cells(tmp_path, picture, ending, expected):
    areas = write_cell_files(tmp_path, picture, ending)
    assert kinds(check_masks(tmp_path / "images", tmp_path / "masks")[0]) == expected
    convert(tmp_path / "images", tmp_path / "masks", tmp_path / "x.json")
    converted = sorted(one["area"] for one in json.loads((tmp_path / "x.json").read_text())["annotations"])
    assert np.allclose(converted, areas, rtol=0.1, atol=6)


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (lambda cell: (~cell).astype(np.uint8) * 255, fault.INVERTED),
        (lambda cell: soft(~cell), fault.INVERTED),
        (lambda cell: np.full(cell.shape, 255, np.uint8), fault.INVERTED),
        (lambda cell: image(1, cell.shape), fault.NO_MASK),
        (lambda cell: np.linspace(0, 255, cell.size).reshape(cell.shape).astype(np.uint8), fault.NO_MASK),
        (lambda cell: np.kron(np.arange(768).reshape(24, 32) // 200, np.ones((5, 5))).astype(np.uint8), fault.NO_MASK),
    ],
)
def test_cell_files_in_doubt_are_refused(tmp_path, picture, kind):
    write_cell_files(tmp_path, picture)
    assert set(kinds(check_masks(tmp_path / "images", tmp_path / "masks")[0])) == {kind}
    with pytest.raises(ValueError, match="3 faults"):
        convert(tmp_path / "images", tmp_path / "masks", tmp_path / "x.json")


def write_labels(folder: Path, pixels: np.ndarray) -> tuple[Path, Path]:
    write_image(folder / "images" / "a.png", image(7))
    (folder / "masks").mkdir()
    write_label_image(folder / "masks" / "a.tif", pixels)
    return folder / "images", folder / "masks"


@pytest.mark.parametrize("background", [1, 9, 65535])
def test_a_background_that_is_not_0_is_named_and_mended(tmp_path, background):
    pixels = labels() + np.uint16(background < 9)
    pixels[labels() == 0] = background
    pixels[-1, -1] = background  # all corners
    folders = write_labels(tmp_path, pixels)
    faults, _ = check_masks(*folders)
    assert kinds(faults) == [fault.BACKGROUND]
    assert f"no pixel is 0; label {background} covers 9" in str(faults[0]) and "all corners" in str(faults[0])
    convert(*folders, tmp_path / "x.json")
    areas = sorted(one["area"] for one in json.loads((tmp_path / "x.json").read_text())["annotations"])
    assert areas == [16, 24]


def test_a_background_in_doubt_is_chosen(tmp_path):
    """A cell in a corner, and lines of 0 between cells."""
    pixels = np.where(labels() == 0, 1, labels() + 1).astype(np.uint16)
    pixels[0] = 0
    pixels[1:, 0] = 1
    pixels[0, 0] = pixels[0, 31] = 1
    folders = write_labels(tmp_path, pixels)
    faults, _ = check_masks(*folders)
    assert kinds(faults, Severity.FATAL) == [fault.BACKGROUND] and "3 corners" in str(faults[0])
    assert "; kg-detectron convert --background 1 takes it" in str(faults[0])  # train has no such option
    command = ["convert", *map(str, folders), "-o", str(tmp_path / "x.json")]
    assert main(command) == 2 and main([*command, "--background", "1"]) == 0
    assert check_masks(*folders, choice=Choice(background=1)) == ([], 1)


def test_dense_tissue_without_background_is_a_note(tmp_path):
    pixels = (np.arange(24)[:, None] // 6 * 8 + np.arange(32) // 4 + 1).astype(np.uint16)
    folders = write_labels(tmp_path, pixels)
    faults, _ = check_masks(*folders)
    assert kinds(faults) == [fault.FULL] and kinds(faults, Severity.HARMLESS) == []
    assert main(["check-data", *map(str, folders)]) == 0


def test_pieces_are_those_that_predict_leaves(tmp_path):
    """Pixels that meet at a corner are two pieces, which is worth a note and no more."""
    pixels = labels()
    pixels[14:16, 24:26] = 300
    faults, _ = check_masks(*write_labels(tmp_path, pixels))
    assert kinds(faults) == [fault.CORNERS] and "300 (2 pieces)" in str(faults[0])
    assert kinds(faults, Severity.HARMLESS) == []


def test_swapped_folders_are_named(label_set, cell_set, tmp_path):
    faults, _ = check_masks(label_set / "masks", label_set / "images")
    assert faults[0].kind == fault.SWAPPED and "they seem to be swapped" in str(faults[0])
    with pytest.raises(ValueError, match="they seem to be swapped"):
        convert(label_set / "masks", label_set / "images", label_set / "x.json")
    write_cell_files(tmp_path / "files", lambda cell: cell.astype(np.uint8) * 255)
    faults, _ = check_masks(tmp_path / "files" / "masks", tmp_path / "files" / "images")
    assert faults[0].kind == fault.SWAPPED


@pytest.mark.parametrize("kind", ["12 bits", "float"])
def test_levels_that_the_normalisation_cannot_take(tmp_path, kind):
    folders = write_labels(tmp_path, labels())
    levels = image(0).astype(np.uint16) * 16 + 3 if kind == "12 bits" else image(0).astype(np.float32)
    (tmp_path / "images" / "a.png").unlink()
    tifffile.imwrite(tmp_path / "images" / "a.tif", levels)
    assert kinds(check_masks(*folders)[0], Severity.HARMLESS) == [fault.LEVELS]
    assert check_masks(*folders, normalisation=Normalisation("percentile")) == ([], 1)
    assert kinds(check_masks(*folders, normalisation=Normalisation("fixed"))[0], Severity.FATAL) == [fault.LEVELS]
    assert main(["check-data", *map(str, folders), "--normalise", "percentile"]) == 0
    convert(*folders, tmp_path / "x.json")
    assert kinds(check_coco(tmp_path / "x.json")[0]) == [fault.LEVELS]


def test_images_without_a_finite_value_are_refused(tmp_path):
    folders = write_labels(tmp_path, labels())
    convert(*folders, tmp_path / "x.json")
    tifffile.imwrite(tmp_path / "images" / "a.png", np.full(SIZE, np.nan, np.float32))  # its content tells the format
    for faults in (check_masks(*folders)[0], check_coco(tmp_path / "x.json")[0]):
        assert kinds(faults) == kinds(faults, Severity.FATAL) == [fault.NO_VALUE]
    for dataset in (folders, (tmp_path / "x.json", None)):
        with pytest.raises(ValueError, match="a.png: it has no finite value"):
            read_dataset(*dataset, Preprocessing())
    with pytest.raises(ValueError, match="a.png: it has no finite value"):
        convert(*folders, tmp_path / "y.json")


def test_orientation_is_named(tmp_path):
    folders = write_labels(tmp_path, labels())
    exif = Image.Exif()
    exif[274] = 3
    (tmp_path / "images" / "a.png").unlink()
    Image.fromarray(image(0)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (note,) = check_masks(*folders)[0]
    assert note.kind == fault.ORIENTATION and "EXIF" in note.text and "orientation 3" in note.text


def test_channels_are_chosen_and_written_as_plain_images(tmp_path, capsys):
    folders = write_labels(tmp_path, labels())
    (tmp_path / "images" / "a.png").unlink()
    planes = np.stack([image(1).astype(np.uint16) * 200, image(2).astype(np.uint16) * 200])
    tifffile.imwrite(tmp_path / "images" / "a.tif", planes, imagej=True, metadata={"axes": "CYX"})
    faults, _ = check_masks(*folders)
    assert kinds(faults) == [fault.CHANNELS] and "--channels" in str(faults[0])
    command = ["convert", *map(str, folders), "-o", str(tmp_path / "x.json")]
    assert main(command) == 2 and main([*command, "--channels", "2"]) == 0
    (record,) = load_coco(tmp_path / "x.json", tmp_path).records
    assert Path(record["file_name"]) == tmp_path / "x_images" / "a.tif"
    np.testing.assert_array_equal(read_image(record["file_name"])[..., 0], planes[1])
    assert main(["check-data", *map(str, folders), "--channels", "2"]) == 0


@pytest.mark.parametrize(
    "names", [("{}_img.png", "{}_masks.tif"), ("{}.png", "{}_cp_masks.tif"), ("{}.png", "{}_masks.tif")]
)
def test_folders_of_cellpose(tmp_path, names):
    for seed, name in enumerate(("x", "y/z")):
        write_image(tmp_path / "all" / names[0].format(name), image(seed))
        write_label_image(tmp_path / "all" / names[1].format(name), labels())
        write_image(tmp_path / "all" / f"{name}_flows.tif", image(9))
    assert check_masks(tmp_path / "all", None) == check_masks(tmp_path / "all", tmp_path / "all") == ([], 2)
    assert convert(tmp_path / "all", None, tmp_path / "x.json")[:2] == (2, 6)
    write_image(tmp_path / "all" / names[0].format("lonely"), image(5))
    assert kinds(check_masks(tmp_path / "all", None)[0]) == [fault.NO_PARTNER]


def test_folders_of_stardist(tmp_path):
    for seed, name in enumerate("xy"):
        write_image(tmp_path / "train" / "images" / f"{name}.tif", image(seed))
        (tmp_path / "train" / "masks").mkdir(exist_ok=True)
        write_label_image(tmp_path / "train" / "masks" / f"{name}.tif", labels())
    assert main(["check-data", str(tmp_path / "train")]) == 0
    assert convert(tmp_path / "train", None, tmp_path / "x.json")[:2] == (2, 6)
    assert len(load_coco(tmp_path / "x.json", tmp_path).records) == 2


def test_coco_files_that_train_something_else_are_named_and_mended(coco, capsys):
    path, data = coco
    cells = data["annotations"]
    for number, cell in enumerate(cells):
        cell["id"] = number
    cells[1]["iscrowd"] = cells[2]["iscrowd"] = 1
    cells[3]["category_id"] = 5
    data["categories"] += [{"id": 5, "name": "mitosis"}, {"id": 6, "name": "debris"}]
    path.write_text(json.dumps(data))
    faults, _ = check_coco(path)
    assert kinds(faults) == sorted([fault.ID_ZERO, fault.CATEGORIES, fault.CROWD, fault.UNUSED_CATEGORY])
    text = "\n".join(map(str, faults))
    assert "2 of 9 annotations are crowds, which training leaves out; CVAT writes brush masks so" in text
    assert "2 categories, cell (8), mitosis (1)" in text
    assert "; of cell, mitosis there are too few to learn or to measure, below 10; kg-detectron convert" in text
    command = ["convert", str(path), "-o", str(path.parent / "new.json")]
    assert main(command) == main([*command, "--merge-categories"]) == 2
    assert main([*command, "--crowds", "cells"]) == 0
    several = json.loads((path.parent / "new.json").read_text())["categories"]
    assert several == [{"id": 1, "name": "cell"}, {"id": 5, "name": "mitosis"}]
    for option, count in (("cells", 9), ("leave-out", 7)):
        assert main([*command, "--crowds", option, "--merge-categories"]) == 0
        assert check_coco(path.parent / "new.json") == ([], 3)
        mended = json.loads((path.parent / "new.json").read_text())
        assert mended["categories"] == [{"id": 1, "name": "cell"}] and len(mended["annotations"]) == count
        assert [one["id"] for one in mended["annotations"]] == list(range(1, count + 1))


@pytest.mark.parametrize(("rare", "status"), [(9, 1), (10, 0)])
def test_categories_of_few_cells_are_named(coco, rare: int, status: int):
    """A name that is misspelt once makes a category of one cell."""
    path, data = coco
    data["annotations"] = [one | {"id": n} for n, one in enumerate(data["annotations"] * 3, 1)]
    for cell in data["annotations"][:rare]:
        cell["category_id"] = 5
    data["categories"].append({"id": 5, "name": "mitosis"})
    path.write_text(json.dumps(data))
    faults = [one for one in check_coco(path)[0] if one.kind == fault.CATEGORIES]
    assert [one.severity > fault.Severity.NOTE for one in faults] == [bool(status)]
    assert ("of mitosis there are too few" in faults[0].text) == bool(status)


def test_a_coco_file_of_windows_whose_polygons_reach_outside_is_mended(coco):
    path, data = coco
    for one in data["images"]:
        one["file_name"] = one["file_name"].replace("/", "\\")
    data["annotations"][0] |= {"segmentation": [[-3, 2, 9, 2, 9, 6, -3, 6]], "bbox": [-3, 2, 12, 4]}
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    assert check_coco(path) == ([], 3)
    convert_coco(path, path.parent / "new.json")
    (first, *_), *_ = (record["annotations"] for record in load_coco(path.parent / "new.json", path.parent).records)
    assert first["bbox"] == [0, 2, 9, 4]

"""The scripts of datasets/: raw files to COCO JSON."""

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import make_synthetic as synthetic
import numpy as np
import prepare_dsb2018 as dsb2018
import prepare_neural as neural
import prepare_usiigaci as usiigaci
import pytest

from kg_detectron.io.coco import decode_mask, load_coco

DATASETS = Path(__file__).parents[2] / "datasets"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(main, *arguments: object) -> str:
    """The message with which a script ends that refuses its input."""
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    message = str(exit.value)
    assert ": error: " in message
    return message


@pytest.mark.parametrize("name", ["prepare_dsb2018", "prepare_neural", "make_synthetic", "prepare_usiigaci"])
def test_scripts_run(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(DATASETS.parent))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    done = subprocess.run([sys.executable, DATASETS / f"{name}.py"], capture_output=True, text=True, cwd="/")
    needed = "--output" if name == "make_synthetic" else "--output, source"
    assert done.returncode == 2
    assert f"the following arguments are required: {needed}" in done.stderr


# prepare_dsb2018.py


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Ten ids a0..a9 in the layout of the original; id number i has i + 1 masks, the first of two pieces."""
    folder = tmp_path / "download"
    for i in range(10):
        (folder / f"a{i}" / "images").mkdir(parents=True)
        (folder / f"a{i}" / "masks").mkdir()
        image = np.full((12, 20 + i, 4), 40 + i, np.uint8)
        image[..., 3] = 255
        if i % 2:
            image[..., 0] = 200  # coloured
        cv2.imwrite(str(folder / f"a{i}" / "images" / f"a{i}.png"), image)
        for j in range(i + 1):
            cv2.imwrite(str(folder / f"a{i}" / "masks" / f"m{j}.png"), dsb_mask(i, j))
    return folder


def dsb_mask(i: int, j: int) -> np.ndarray:
    mask = np.zeros((12, 20 + i), np.uint8)
    mask[2:5, 2 * j : 2 * j + 2] = 1 if j % 2 else 255  # whatever is not 0 is the cell
    if j == 0:
        mask[9, 9] = 255
    return mask


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files(folder).items():
            archive.writestr(prefix + name, data)
    return path


def lists(folder: Path, **ids: str) -> Path:
    folder.mkdir()
    for split, text in ids.items():
        (folder / f"{split}.txt").write_text("\n".join(text.split()) + "\n")
    return folder


def test_dsb2018_with_lists(tmp_path: Path, download: Path, capsys: pytest.CaptureFixture):
    splits = lists(tmp_path / "lists", train="a3 a0 a7", val="a1", test="a9")
    dsb2018.main([str(download), "--output", str(tmp_path / "out"), "--splits", str(splits)])
    printed = capsys.readouterr().out
    assert "5 ids of the download are in no list" in printed
    assert f"{tmp_path / 'out' / 'dsb2018'}: train: 3 images, 13 cells" in printed

    for split, ids in (("train", (3, 0, 7)), ("val", (1,)), ("test", (9,))):
        folder = tmp_path / "out" / "dsb2018"
        dataset = load_coco(folder / f"instances_{split}.json", folder / split)
        assert dataset.category_names == ["nucleus"]
        for record, i in zip(dataset.records, ids, strict=True):
            assert record["file_name"] == str(folder / split / f"a{i}.png")
            image = cv2.imread(record["file_name"], cv2.IMREAD_UNCHANGED)
            assert image.ndim == (3 if i % 2 else 2)
            assert image.dtype == np.uint8
            original = cv2.imread(str(download / f"a{i}" / "images" / f"a{i}.png"), cv2.IMREAD_COLOR)
            np.testing.assert_array_equal(cv2.imread(record["file_name"]), original)
            for j, annotation in enumerate(record["annotations"]):
                np.testing.assert_array_equal(
                    decode_mask(annotation["segmentation"], *original.shape[:2]), dsb_mask(i, j) > 0
                )
            assert len(record["annotations"]) == i + 1


def test_dsb2018_seeded_split(tmp_path: Path, download: Path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        dsb2018.main([str(download), "--output", str(tmp_path / name), "--seed", str(seed)])
    one, same, other = (files(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one != other
    drawn = [sorted(Path(name).stem for name in one if f"/{split}/" in name) for split in ("train", "val", "test")]
    assert [len(ids) for ids in drawn] == [6, 2, 2]
    assert sorted(sum(drawn, [])) == [f"a{i}" for i in range(10)]


def test_published_sizes():
    assert [len(ids) for ids in dsb2018.draw_splits(list(map(str, range(670))), 0).values()] == [402, 134, 134]


@pytest.mark.parametrize("prefix", ["", "stage1_train/"])
def test_dsb2018_zip_equals_folder(tmp_path: Path, download: Path, prefix: str):
    (download / "a0" / "images" / "._a0.png").write_bytes(b"of a Mac")
    dsb2018.main([str(download), "--output", str(tmp_path / "folder")])
    dsb2018.main([str(zipped(download, tmp_path / "d.zip", prefix)), "--output", str(tmp_path / "zip")])
    assert files(tmp_path / "folder") == files(tmp_path / "zip")


def test_dsb2018_missing_ids(tmp_path: Path, download: Path, capsys: pytest.CaptureFixture):
    splits = lists(tmp_path / "lists", train="a3 lost a0", val="gone a1")
    arguments = [download, "--output", tmp_path / "out", "--splits", splits]
    message = refused(dsb2018.main, *arguments)
    assert "2 ids of the lists" in message
    assert "\nlost\ngone" in message
    assert not (tmp_path / "out").exists()

    dsb2018.main([*map(str, arguments), "--allow-missing"])
    printed = capsys.readouterr().out
    assert "2 ids of the lists are not in the download" in printed
    assert "7 ids of the download are in no list" in printed
    data = json.loads((tmp_path / "out" / "dsb2018" / "instances_train.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["a3.png", "a0.png"]


@pytest.mark.parametrize("name", ["../a0/images/a0.png", "/a0/images/a0.png", "a/../../b.png", "C:/a.png", "..\\a.png"])
def test_dsb2018_zip_that_leads_outside(tmp_path: Path, download: Path, name: str):
    path = zipped(download, tmp_path / "d.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    assert f"{path}: refused the file name {name!r}" in refused(dsb2018.main, path, "--output", tmp_path / "out")


def test_dsb2018_damaged_zip(tmp_path: Path, download: Path):
    path = zipped(download, tmp_path / "d.zip")
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("a4/masks/m2.png")
    data = bytearray(path.read_bytes())
    name_length, extra_length = struct.unpack_from("<HH", data, entry.header_offset + 26)
    data[entry.header_offset + 30 + name_length + extra_length + 40] ^= 255
    path.write_bytes(data)
    assert f"{path}: a4/masks/m2.png: Bad CRC" in refused(dsb2018.main, path, "--output", tmp_path / "out")
    path.write_bytes(data[:200])
    assert f"{path}: neither a folder nor a sound zip" in refused(dsb2018.main, path, "--output", tmp_path / "out")


def other_size(folder: Path) -> None:
    cv2.imwrite(str(folder / "a2" / "masks" / "m1.png"), np.ones((20, 12), np.uint8))


def empty(folder: Path) -> None:
    cv2.imwrite(str(folder / "a2" / "masks" / "m1.png"), np.zeros((12, 22), np.uint8))


def unreadable(folder: Path) -> None:
    (folder / "a2" / "masks" / "m1.png").write_bytes(b"\x89PNG broken")


def two_images(folder: Path) -> None:
    shutil.copy(folder / "a1" / "images" / "a1.png", folder / "a2" / "images" / "a1.png")


def no_image(folder: Path) -> None:
    (folder / "a2" / "images" / "a2.png").unlink()


def no_masks(folder: Path) -> None:
    shutil.rmtree(folder / "a2" / "masks")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (other_size, "a2/masks/m1.png: the mask is (20, 12), its image (12, 22)"),
        (empty, "a2/masks/m1.png: the mask is empty"),
        (unreadable, "a2/masks/m1.png: cannot be read as an image"),
        (two_images, "a2: expected one image in a2/images, got 2"),
        (no_image, "a2: expected one image in a2/images, got 0"),
        (no_masks, "a2: there are no masks in a2/masks"),
        (shutil.rmtree, "download: no such folder or zip file"),
        (lambda folder: [shutil.rmtree(folder / f"a{i}") for i in range(10)], "download: there are no files <id>/"),
    ],
)
def test_dsb2018_refuses(tmp_path: Path, download: Path, fault, message: str):
    fault(download)
    assert message in refused(dsb2018.main, download, "--output", tmp_path / "out")


def test_dsb2018_bad_lists(tmp_path: Path, download: Path):
    for name, ids, message in (
        ("twice", {"train": "a1 a2", "val": "a2"}, "val.txt: the id a2 stands in train.txt already"),
        ("no_val", {"train": "a1"}, "val.txt"),
    ):
        splits = lists(tmp_path / name, **ids)
        assert message in refused(dsb2018.main, download, "--output", tmp_path / "out", "--splits", splits)


def test_dsb2018_real_sample(tmp_path: Path, shared: Path):
    """The masks equal those of the prepared set, id by id, in the same order."""
    folder = shared / "dsb2018"
    dsb2018.prepare(folder / "stage1_train_sample", tmp_path, split_lists=folder / "splits", allow_missing=True)
    made = json.loads((tmp_path / "dsb2018" / "instances_train.json").read_text())
    given = json.loads((folder / "instances_train.json").read_text())
    ids = {image["dsb_id"]: image for image in given["images"]}
    assert len(made["images"]) == 12

    def rles(data: dict, image: dict) -> list[dict]:
        return [entry["segmentation"] for entry in data["annotations"] if entry["image_id"] == image["id"]]

    for image in made["images"]:
        twin = ids[Path(image["file_name"]).stem]
        assert rles(made, image) == rles(given, twin)
        np.testing.assert_array_equal(
            cv2.imread(str(tmp_path / "dsb2018" / "train" / image["file_name"]), cv2.IMREAD_UNCHANGED),
            cv2.imread(str(folder / "train" / twin["file_name"]), cv2.IMREAD_UNCHANGED),
        )


# prepare_neural.py

COLOURS = [(255, 0, 0), (0, 0, 255), (1, 0, 0), (254, 255, 255)]


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Two training images, the second without cells, and a validation image of 16 bits; no test folder."""
    folder = tmp_path / "raw"
    for name in ("train", "val", "mask"):
        (folder / name).mkdir(parents=True)
    image = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)
    cv2.imwrite(str(folder / "train" / "one.png"), image)
    cv2.imwrite(str(folder / "train" / "two.jpg"), image)
    cv2.imwrite(str(folder / "val" / "three.TIF"), image.astype(np.uint16) * 257)
    (folder / "train" / "notes.txt").write_text("no image")
    for name, cells in (("one", 4), ("two", 0), ("three", 2)):
        cv2.imwrite(str(folder / "mask" / f"{name}.png"), colour_mask(cells))
    return folder


def colour_mask(cells: int) -> np.ndarray:
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[6] = np.arange(16)[:, None] * 17  # every grey, white included: background
    for i, colour in enumerate(COLOURS[:cells]):
        picture[1:3, 4 * i : 4 * i + 2 + i % 2] = colour
        picture[4, 4 * i] = colour  # a second piece
    return picture


def test_neural(tmp_path: Path, coloured: Path, capsys: pytest.CaptureFixture):
    neural.main([str(coloured), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "train: 2 images, 4 cells, 1 images without a cell" in printed
    assert "no folder test, left out" in printed
    folder = tmp_path / "out" / "neural"
    one, two = load_coco(folder / "instances_train.json", folder / "train").records
    (three,) = load_coco(folder / "instances_val.json", folder / "val").records
    assert [Path(record["file_name"]).name for record in (one, two, three)] == ["one.png", "two.png", "three.png"]
    assert not two["annotations"]
    for record, cells in ((one, 4), (three, 2)):
        picture = colour_mask(cells)
        expected = {(picture == colour).all(axis=2).tobytes() for colour in COLOURS[:cells]}
        assert {decode_mask(entry["segmentation"], 8, 16).tobytes() for entry in record["annotations"]} == expected
    np.testing.assert_array_equal(
        cv2.imread(three["file_name"], cv2.IMREAD_UNCHANGED), np.arange(8 * 16).reshape(8, 16)
    )


def overwrite_mask(shape: tuple[int, int, int], dtype: type):
    return lambda raw: cv2.imwrite(str(raw / "mask" / "two.png"), np.zeros(shape, dtype))


def copy_as_png(raw: Path) -> None:
    shutil.copy(raw / "train" / "one.png", raw / "train" / "two.png")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda raw: (raw / "mask" / "two.png").unlink(), "two.jpg: its mask {raw}/mask/two.png is missing"),
        (overwrite_mask((9, 16, 3), np.uint8), "two.png: the mask is (9, 16), its image (8, 16)"),
        (overwrite_mask((8, 16, 3), np.uint16), "two.png: a colour mask must have 8 bits"),
        (lambda raw: (raw / "mask" / "one.png").write_bytes(b"x"), "mask/one.png: cannot be read as an image"),
        (lambda raw: (raw / "train" / "one.png").write_bytes(b""), "train/one.png: cannot be read as an image"),
        (copy_as_png, "train/two.png: two.jpg has the same name, and so the same mask"),
        (lambda raw: (raw / "val" / "three.TIF").unlink(), "val: there are no images"),
        (shutil.rmtree, "raw: there is no folder train, val, test in it"),
    ],
)
def test_neural_refuses(tmp_path: Path, coloured: Path, fault, message: str):
    fault(coloured)
    assert message.format(raw=coloured) in refused(neural.main, coloured, "--output", tmp_path / "out")


# prepare_usiigaci.py


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Five sets as in the original, of 16 bits, set N with N cells."""
    folder = tmp_path / "Mask R-CNN" / "train"
    for number in (1, 2, 3, 10, 44):
        (folder / f"set{number}").mkdir(parents=True)
        image = np.random.default_rng(number).integers(5000, 65535, (30, 200)).astype(np.uint16)
        cv2.imwrite(str(folder / f"set{number}" / "raw.tif"), image)
        cv2.imwrite(str(folder / f"set{number}" / "instances_ids.png"), id_image(number))
        (folder / f"set{number}" / "phase.png").write_bytes(b"not read")
    return tmp_path


def id_image(number: int) -> np.ndarray:
    ids = np.zeros((30, 200), np.uint8)
    for cell in range(1, number + 1):
        ids[3:20, 4 * cell : 4 * cell + 3] = cell
    return ids


def test_usiigaci(tmp_path: Path, sets: Path, capsys: pytest.CaptureFixture):
    splits = lists(tmp_path / "lists", train="set44 set01 set10", val="set02", test="set03")
    usiigaci.main([str(sets), "--output", str(tmp_path / "out"), "--splits", str(splits)])
    assert "train: 3 images, 55 cells" in capsys.readouterr().out
    folder = tmp_path / "out" / "usiigaci"
    records = load_coco(folder / "instances_train.json", folder / "train").records
    for record, number in zip(records, (44, 1, 10), strict=True):
        assert Path(record["file_name"]).name == f"set{number:02}.png"
        image = cv2.imread(record["file_name"], cv2.IMREAD_UNCHANGED)
        source = sets / "Mask R-CNN" / "train" / f"set{number}"
        np.testing.assert_array_equal(image, cv2.imread(str(source / "raw.tif"), cv2.IMREAD_UNCHANGED))
        masks = [decode_mask(cell["segmentation"], 30, 200) for cell in record["annotations"]]
        np.testing.assert_array_equal(sum(i * mask for i, mask in enumerate(masks, start=1)), id_image(number))
    usiigaci.main([str(sets), "--output", str(tmp_path / "drawn"), "--seed", "3"])
    assert {path.name for path in (tmp_path / "drawn" / "usiigaci").iterdir()} == {
        *("train", "val", "test", "instances_train.json", "instances_val.json", "instances_test.json")
    }


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda train: (train / "set3" / "instances_ids.png").unlink(), "instances_ids.png are missing"),
        (lambda train: cv2.imwrite(str(train / "set3" / "instances_ids.png"), id_image(3)[1:]), "it is (29, 200), its"),
        (lambda train: (train / "set3" / "raw.tif").write_bytes(b"x"), "set3/raw.tif: cannot be read as an image"),
        (lambda train: shutil.copytree(train / "set3", train / "set03"), "set03 is called set03 too"),
        (lambda train: shutil.rmtree(train), "there are no files setN/raw.tif"),
    ],
)
def test_usiigaci_refuses(tmp_path: Path, sets: Path, fault, message: str):
    fault(sets / "Mask R-CNN" / "train")
    assert message in refused(usiigaci.main, sets, "--output", tmp_path / "out")


# make_synthetic.py


def make(output: Path, *arguments: object) -> dict[str, bytes]:
    fixed = ["--size", 40, 48, "--cells", 0, 6, "--output", output]
    synthetic.main([str(value) for value in (*fixed, *arguments)])
    return files(output)


@pytest.mark.parametrize("kind", ["nuclei", "neural", "both"])
def test_synthetic(tmp_path: Path, kind: str):
    made = make(tmp_path, "--kind", kind, "--train", 4, "--val", 2)
    assert len(made) == 4 + 2 + 2
    for split, count in (("train", 4), ("val", 2)):
        folder = tmp_path / "synthetic"
        dataset = load_coco(folder / f"instances_{split}.json", folder / split)
        assert len(dataset.records) == count
        assert dataset.category_names == ["cell"]
        assert all(len(record["annotations"]) <= 6 for record in dataset.records)
        assert all((record["height"], record["width"]) == (40, 48) for record in dataset.records)


def test_synthetic_classes(tmp_path: Path):
    made = make(tmp_path, "--classes", "--train", 4, "--val", 1)
    folder = tmp_path / "synthetic"
    dataset = load_coco(folder / "instances_train.json", folder / "train")
    assert dataset.category_names == ["round", "dark", "long"] and dataset.category_ids == [1, 2, 3]
    used = {cell["category_id"] for record in dataset.records for cell in record["annotations"]}
    assert used == {0, 1, 2}
    assert made == make(tmp_path / "again", "--classes", "--train", 4, "--val", 1)


def test_synthetic_images_depend_on_the_seed_and_their_place_alone(tmp_path: Path):
    small = make(tmp_path / "small", "--seed", 3, "--train", 2, "--val", 3)
    again = make(tmp_path / "again", "--seed", 3, "--val", 3, "--train", 2)
    large = make(tmp_path / "large", "--seed", 3, "--train", 5, "--val", 1)
    other = make(tmp_path / "other", "--seed", 4, "--train", 2, "--val", 0)
    assert small == again
    for name in ("synthetic/train/000000.png", "synthetic/train/000001.png", "synthetic/val/000000.png"):
        assert small[name] == large[name]
    assert small["synthetic/train/000000.png"] != small["synthetic/val/000000.png"]
    assert small["synthetic/train/000000.png"] != other["synthetic/train/000000.png"]
    assert "synthetic/instances_val.json" not in other


def test_output_defaults_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    synthetic.main(["--size", "32", "32", "--cells", "1", "1", "--train", "1", "--val", "0"])
    assert (tmp_path / "synthetic" / "instances_train.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cells", 5, 3), "cells must be the fewest and the most, 0 or more, got 5 3"),
        (("--cells", -1, 3), "got -1 3"),
        (("--train", -1), "numbers of images and the seed must be 0 or more"),
        (("--seed", -1), "numbers of images and the seed must be 0 or more"),
        (("--size", 8, 8), "height and width must be at least 32 pixels, got 8 x 8"),
    ],
)
def test_synthetic_refuses(tmp_path: Path, arguments: tuple, message: str):
    assert message in refused(synthetic.main, "--output", tmp_path, *arguments)

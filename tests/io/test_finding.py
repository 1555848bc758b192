"""Finding images by files, folders and patterns, and the masks that belong to them."""

from pathlib import Path

import pytest

from kg_detectron.io.finding import find_images, find_inputs, find_pairs
from kg_detectron.io.layouts import find_training_pairs


@pytest.fixture
def plates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ["b.TIF", "a.png", "notes.txt", ".hidden.png", "plate1/w1/im.tif", "plate1/w2/im.tif", "plate2/w1/im.tif"]
    make(tmp_path / "data", *names)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(*inputs: str, output: str = "out") -> list[str]:
    return [item.name for item in find_inputs(inputs, output)]


def test_folders_give_their_images(plates: Path):
    found = find_images(["data"], "out")
    assert [(item.path, item.name) for item in found.inputs] == [(plates / "a.png", "a"), (plates / "b.TIF", "b")]
    assert found.passed_over == {".txt": 1}
    assert found.passed_over_text() == "1 file passed over: 1 .txt"
    assert found.notes == ()


def test_all_kinds_of_image_files_are_taken_from_a_folder(plates: Path):
    make(plates / "kinds", *(f"{ending}.{ending}" for ending in "bmp gif JPG jpeg svs ndpi lsm stk scn qptiff".split()))
    assert len(names("data/kinds")) == 10


def test_patterns_keep_the_folders_below_their_fixed_part(plates: Path):
    assert names("data/*/*/im.tif") == ["plate1/w1/im", "plate1/w2/im", "plate2/w1/im"]
    assert names("data/plate1/*/im.tif") == ["w1/im", "w2/im"]
    assert names("data/**/*.tif") == ["plate1/w1/im", "plate1/w2/im", "plate2/w1/im"]
    assert names(str(plates / "?.png")) == ["a"]


def test_a_pattern_without_ending_takes_the_images(plates: Path):
    found = find_images(["data/**/*"], "out")
    assert [item.name for item in found.inputs] == ["a", "b", "plate1/w1/im", "plate1/w2/im", "plate2/w1/im"]
    assert found.passed_over == {".txt": 1}
    assert names("data/*.txt") == ["notes.txt"]


def test_a_folder_of_folders_gives_the_images_in_them(plates: Path):
    make(plates, "plate1/w2/notes.txt", "plate1/w2/.hidden/im.tif")
    found = find_images(["data/plate1"], "out")
    assert [item.name for item in found.inputs] == ["w1/im", "w2/im"]
    assert found.passed_over == {".txt": 1}
    (note,) = found.notes
    assert note == "data/plate1: no image lies directly in it; took 2 images in its subfolders"
    make(plates, "plate1/out/im_overlay.png")
    assert names("data/plate1", output="data/plate1/out") == ["w1/im", "w2/im"]


def test_an_image_that_is_given_twice_is_found_once(plates: Path):
    assert names("data/a.png", "data", "data/*.png", "data/../data/a.png") == ["a", "b"]


def test_a_name_with_the_signs_of_a_pattern_is_a_file(plates: Path):
    make(plates, "im[1].png", "plates [2024]/w[1]/a.png", "plates [2024]/w[1]/b.png", "plates [2024]/w2/b.png")
    assert names("data/im[1].png") == ["im[1]"]
    assert names("data/plates [2024]/w[1]") == ["a", "b"]
    assert names("data/plates [2024]/w[1]/*.png") == ["a", "b"]
    assert names("data/plates [2024]/*/b.png") == ["w2/b", "w[1]/b"]
    assert names("data/plates [2024]/**/*.png") == ["w2/b", "w[1]/a", "w[1]/b"]
    assert names("data/pl[ab]te[12]/*/im.tif") == ["plate1/w1/im", "plate1/w2/im", "plate2/w1/im"]


def test_a_file_may_have_any_ending(plates: Path):
    assert names("data/notes.txt") == ["notes.txt"]


@pytest.mark.parametrize("missing", ["data/none.png", "data/*.jpg", "data/plate3"])
def test_what_is_missing_stays_to_be_missed(plates: Path, missing: str):
    found = find_inputs([missing, "data/a.png"], "out")
    assert [item.path for item in found] == [plates.parent / missing, plates / "a.png"]


@pytest.mark.parametrize(
    ("given", "files", "message"),
    [
        ("nowhere", [], "nowhere: there is no such file or folder$"),
        ("empty", ["empty/.hidden"], r"empty: the folder is empty, expected images \(\.png, "),
        ("text", ["text/a.txt", "text/b/c.txt", "text/d"], r"text: there is no image in it or its subfolders, only 2 "),
        ("zeiss", ["zeiss/a.czi"], r'zeiss: .* only 1 \.czi; .*pip install "kg_detectron\[formats\]"'),
        (
            "a.ome.zarr",
            ["a.ome.zarr/0/0"],
            r"a\.ome\.zarr: \.zarr folders need a reader .*pip install",
        ),
        (
            "zarrs",
            ["zarrs/a.zarr/0/0.png"],
            r"zarrs: there is no image .*1 \.zarr; \.zarr folders need a reader",
        ),
        ("data/*.jpg", [], r"data/\*\.jpg: no image matches it; it was looked for in .*data"),
        ("text/*", ["text/a.txt"], r"text/\*: no image matches it, only 1 \.txt"),
    ],
)
def test_inputs_without_any_image_are_refused(
    plates: Path, monkeypatch: pytest.MonkeyPatch, given: str, files: list[str], message: str
):
    monkeypatch.setattr("kg_detectron.io.microscope.is_installed", lambda ending: False)
    monkeypatch.setattr("kg_detectron.io.finding.is_installed", lambda ending: False)
    make(plates.parent, *files)
    with pytest.raises(FileNotFoundError, match=message) as error:
        find_inputs([given], "out")
    assert "Errno" not in str(error.value)
    assert str(error.value).count(f"{given}: ") == 1


def test_microscopes_files_are_taken_where_their_reader_is_installed(plates: Path, monkeypatch: pytest.MonkeyPatch):
    make(plates, "c.czi", "d.nd2", "e.lif", "f.oir", "noending")
    for is_there in (False, True):
        for module in ("finding", "microscope"):
            monkeypatch.setattr(f"kg_detectron.io.{module}.is_installed", lambda ending, is_there=is_there: is_there)
        if not is_there:
            found = find_images(["data"], "out")
            assert [item.name for item in found.inputs] == ["a", "b"]
            assert found.passed_over == {"": 1, ".czi": 1, ".lif": 1, ".nd2": 1, ".oir": 1, ".txt": 1}
            text = found.passed_over_text()
            assert text.startswith("6 files passed over: ") and text.count("pip install") == 3
            assert "1 without ending" in text
    monkeypatch.setattr("kg_detectron.io.finding.is_installed", lambda ending: ending in (".czi", ".nd2", ".lif"))
    assert names("data") == ["a", "b", "c", "d", "e"]


def test_what_only_looks_like_an_image_is_tried(plates: Path):
    (plates / "folder.png").mkdir()
    (plates / "link.png").symlink_to("nowhere.png")
    assert names("data") == ["a", "b", "folder", "link"]
    assert names("data/*.png") == ["a", "folder", "link"]


def test_images_of_one_name_have_their_endings_in_the_names_of_results(plates: Path):
    make(plates, "a.tif", "B.jpg", "sub/a.png", "sub/a.bmp")
    found = find_images(["data"], "out")
    assert [item.name for item in found.inputs] == ["B_jpg", "a_png", "a_tif", "b_TIF"]
    assert len(found.notes) == 2 and "a.png -> a_png, a.tif -> a_tif" in found.notes[1]
    assert names("data/**/*.*", output="out") == [
        *("B_jpg", "a_png", "a_tif", "b_TIF", "plate1/w1/im", "plate1/w2/im", "plate2/w1/im"),
        *("sub/a_bmp", "sub/a_png"),
    ]
    make(plates, "a_tif.png")
    with pytest.raises(ValueError, match="would have the same names of results, a_tif"):
        names("data")


def test_results_of_one_name_are_refused(plates: Path):
    inputs = ["data/plate1/w1/im.tif", "data/plate1/w2/im.tif"]
    with pytest.raises(ValueError, match=f"{inputs[0]} and .*{inputs[1]} would have the same names") as error:
        find_inputs(inputs, "out")
    pattern = str(error.value).split('"')[1]  # what the message says to type
    assert names(pattern) == ["w1/im", "w2/im"]


def test_results_beside_their_images_are_refused(plates: Path):
    for inputs in (["data"], ["data/a.png"], ["data/*.png"]):
        with pytest.raises(ValueError, match="choose another output folder"):
            find_inputs(inputs, "data")
    assert names("data/a.png", output=".") == ["a"]


def test_results_of_earlier_runs_are_no_images(plates: Path):
    make(plates, "out/a_overlay.png", "out/run.json")
    assert names("data/**/*.png", output="data/out") == ["a"]
    assert find_images(["data"], "data/out").passed_over == {".txt": 1}


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        find_inputs([], "out")


# Images and masks


def pair_names(images: Path, masks: Path, layout: str | None = None) -> dict[str, tuple[str, str]]:
    pairs, faults, _ = find_pairs(images, masks, layout)
    assert not faults
    return {pair.name: (pair.image.name, pair.masks[0].name) for pair in pairs}


@pytest.mark.parametrize("ending", ["_labels.tif", "_masks.tif", "_mask.png", ".tif", ".png"])
def test_label_images_in_a_folder_of_their_own(tmp_path: Path, ending: str):
    make(tmp_path, "images/a.png", "images/sub/b.jpg", f"masks/a{ending}", f"masks/sub/b{ending}")
    expected = {"a": ("a.png", f"a{ending}"), "sub/b": ("b.jpg", f"b{ending}")}
    assert pair_names(tmp_path / "images", tmp_path / "masks") == expected


@pytest.mark.parametrize(("masks", "layout"), [("a.tif", "labels"), ("a_cp_masks.tif", "labels"), ("a/1.png", "cells")])
@pytest.mark.parametrize("images_are_inside", [False, True])
def test_images_and_masks_below_each_other(tmp_path: Path, masks: str, layout: str, images_are_inside: bool):
    """The files of the inner folder are not those of the outer one."""
    names = ("inner/a.png", masks) if images_are_inside else ("a.png", f"inner/{masks}")
    make(tmp_path, *names)
    folders = (tmp_path / "inner", tmp_path) if images_are_inside else (tmp_path, tmp_path / "inner")
    (pair,), faults, found = find_training_pairs(*folders)
    assert (pair.image, pair.masks) == (tmp_path / names[0], [tmp_path / names[1]])
    assert not faults and found == layout


def test_images_that_are_called_like_masks_keep_their_names(tmp_path: Path):
    make(tmp_path, "images/a.png", "images/a_mask.png", "masks/a.tif", "masks/a_mask.tif")
    assert pair_names(tmp_path / "images", tmp_path / "masks") == {
        "a": ("a.png", "a.tif"),
        "a_mask": ("a_mask.png", "a_mask.tif"),
    }


def test_label_images_beside_their_images(tmp_path: Path):
    """As Cellpose has them."""
    make(tmp_path, "1_img.png", "1_masks.png", "2.tif", "2_masks.tif", "sub/3.tif", "sub/3_masks.tif")
    expected = {"1": ("1_img.png", "1_masks.png"), "2": ("2.tif", "2_masks.tif"), "sub/3": ("3.tif", "3_masks.tif")}
    for layout in (None, "labels"):
        assert pair_names(tmp_path, tmp_path, layout) == expected
    (tmp_path / "2_masks.tif").unlink()
    _, (fault,), layout = find_pairs(tmp_path, tmp_path)
    assert layout == "labels" and "no masks of it" in fault.text


def test_one_folder_without_masks_says_what_to_do(tmp_path: Path):
    make(tmp_path, "a.png", "b.png")
    with pytest.raises(FileNotFoundError, match="2 elsewhere.*NAME_masks.tif beside NAME.tif"):
        find_pairs(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="layout: label images must be in another folder"):
        find_pairs(tmp_path, tmp_path, "labels")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        find_pairs(tmp_path, tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none: there is no image \(\.png"):
        find_pairs(tmp_path / "none", tmp_path)

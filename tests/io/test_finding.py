"""Finding images by files, folders and patterns."""

from pathlib import Path

import pytest

from kg_detectron.io.inputs import find_inputs


@pytest.fixture
def plates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ["b.TIF", "a.png", "notes.txt", ".hidden.png", "plate1/w1/im.tif", "plate1/w2/im.tif", "plate2/w1/im.tif"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def names(*inputs: str, output: str = "out") -> list[str]:
    return [item.name for item in find_inputs(inputs, output)]


def test_folders_give_their_images(plates: Path):
    found = find_inputs(["data"], "out")
    assert [(item.path, item.name) for item in found] == [(plates / "a.png", "a"), (plates / "b.TIF", "b")]


def test_patterns_keep_the_folders_below_their_fixed_part(plates: Path):
    assert names("data/*/*/im.tif") == ["plate1/w1/im", "plate1/w2/im", "plate2/w1/im"]
    assert names("data/plate1/*/im.tif") == ["w1/im", "w2/im"]
    assert names("data/**/*.tif") == ["plate1/w1/im", "plate1/w2/im", "plate2/w1/im"]
    assert names(str(plates / "?.png")) == ["a"]


def test_an_image_that_is_given_twice_is_found_once(plates: Path):
    assert names("data/a.png", "data", "data/*.png", "data/../data/a.png") == ["a", "b"]


def test_a_name_with_the_signs_of_a_pattern_is_a_file(plates: Path):
    (plates / "im[1].png").touch()
    assert names("data/im[1].png") == ["im[1]"]


def test_a_file_may_have_any_ending(plates: Path):
    assert names("data/notes.txt") == ["notes.txt"]


@pytest.mark.parametrize("missing", ["data/none.png", "data/*.jpg", "data/plate1"])
def test_what_is_missing_stays_to_be_missed(plates: Path, missing: str):
    found = find_inputs([missing, "data/a.png"], "out")
    assert [item.path for item in found] == [plates.parent / missing, plates / "a.png"]


def test_what_only_looks_like_an_image_is_tried(plates: Path):
    (plates / "folder.png").mkdir()
    (plates / "link.png").symlink_to("nowhere.png")
    assert names("data") == ["a", "b", "folder", "link"]
    assert names("data/*.png") == ["a", "folder", "link"]


@pytest.mark.parametrize(
    "inputs",
    [["data/plate1/w1/im.tif", "data/plate1/w2/im.tif"], ["data/a.png", "data/a.tif"], ["data/a.png", "data/A.tif"]],
)
def test_results_of_one_name_are_refused(plates: Path, inputs: list[str]):
    with pytest.raises(ValueError, match=f"{inputs[0]} and .*{inputs[1]} would have the same names"):
        find_inputs(inputs, "out")


def test_results_beside_their_images_are_refused(plates: Path):
    for inputs in (["data"], ["data/a.png"], ["data/*.png"]):
        with pytest.raises(ValueError, match="choose another output folder"):
            find_inputs(inputs, "data")
    assert names("data/a.png", output=".") == ["a"]


def test_results_of_earlier_runs_are_no_images(plates: Path):
    (plates / "out").mkdir()
    (plates / "out" / "a_overlay.png").touch()
    assert names("data/**/*.png", output="data/out") == ["a"]


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        find_inputs([], "out")

"""Files from elsewhere: none runs code, writes outside its folder, or takes memory beyond what it is worth."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import convert_torchvision_weights
import numpy as np
import prepare_dsb2018
import prepare_neural
import pytest
import tifffile
import torch
from builders import tiny_network
from PIL import Image

from kg_detectron import load_model
from kg_detectron.cli.main import main
from kg_detectron.inference import save_model
from kg_detectron.io.cell_sets import read_cells
from kg_detectron.io.coco import coco_annotation, load_coco
from kg_detectron.io.images import MAX_PIXELS, read_image, read_pages, write_png
from kg_detectron.io.labels import read_label_image, write_label_image
from kg_detectron.io.safe_load import read_checkpoint
from kg_detectron.report import report_dataset

ROOT = Path(__file__).parents[2]
SMALL = {"cut_from": "s1", "radius": 2.0, "size": (32, 32)}
MASK = np.pad(np.ones((6, 8), bool), 10)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "made by a file"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with images/, labels/ and truth.json of two images, and the sound model.pth."""
    folder = tmp_path / "work"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for id, name in enumerate("ab", start=1):
        write_png(folder / "images" / f"{name}.png", np.full((*MASK.shape, 3), 40 * id, np.uint8) + MASK[..., None])
        write_label_image(folder / "labels" / f"{name}.tif", MASK.astype(np.uint16))
        images.append({"id": id, "file_name": f"{name}.png", "height": MASK.shape[0], "width": MASK.shape[1]})
        annotations.append(coco_annotation(MASK, image_id=id, annotation_id=id))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "truth.json").write_text(json.dumps(content))
    save_model(tiny_network(**SMALL), folder / "model.pth")
    return folder


def malicious(kind: str, path: Path, marker: Path) -> Path:
    """A file that would make the marker if it were loaded in the usual, trusting way."""
    code = Code(marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": code, "kg_detectron": code}))
    elif kind == "torch":
        torch.save({"model": code, "kg_detectron": {"model": {}}}, path)
    elif kind == "old torch":
        torch.save({"model": code, "kg_detectron": {"model": {}}}, path, _use_new_zipfile_serialization=False)
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, model=np.array([code], dtype=object), kg_detectron=np.array([code], dtype=object))
    elif kind == "yaml":
        path.write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")
    elif kind == "eps":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n")
    elif kind == "tiff":
        tifffile.imwrite(path, MASK.astype(np.uint8), metadata=None, description=pickle.dumps(code), software=False)
    return path


KINDS = ["pickle", "torch", "old torch", "npz", "yaml", "eps"]


def test_the_malicious_files_are_malicious(tmp_path: Path, marker: Path):
    for kind in ("pickle", "torch", "old torch", "npz"):
        path = malicious(kind, tmp_path / "file", marker)
        if kind == "pickle":
            pickle.loads(path.read_bytes())
        elif kind == "npz":
            np.load(path, allow_pickle=True)["model"]
        else:
            torch.load(path, weights_only=False)
        assert marker.is_dir(), kind
        marker.rmdir()


# The path {bad} in the place of every kind of file that a command reads.
COMMANDS = {
    "predict, model": "predict {work}/images -m {bad} -o {work}/out",
    "predict, image": "predict {bad} -m {work}/model.pth -o {work}/out",
    "rerun": "rerun {bad}",
    "evaluate, truth": "evaluate {bad} {work}/labels",
    "evaluate, predictions": "evaluate {work}/truth.json {bad}",
    "check-data": "check-data {bad}",
    "export": "export {bad} -o {work}/exported.safetensors",
    "report, truth": "report {bad} {work}/labels --images {work}/images -o {work}/page.html",
    "report, predictions": "report {work}/truth.json {bad} --images {work}/images -o {work}/page.html",
    "explain, model": "explain {work}/images/a.png -m {bad} -o {work}/explained.png",
    "explain, image": "explain {bad} -m {work}/model.pth -o {work}/explained.png",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_is_in_a_file(work: Path, marker: Path, capfd: pytest.CaptureFixture, command: str):
    before = sorted(path for path in work.rglob("*"))
    ending = ".pth" if "model" in command or command == "export" else ".png" if "image" in command else ".json"
    for kind in KINDS:
        bad = malicious(kind, work.parent / f"bad{ending}", marker)
        words = [word.format(bad=bad, work=work) for word in COMMANDS[command].split()]
        assert main(words) == 2, kind
        assert bad.name in capfd.readouterr().err
        assert not marker.exists(), kind
    made = {path.relative_to(work).as_posix() for path in work.rglob("*") if path not in before}
    assert made <= {"out", "out/run.json", "out/images.csv", "out/cells.csv"}


@pytest.mark.parametrize("command", ["check-data", "convert"])
def test_no_folder_of_data_runs_code(work: Path, marker: Path, capsys: pytest.CaptureFixture, command: str):
    for folder, ending in (("images", "png"), ("labels", "tif")):
        for kind in KINDS:
            bad = malicious(kind, work / folder / f"a.{ending}", marker)
            words = [command, str(work / "images"), str(work / "labels")]
            assert main([*words, *(["-o", str(work / "new.json")] if command == "convert" else [])]) in (1, 2)
            shown = capsys.readouterr()
            assert str(bad) in shown.out + shown.err and "cannot be read" in shown.out + shown.err
            assert not marker.exists() and not (work / "new.json").exists()


def test_what_a_tiff_says_of_itself_is_not_run(tmp_path: Path, marker: Path):
    path = malicious("tiff", tmp_path / "a.tif", marker)
    assert read_image(path).any() and read_label_image(path).any()
    assert not marker.exists()


def test_scripts_run_nothing(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture):
    for kind in KINDS:
        bad = malicious(kind, tmp_path / "bad.pth", marker)
        for main_of, output in (
            (convert_torchvision_weights.main, [str(tmp_path / "out.pth")]),
            (prepare_dsb2018.main, ["--output", str(tmp_path / "out")]),
        ):
            with pytest.raises(SystemExit) as end:
                main_of([str(bad), *output])
            assert "bad.pth" in f"{end.value} {capsys.readouterr().err}"
            assert not marker.exists() and sorted(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize("folder", ["train", "mask"])
def test_colour_masks_run_nothing(tmp_path: Path, marker: Path, folder: str):
    for kind in KINDS:
        for name in ("train", "mask"):
            (tmp_path / name).mkdir(exist_ok=True)
            write_png(tmp_path / name / "a.png", np.zeros((9, 9, 3), np.uint8))
        bad = malicious(kind, tmp_path / folder / "a.png", marker)
        with pytest.raises(SystemExit, match=f"error: {bad}: cannot be read as an image"):
            prepare_neural.main([str(tmp_path), "--output", str(tmp_path / "out")])
        assert not marker.exists() and not list((tmp_path / "out").rglob("*.json"))


def test_the_refusal_of_a_checkpoint_names_the_cause_and_no_way_around(tmp_path: Path, marker: Path):
    path = malicious("torch", tmp_path / "bad.pth", marker)
    with pytest.raises(ValueError, match=rf"{path} was refused: .*could run code .*mkdir") as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)


# Names that lead elsewhere


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png", "..\\secret.png", "C:/secret.png"])
def test_names_of_a_coco_file_lead_nowhere(work: Path, capsys: pytest.CaptureFixture, name: str):
    """Training and checking refuse them; the other commands take them for names and open no file by them."""
    secret = work.parent / "secret.png"
    write_png(secret, np.full((*MASK.shape, 3), 200, np.uint8))
    data = json.loads((work / "truth.json").read_text())
    data["images"][0]["file_name"] = name.format(folder=work.parent)
    (work / "images" / "bad.json").write_text(json.dumps(data))
    bad = str(work / "images" / "bad.json")
    with pytest.raises(ValueError, match="refused the file name"):
        load_coco(bad, work / "images")
    assert main(["check-data", bad]) == 1
    assert "refused file name: image 1" in capsys.readouterr().out
    before = sorted(work.parent.rglob("*"))
    page = ["report", bad, bad, "--images", str(work / "images"), "-o", str(work / "page.html")]
    assert main(page) == 2
    assert "images are missing" in capsys.readouterr().err
    assert main(["evaluate", bad, bad]) == 0
    assert sorted(work.parent.rglob("*")) == before


def test_an_ome_tiff_reads_no_other_file(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    tifffile.imwrite(tmp_path / "secret.tif", np.full((8, 9), 77, np.uint8), metadata=None)
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{z}</UUID></TiffData>'
        for z, name in enumerate(("own.ome.tif", "../secret.tif"))
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="9" SizeY="8" SizeZ="2" '
        f'SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
    )
    own = tmp_path / "inner" / "own.ome.tif"
    tifffile.imwrite(own, np.full((8, 9), 5, np.uint8), metadata=None, description=xml.encode())
    assert tifffile.imread(own).max() == 77  # the library alone follows the name
    assert [page.max() for page in read_pages(own)] == [5]
    assert read_label_image(own).max() == 5


def test_markup_in_names_is_text_in_the_report(work: Path):
    markup = "<img src=x onerror=alert(1)></script><script>alert(2)</script>'\"&"
    data = json.loads((work / "truth.json").read_text())
    data["images"][0]["file_name"] = f"{markup.replace('/', '')}.png"
    (work / "images" / "a.png").rename(work / "images" / data["images"][0]["file_name"])
    data["categories"][0]["name"] = markup
    (work / "bad.json").write_text(json.dumps(data))
    report_dataset(
        work / "bad.json", {markup: work / "bad.json"}, work / "images", work / "page.html", title=markup, details=2
    )
    text = (work / "page.html").read_text(encoding="utf-8")
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text and "alert(2)</" not in text and "<script>alert" not in text


# Sizes that are claimed


def test_a_jpeg_of_absurd_size_is_refused_with_its_numbers(tmp_path: Path):
    buffer = io.BytesIO()
    Image.fromarray(MASK).convert("L").save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\xc0") + 5  # of the height in the header of the frame
    data[place : place + 4] = struct.pack(">HH", 50000, 60000)
    (tmp_path / "bomb.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bomb\.jpg.*60000 x 50000 pixels, more than the limit of {MAX_PIXELS}"):
        read_image(tmp_path / "bomb.jpg")


def test_a_compressed_checkpoint_is_refused(tmp_path: Path):
    torch.save({"model": torch.zeros(10**6)}, tmp_path / "sound.pth")
    with (
        zipfile.ZipFile(tmp_path / "sound.pth") as sound,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in sound.infolist():
            bomb.writestr(entry.filename, sound.read(entry))
    length = (tmp_path / "bomb.pth").stat().st_size
    assert length < 20_000
    for load in (read_checkpoint, load_model):
        with pytest.raises(ValueError, match=rf"bomb\.pth.*{length} bytes.*unpacks to 4\d{{6}}"):
            load(tmp_path / "bomb.pth")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path):
    """As many elements as the header says, of which the file has 4."""
    torch.save({"model": torch.zeros(4)}, tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as sound, zipfile.ZipFile(tmp_path / "bad.pth", "w") as bad:
        for entry in sound.infolist():
            data = sound.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(b"K\x04") == 2  # numbers below 256: of the storage and of the tensor
                data = data.replace(b"K\x04", b"J" + struct.pack("<i", 2**30))
            bad.writestr(entry.filename, data)
    with pytest.raises(ValueError, match=r"bad\.pth"):
        read_checkpoint(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"c0_channels": 10**9}}, "do not fit"),
        ({"trunk": {"widths": (10**6,) * 4}}, "do not fit"),
        (
            {"preprocessing": {"size": (10**6, 10**6)}},
            "1000000 x 1000000 pixels, more than the limit of 1000000000",
        ),
        ({"preprocessing": {"size": (0, 32)}}, "size: expected a positive height and width"),
        ({"backbone": {"backbone_weights": "IMAGENET1K_V1"}}, "names weights to download"),
        ({"backbone": {"backbone": "18; import os"}}, "backbone"),
        ({"preprocessing": {"pixel_mean": "evil"}}, "do not fit"),
        ({"preprocessing": {"normalisation": "rm -rf"}}, "do not fit"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_description_that_asks_for_too_much_is_refused(tmp_path: Path, change: dict, message: str, ending: str):
    model = tiny_network(**SMALL)
    description = model.description()
    for part, values in change.items():
        description["settings"][part] |= values
    model.description = lambda: description
    save_model(model, tmp_path / f"bad{ending}")
    with pytest.raises(ValueError, match=rf"bad\{ending}.*{message}"):
        load_model(tmp_path / f"bad{ending}")


@pytest.mark.parametrize("read", [read_image, read_label_image])
def test_a_tiff_whose_pieces_unpack_to_more_than_they_should(tmp_path: Path, read):
    image = np.zeros((16, 16), np.uint8)
    tifffile.imwrite(tmp_path / "bomb.tif", image, compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "bomb.tif") as tiff:
        place = {name: tiff.pages[0].tags[name].valueoffset for name in ("StripOffsets", "StripByteCounts")}
    data = bytearray((tmp_path / "bomb.tif").read_bytes())
    packer = zlib.compressobj()
    bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(20)) + packer.flush()  # 320 MB
    for name, value in (("StripOffsets", len(data)), ("StripByteCounts", len(bomb))):
        data[place[name] - 6 : place[name] - 4] = struct.pack("<H", 4)
        data[place[name] : place[name] + 4] = struct.pack("<I", value)
    (tmp_path / "bomb.tif").write_bytes(data + bomb)
    with pytest.raises(ValueError, match=rf"bomb\.tif.*{len(bomb)} bytes unpacks to more than its 256 bytes"):
        read(tmp_path / "bomb.tif")


def test_a_tiff_of_many_large_pages_is_refused_as_a_whole(tmp_path: Path):
    """Every page is within the limit; all are not."""
    with tifffile.TiffWriter(tmp_path / "many.tif") as writer:
        for i in range(40):
            writer.write(np.zeros((64, 64 + i), np.uint8), compression="zlib", metadata=None)
    assert len(read_pages(tmp_path / "many.tif")) == 40
    with pytest.raises(ValueError, match=r"many\.tif.*its header says 213\d{3} bytes, more than the limit of 2\d{5}"):
        read_pages(tmp_path / "many.tif", max_pixels=6600)


def test_label_images_of_absurd_size_are_refused_with_their_numbers(tmp_path: Path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 50000, 8, 0, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((9, 9), np.uint8), compression="zlib", metadata=None)
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as tiff:
        tags = tiff.pages[0].tags
        places = {tags["ImageWidth"].valueoffset: 60000, tags["ImageLength"].valueoffset: 50000}
    data = bytearray(buffer.getvalue())
    for place, value in places.items():
        data[place - 6 : place - 4] = struct.pack("<H", 4)
        data[place : place + 4] = struct.pack("<I", value)
    (tmp_path / "bomb.tif").write_bytes(data)
    for name in ("bomb.png", "bomb.tif"):
        with pytest.raises(ValueError, match=rf"{name}.*60000 x 50000 pixels, more than the limit of {MAX_PIXELS}"):
            read_label_image(tmp_path / name)


@pytest.mark.parametrize("size", [(10**6, 10**6), (2**40, 1), (-5, 5), (0, 0)])
@pytest.mark.parametrize("counts", [[10**12], "`", "0" * 40])
def test_images_of_absurd_size_in_a_coco_file(work: Path, size: tuple[int, int], counts: object):
    data = json.loads((work / "truth.json").read_text())
    data["images"][0] |= {"height": size[0], "width": size[1]}
    data["annotations"][0]["segmentation"] = {"size": list(size), "counts": counts}
    (work / "images" / "bad.json").write_text(json.dumps(data))
    numbers = f"{size[1]} x {size[0]} pixels" + (", more than the limit" if min(size) > 0 else "")
    with pytest.raises(ValueError, match=rf"bad\.json: .*{numbers}"):
        read_cells(work / "images" / "bad.json")
    numbers = numbers if min(size) > 0 else "must be a positive integer"
    with pytest.raises(ValueError, match=rf"bad\.json: image 1: .*{numbers}"):
        load_coco(work / "images" / "bad.json", work / "images")


def test_a_polygon_of_absurd_length(work: Path):
    data = json.loads((work / "truth.json").read_text())
    data["images"][0] |= {"height": 30000, "width": 30000}
    data["annotations"][0]["segmentation"] = [[0, 0, 30000, 30000] * 500]
    (work / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"bad\.json: .*polygon is 30000000 pixels long.* limit of 10000000"):
        read_cells(work / "bad.json")


def test_a_zip_file_whose_header_claims_too_much(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/images/a.png", bytes(1000))
        archive.writestr("a/masks/m.png", bytes(1000))
    data = (tmp_path / "d.zip").read_bytes()
    (tmp_path / "d.zip").write_bytes(data.replace(struct.pack("<I", 1000), struct.pack("<I", 2**31)))
    with pytest.raises(SystemExit, match=r"d\.zip: a/images/a\.png: .*2147483648 bytes.*limit of 1073741824"):
        prepare_dsb2018.main([str(tmp_path / "d.zip"), "--output", str(tmp_path / "out")])

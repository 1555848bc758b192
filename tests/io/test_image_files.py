"""What `open_image` tells of a file beside its pixels, and how scenes, channels and orientation are chosen."""

import shlex
import struct
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from kg_detectron.io import microscope
from kg_detectron.io.images import ImageChoiceError, checked_axes, checked_channels, open_image, read_image, read_pages
from kg_detectron.io.labels import read_label_image
from kg_detectron.io.scene import upright

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
GREY = RGB[..., 0]
STACK = RNG.integers(0, 2**16, (2, 4, 3, 40, 60), dtype=np.uint16)  # T, Z, C, Y, X


def grey_bgr(image: np.ndarray) -> np.ndarray:
    return np.stack([image] * 3, axis=2)


def cells(size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """A smooth grey image of many levels."""
    y, x = np.mgrid[: size[0], : size[1]]
    return (127 + 120 * np.sin(y / 7) * np.cos(x / 9)).astype(np.uint8)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, ending: str, orientation: int):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{ending}"
    picture = Image.fromarray(GREY)
    picture.save(path, exif=exif)
    picture.getexif()[274] = orientation
    seen = np.asarray(ImageOps.exif_transpose(picture))
    if ending == "jpg":
        with Image.open(path) as stored:
            seen = np.asarray(ImageOps.exif_transpose(stored))
    file = open_image(path)
    np.testing.assert_array_equal(file.pages[0].pixels, grey_bgr(seen))
    assert file.orientation == file.pages[0].orientation == orientation
    assert any("orientation" in note for note in file.notes) == (orientation > 1)
    if ending != "jpg":
        np.testing.assert_array_equal(read_label_image(path), seen)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "png", "packbits"])
@pytest.mark.parametrize("image", [GREY, RGB, np.dstack([RGB, GREY])], ids=["grey", "rgb", "rgba"])
def test_a_tiff_is_turned_the_same_way_in_every_codec(
    tmp_path: Path, compression: str | None, orientation: int, image: np.ndarray
):
    path = tmp_path / "a.tif"
    options = {"photometric": "minisblack" if image.ndim == 2 else "rgb", "compression": compression}
    if image.ndim == 3 and image.shape[2] == 4:
        options["extrasamples"] = ["unassalpha"]
    tifffile.imwrite(path, image, metadata=None, extratags=[(274, 3, 1, orientation, False)], **options)
    seen = upright(image, orientation, 0)
    expected = grey_bgr(seen) if image.ndim == 2 else seen[..., 2::-1]
    np.testing.assert_array_equal(read_image(path), expected)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_upright_is_what_pillow_does(orientation: int, height: int, width: int, is_colour: bool):
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    image = image if is_colour else image[..., 0]
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.getexif()[274] = orientation
    turned = upright(image, orientation, 0)
    np.testing.assert_array_equal(turned, np.asarray(ImageOps.exif_transpose(picture)))
    assert np.shares_memory(turned, image)


def test_mapped_images_are_turned_as_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kg_detectron.io.images._MAP_FROM", 1)
    tifffile.imwrite(tmp_path / "a.tif", GREY, metadata=None, extratags=[(274, 3, 1, 6, False)])
    (page,) = read_pages(tmp_path / "a.tif")
    np.testing.assert_array_equal(page, grey_bgr(np.rot90(GREY, -1)))
    base = page
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


# What a file says


def test_an_ome_tiff_tells_all(tmp_path: Path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        STACK,
        metadata={
            "axes": "TZCYX",
            "PhysicalSizeX": 325.0,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.325,
            "PhysicalSizeYUnit": "µm",
            "Channel": {"Name": ["phase", "DAPI", "GFP"]},
        },
    )
    file = open_image(tmp_path / "a.ome.tif", channels=["dapi"])
    assert file.pixel_size == pytest.approx(0.325) and file.pixel_size_source == "OME"
    assert (file.axes, file.shape) == ("TZCYX", STACK.shape)
    assert [page.position for page in file.pages] == [{"t": t, "z": z} for t in range(2) for z in range(4)]
    for page in file.pages:
        t, z = page.position["t"], page.position["z"]
        assert page.channel_names == ("phase", "DAPI", "GFP") and page.chosen == (2,)
        np.testing.assert_array_equal(page.planes, STACK[t, z])
        np.testing.assert_array_equal(page.pixels, grey_bgr(STACK[t, z, 1]))
        assert page.pixels.strides[2] == 0
    colour = open_image(tmp_path / "a.ome.tif", channels="GFP,1,DAPI").pages[0]
    assert colour.chosen == (3, 1, 2)
    np.testing.assert_array_equal(colour.pixels, np.moveaxis(STACK[0, 0, [1, 0, 2]], 0, 2))


@pytest.mark.parametrize(("unit", "resolution", "size"), [("micron", 4.0, 0.25), ("um", 2, 0.5), ("nm", 0.01, 0.1)])
def test_an_imagej_tiff_tells_its_pixel_size_and_labels(tmp_path: Path, unit: str, resolution: float, size: float):
    tifffile.imwrite(
        tmp_path / "a.tif",
        STACK[0, 0],
        imagej=True,
        resolution=(resolution, resolution),
        metadata={"axes": "CYX", "unit": unit, "Labels": ["phase", "DAPI", "GFP"]},
    )
    file = open_image(tmp_path / "a.tif", channels=["GFP"])
    assert file.pixel_size == pytest.approx(size, rel=1e-4) and file.pixel_size_source == "ImageJ"
    assert file.pages[0].channel_names == ("phase", "DAPI", "GFP") and file.pages[0].position == {}


@pytest.mark.parametrize(
    ("resolution", "unit", "size"),
    [
        (20000, "CENTIMETER", 0.5),
        (45454.5, "CENTIMETER", 0.22),
        (50800, "INCH", 0.5),
        (2540, "CENTIMETER", 10000 / 2540),
        *((dpi, "INCH", None) for dpi in (1, 72, 96, 150, 300, 600, 1200, 2400, 4800)),
        (118.11, "CENTIMETER", None),
        (28.3465, "CENTIMETER", None),
        (1, "NONE", None),
        (20000, "NONE", None),
    ],
)
def test_only_plausible_resolutions_are_pixel_sizes(tmp_path: Path, resolution: float, unit: str, size: float | None):
    tifffile.imwrite(tmp_path / "a.tif", GREY, metadata=None, resolution=(resolution, resolution), resolutionunit=unit)
    file = open_image(tmp_path / "a.tif")
    assert file.pixel_size == (None if size is None else pytest.approx(size, rel=1e-3))
    assert file.pixel_size_source == (None if size is None else "TIFF resolution")


def test_pixels_that_are_not_square_have_no_size(tmp_path: Path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif", STACK[0, 0, 0], metadata={"axes": "YX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 2.0}
    )
    file = open_image(tmp_path / "a.ome.tif")
    assert file.pixel_size is None and "not square" in file.notes[0]


def test_a_slide_tells_its_pixel_size(tmp_path: Path):
    slide(tmp_path / "slide.svs")
    file = open_image(tmp_path / "slide.svs")
    assert file.pixel_size == pytest.approx(0.499) and file.pixel_size_source == "Aperio MPP"
    assert [page.pixels.shape for page in file.pages] == [(128, 192, 3)]
    assert len(file.notes) == 3 and all("was left out" in note for note in file.notes)
    for name, number, shape in (("Label", 3, (20, 30, 3)), ("macro", 4, (16, 40, 3)), ("thumbnail", 2, (64, 96, 3))):
        for chosen in (name, number, str(number)):
            (page,) = open_image(tmp_path / "slide.svs", scene=chosen).pages
            assert page.pixels.shape == shape
    with pytest.raises(ImageChoiceError, match=r"slide\.svs: it has no scene 5: it has 4 scenes: 1 Baseline"):
        open_image(tmp_path / "slide.svs", scene=5)


def slide(path: Path) -> None:
    rgb = np.tile(RGB, (4, 4, 1))[:128, :192]
    with tifffile.TiffWriter(path) as tiff:
        options = {"photometric": "rgb", "metadata": None, "software": False}
        about = "Aperio Image Library v11\n|AppMag = 20|MPP = 0.4990"
        tiff.write(rgb, tile=(64, 64), description=about, **options)
        tiff.write(rgb[::2, ::2], description=about, **options)
        tiff.write(rgb[::2, ::2], tile=(32, 32), description=about, **options)
        tiff.write(rgb[:20, :30], subfiletype=1, description="Aperio\nlabel 20x30", **options)
        tiff.write(rgb[:16, :40], subfiletype=9, description="Aperio\nmacro 16x40", **options)


# Scenes


@pytest.mark.parametrize("pyramid", [False, True])
def test_all_scenes_of_an_ome_tiff_are_pages(tmp_path: Path, pyramid: bool):
    scenes = {"A1": RGB[..., 0], "B2": RGB[:32, :48, 1], "C3": np.tile(RGB[..., 2], (2, 2))}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        for name, scene in scenes.items():
            options = {"photometric": "minisblack", "tile": (16, 16)}
            tiff.write(scene, subifds=int(pyramid), metadata={"axes": "YX", "Name": name}, **options)
            if pyramid:
                tiff.write(scene[::2, ::2], subfiletype=1, **options)
    file = open_image(tmp_path / "a.ome.tif")
    assert file.scenes == ("A1", "B2", "C3") and file.notes == ()
    for page, (name, scene) in zip(file.pages, scenes.items(), strict=True):
        assert page.position == {"scene": name}
        np.testing.assert_array_equal(page.pixels, grey_bgr(scene))
    for wanted in (2, "2", "b2", "B2"):
        (page,) = open_image(tmp_path / "a.ome.tif", scene=wanted).pages
        np.testing.assert_array_equal(page.pixels, grey_bgr(scenes["B2"]))
        assert page.position == {"scene": "B2"}
    with pytest.raises(ImageChoiceError, match=r"no scene D4: it has 3 scenes: 1 A1, 2 B2, 3 C3; .* --scene"):
        open_image(tmp_path / "a.ome.tif", scene="D4")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_labels_and_macro_images_are_told_by_name_or_size(tmp_path: Path, order: tuple[int, ...]):
    large = np.tile(GREY, (4, 4))
    parts = [("slide", large, 1), ("macro image", GREY, 1), ("", GREY[:20, :30], 0)]
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        for index in order:
            name, image, levels = parts[index]
            options = {"photometric": "minisblack", "tile": (16, 16)}
            tiff.write(image, subifds=levels, metadata={"axes": "YX", "Name": name} if name else None, **options)
            if levels:
                tiff.write(image[::2, ::2], subfiletype=1, **options)
    file = open_image(tmp_path / "a.ome.tif")
    (page,) = file.pages
    np.testing.assert_array_equal(page.pixels, grey_bgr(large))
    assert page.position == {} and len(file.notes) == 2
    assert any("macro" in note for note in file.notes)


def test_plain_pages_know_their_place(tmp_path: Path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0, :, 0], photometric="minisblack", metadata=None)
    assert [page.position for page in open_image(tmp_path / "a.tif").pages] == [{"page": n} for n in range(4)]
    assert open_image(tmp_path / "a.tif").pages[0].pixel_size is None


# Channels


def three_channels(path: Path, names: list[str] | None) -> None:
    about = {"axes": "CYX"} | ({"Channel": {"Name": names}} if names else {})
    tifffile.imwrite(path, STACK[0, 0], metadata=about, photometric="minisblack")


def test_messages_on_channels_list_their_names(tmp_path: Path):
    path = tmp_path / "a.ome.tif"
    three_channels(path, ["phase", "DAPI", "GFP"])
    listed = "it has 3 channels: 1 phase, 2 DAPI, 3 GFP; choose one with --channels DAPI"
    with pytest.raises(ImageChoiceError) as error:
        open_image(path)
    assert str(error.value) == f"{path}: {listed}"
    assert error.value.option == "--channels" and "--" not in error.value.plain
    for wrong in (["Cy5"], [4], ["phase", "GFP", "Cy5"]):
        with pytest.raises(ImageChoiceError, match=rf"it has no channel {wrong[-1]}: {listed}"):
            open_image(path, channels=wrong)
    three_channels(path, None)
    with pytest.raises(ImageChoiceError, match="it has 3 channels, without names; choose one with --channels 1"):
        open_image(path)
    three_channels(path, ["a b", "x", "X"])
    with pytest.raises(ImageChoiceError, match="it has 2 channels called x: .*choose one with --channels 1"):
        open_image(path, channels=["x"])


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize("channels", [[2], ["DAPI"], [3, 1, 2], ["a", "b", "c"]])
def test_a_grey_file_ignores_the_choice_of_channels(tmp_path: Path, ending: str, channels: list):
    for name, image in (("grey", GREY), ("grey as RGB", np.dstack([GREY] * 3))):
        path = tmp_path / f"{name}.{ending}"
        Image.fromarray(image).save(path)
        file = open_image(path, channels=channels)
        np.testing.assert_array_equal(file.pages[0].pixels, open_image(path).pages[0].pixels)
        assert sum("one channel, which was taken" in note for note in file.notes) == 1


def test_a_name_that_a_colour_image_does_not_have_fails(tmp_path: Path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(ImageChoiceError, match="no channel DAPI: it has 3 channels: 1 red, 2 green, 3 blue"):
        open_image(tmp_path / "a.png", channels=["DAPI"])
    np.testing.assert_array_equal(
        open_image(tmp_path / "a.png", channels=["Blue"]).pages[0].pixels, grey_bgr(RGB[..., 2])
    )


def test_options_are_checked_before_files():
    assert checked_channels("DAPI, 2,gfp") == ("DAPI", 2, "gfp")
    assert checked_channels((2,)) == (2,) and checked_axes("tzyx") == "TZYX"
    for channels in ("", "1,2", "0", "-1", "a,b,", []):
        with pytest.raises(ValueError, match="channels: expected one or three"):
            checked_channels(channels)
    for axes in ("QQ", "", "YYX", "TZ", "Y X", "12YX"):
        with pytest.raises(ValueError, match="axes: expected letters with Y and X once each"):
            checked_axes(axes)


def test_axes_of_a_plain_image_are_not_needed(tmp_path: Path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert "not needed" in open_image(tmp_path / "a.png", axes="ZYX").notes[0]
    with pytest.raises(ValueError, match="axes: expected letters"):
        open_image(tmp_path / "a.png", axes="QQ")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((40, 60, 4), {"photometric": "minisblack"}),
        ((40, 60, 2), {"photometric": "minisblack"}),
        ((4, 40, 60), {"photometric": "minisblack"}),
        ((2, 5, 40, 60), {"photometric": "minisblack"}),
        ((5, 40, 60, 3), {"photometric": "minisblack", "planarconfig": None}),
        ((2, 3, 4, 40, 60), {"photometric": "minisblack"}),
        ((2, 2, 3, 4, 40, 60), {"photometric": "minisblack"}),
        ((2, 40, 60, 3), {"photometric": "rgb", "metadata": {"axes": "CYXS"}}),
        ((40, 60, 4), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((4, 40, 60), {"photometric": "minisblack", "planarconfig": "separate"}),
    ],
)
def test_what_a_message_says_to_type_works(tmp_path: Path, shape: tuple[int, ...], options: dict):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    with pytest.raises(ImageChoiceError) as error:
        open_image(tmp_path / "a.tif")
    ways = advice_of(str(error.value))
    assert ways
    for way in ways:
        pages = open_image(tmp_path / "a.tif", **way).pages
        # Rows and columns are those of the image.
        assert {page.pixels.shape[:2] for page in pages} == {(40, 60)}, way


def advice_of(message: str) -> list[dict]:
    """The options in the advice of a message, one dict for each way."""
    ways: list[dict] = []
    words = shlex.split(message.split(";")[-1].replace(",", " "))
    for option, value in zip(words, words[1:], strict=False):
        if option == "--axes":
            ways.append({"axes": value})
        elif option == "--channels":
            ways = ways or [{}]
            ways[-1]["channels"] = checked_channels(value)
    return ways


# Grey images in colours


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("tint", [(0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1), (0.1, 0.4, 1)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_grey_image_in_one_colour_is_grey(tmp_path: Path, dtype: type, tint: tuple, ending: str):
    grey = cells().astype(dtype) * (257 if dtype == np.uint16 else 1)
    rgb = np.stack([np.rint(grey * part) for part in tint], axis=2).astype(dtype)
    path = tmp_path / f"a.{ending}"
    if ending == "tif":
        tifffile.imwrite(path, rgb, photometric="rgb", metadata=None)
    else:
        cv2.imwrite(str(path), rgb[..., ::-1])
    file = open_image(path)
    np.testing.assert_array_equal(file.pages[0].pixels, grey_bgr(grey))
    assert file.pages[0].pixels.strides[2] == 0 and file.pages[0].planes.shape == (1, *grey.shape)
    assert len(file.notes) == 1 and "read as one grey image" in file.notes[0]


@pytest.mark.parametrize("quality", [75, 90, 95])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_jpeg_in_one_colour_is_grey(tmp_path: Path, quality: int, channel: int):
    rgb = np.zeros((64, 96, 3), np.uint8)
    rgb[..., channel] = cells()
    Image.fromarray(rgb).save(tmp_path / "a.jpg", quality=quality)
    file = open_image(tmp_path / "a.jpg")
    assert file.pages[0].pixels.strides[2] == 0 and "grey" in file.notes[0]
    assert np.abs(file.pages[0].pixels.astype(int) - grey_bgr(cells())).mean() < 6


@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_images_of_two_colours_are_left_alone(tmp_path: Path, ending: str):
    two = np.zeros((64, 96, 3), np.uint8)
    two[..., 2], two[..., 1] = cells(), cells((64, 96))[::-1] // 2
    dim = two.copy()
    dim[..., 1] //= 4
    stained = np.clip(235 - np.stack([cells() // 3, cells() // 2, cells() // 4], axis=2) + RGB[:1, :1] % 9, 0, 255)
    for name, image in (("two", two), ("dim", dim), ("stained", stained.astype(np.uint8))):
        path = tmp_path / f"{name}.{ending}"
        Image.fromarray(image).save(path)
        file = open_image(path)
        assert file.notes == () and file.pages[0].chosen == (1, 2, 3)
        assert file.pages[0].channel_names == ("red", "green", "blue")
        if ending != "jpg":
            np.testing.assert_array_equal(file.pages[0].pixels, image[..., ::-1])


def test_drawings_in_one_colour_are_left_alone(tmp_path: Path):
    """A mask of one colour, as some datasets have them, is no grey image."""
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[10:30, 10:30] = (0, 0, 200)
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), mask[..., ::-1])


def test_a_lookup_table_of_imagej_is_no_colour(tmp_path: Path):
    table = np.zeros((3, 256), np.uint16)
    table[2] = np.arange(256) * 257  # blue
    tifffile.imwrite(
        tmp_path / "a.tif", GREY, photometric="palette", colormap=table, description="ImageJ=1.54\n", metadata=None
    )
    file = open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(file.pages[0].pixels, grey_bgr(GREY))


# Label images


def test_lookup_tables_of_channels_are_no_colours(tmp_path: Path):
    """An OME-TIFF shows each channel by a table of its own; they are channels all the same."""
    tables = np.zeros((3, 256), np.uint16)
    tables[1] = np.arange(256)[::-1] * 257
    planes = np.stack([GREY, GREY[::-1]])
    options = {"photometric": "palette", "colormap": tables, "metadata": {"axes": "CYX"}}
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, ome=True, **options)
    file = open_image(tmp_path / "a.ome.tif", ask=False)
    assert len(file.pages) == 1 and not file.pages[0].chosen
    np.testing.assert_array_equal(file.pages[0].planes, planes)
    assert any("lookup tables" in note for note in file.notes)


@pytest.mark.parametrize("names", [["Red", "Green", "Blue"], ["Blue", "Red", "Green"]])
def test_channels_called_red_green_and_blue_are_a_colour_image(tmp_path: Path, names: list[str]):
    """A composite of ImageJ; others must be chosen from, see above."""
    three_channels(tmp_path / "a.ome.tif", names)
    planes = dict(zip(names, STACK[0, 0], strict=True))
    (page,) = open_image(tmp_path / "a.ome.tif").pages
    assert page.chosen == tuple(1 + names.index(name) for name in ("Red", "Green", "Blue"))
    np.testing.assert_array_equal(page.pixels, np.dstack([planes["Blue"], planes["Green"], planes["Red"]]))


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_palette_labels_are_indices(tmp_path: Path, ending: str):
    labels = (np.arange(40 * 60).reshape(40, 60) // 100).astype(np.uint8)
    picture = Image.frombytes("P", (60, 40), labels.tobytes())
    picture.putpalette([0, 0, 0, *RNG.integers(1, 255, 765).tolist()])
    picture.save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(read_label_image(tmp_path / f"a.{ending}"), labels)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", ">i4", ">u4", "<f4", ">f4", "<f8", "<f2", "<i8"])
def test_labels_of_any_type_of_whole_numbers(tmp_path: Path, dtype: str):
    labels = (np.arange(40 * 60).reshape(40, 60) // 100).astype(dtype)
    byteorder = ">" if dtype.startswith(">") else "<"
    tifffile.imwrite(tmp_path / "a.tif", labels, byteorder=byteorder, metadata=None)
    read = read_label_image(tmp_path / "a.tif")
    assert read.dtype.kind in "iu" and read.dtype.isnative and read.ndim == 2
    np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_labels_in_three_equal_channels(tmp_path: Path, alpha: bool, dtype: type, ending: str):
    labels = (np.arange(40 * 60).reshape(40, 60) // 100).astype(dtype)
    layers = np.dstack([labels] * 3 + [np.full_like(labels, np.iinfo(dtype).max)] * alpha)
    if ending == "tif":
        tifffile.imwrite(
            tmp_path / "a.tif", layers, photometric="rgb", extrasamples=["unassalpha"] if alpha else None, metadata=None
        )
    else:
        cv2.imwrite(str(tmp_path / "a.png"), layers)
    np.testing.assert_array_equal(read_label_image(tmp_path / f"a.{ending}"), labels)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: Image.fromarray(RGB).save(path, "png"), "got colours: save the numbers"),
        (lambda path: Image.fromarray(GREY).save(path, "jpeg"), "got a JPEG, which does not keep numbers"),
        (lambda path: tifffile.imwrite(path, np.full((9, 9), 0.5, np.float32)), "no whole numbers"),
        (lambda path: tifffile.imwrite(path, np.full((9, 9), np.nan, np.float32)), "no whole numbers"),
        (lambda path: tifffile.imwrite(path, np.full((9, 9), -1.0, np.float32)), "from 0, got -1"),
        (lambda path: tifffile.imwrite(path, np.full((9, 9), -1, np.int16)), "from 0, got -1"),
        (lambda path: tifffile.imwrite(path, STACK[0, :, 0], metadata=None, photometric="minisblack"), "4 pages"),
        (lambda path: tifffile.imwrite(path, np.zeros((9, 9), np.complex64)), "got complex64"),
        (lambda path: path.write_text("a,b"), "cannot be read as a label image: it is corrupt, or no TIFF, PNG"),
        (lambda path: path.write_bytes(b""), "cannot be read as a label image: it is empty"),
    ],
)
def test_what_is_no_label_image_is_refused(tmp_path: Path, write, message: str):
    path = tmp_path / "a.tif"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        read_label_image(path)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).count(str(path)) == 1


# Other formats and messages


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_bmp(tmp_path: Path, mode: str):
    image = Image.fromarray(RGB).convert(mode)
    image.save(tmp_path / "a.bmp")
    expected = np.asarray(image.convert("RGB"))[..., ::-1]
    np.testing.assert_array_equal(read_image(tmp_path / "a.bmp"), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.czi", '.czi files need a reader that is not installed: pip install "kg_detectron[formats]"'),
        ("a.nd2", '.nd2 files need a reader that is not installed: pip install "kg_detectron[formats]"'),
        ("a.lif", '.lif files need a reader that is not installed: pip install "kg_detectron[formats]"'),
        ("a.oir", "an Olympus file cannot be read: save it as OME-TIFF"),
        ("a.dat", "it is corrupt, or no TIFF, PNG, JPEG, BMP, GIF or PPM image"),
    ],
)
def test_files_of_other_formats_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
):
    monkeypatch.setattr(microscope, "is_installed", lambda ending: False)
    path = tmp_path / name
    path.write_bytes(b"ZISRAWFILE" + bytes(100))
    with pytest.raises(ValueError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: cannot be read as an image: {message}")
    assert str(error.value).count(name) == 1


def test_a_zarr_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.ome.zarr").mkdir()
    (tmp_path / "a.ome.zarr" / ".zattrs").write_text("{}")
    monkeypatch.setattr("kg_detectron.io.ome_zarr.is_zarr_installed", lambda: False)
    with pytest.raises(ValueError, match=r'a\.ome\.zarr: .*not installed: pip install "kg_detectron\[zarr\]"'):
        read_image(tmp_path / "a.ome.zarr")


class FakeReader:
    """What `bioio.BioImage` has, of two scenes of TCZYX."""

    scenes = ("well A", "well B")
    channel_names = ["DAPI", "GFP"]

    def __init__(self, path: Path, reader: object) -> None:
        self.set_scene(self.scenes[0])

    def set_scene(self, name: str) -> None:
        self.data = STACK[:, :, :2] + self.scenes.index(name)

    @property
    def dims(self) -> object:
        t, z, c, y, x = self.data.shape
        return type("Dims", (), {"order": "TZCYX", "shape": self.data.shape, "T": t, "Z": z, "C": c, "Y": y, "X": x})

    @property
    def physical_pixel_sizes(self) -> object:
        return type("Sizes", (), {"Z": None, "Y": 0.5, "X": 0.5})

    def get_image_data(self, order: str) -> np.ndarray:
        return self.data.transpose(["TZCYX".index(axis) for axis in order])


def test_a_microscopes_file_is_read_by_bioio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    modules = {"bioio": type("bioio", (), {"BioImage": FakeReader}), "bioio_czi": type("bioio_czi", (), {"Reader": 1})}
    monkeypatch.setattr(microscope, "is_installed", lambda ending: ending == ".czi")
    monkeypatch.setattr(microscope.importlib, "import_module", modules.__getitem__)
    (tmp_path / "a.czi").write_bytes(b"ZISRAWFILE")
    file = open_image(tmp_path / "a.czi", channels=["gfp"])
    assert len(file.pages) == 2 * 8 and file.pixel_size == 0.5 and file.pixel_size_source == "bioio"
    assert file.pages[9].position == {"scene": "well B", "t": 0, "z": 1}
    np.testing.assert_array_equal(file.pages[9].pixels, grey_bgr(STACK[0, 1, 1] + 1))
    assert len(open_image(tmp_path / "a.czi", channels=[1], scene="well b").pages) == 8
    with pytest.raises(ValueError, match=r"a\.czi: .*60 x 40 pixels on 8 pages, more than the limit"):
        open_image(tmp_path / "a.czi", max_pixels=100)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jpeg_2000_keeps_its_levels(tmp_path, dtype, channels):
    pixels = np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (40, 50, channels), dtype)
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(pixels.squeeze(), level=0, reversible=True))
    expected = grey_bgr(pixels[..., 0]) if channels == 1 else pixels[..., 2::-1]
    np.testing.assert_array_equal(read_image(tmp_path / "a.jp2"), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_is_read_as_other_pictures(tmp_path, channels):
    pixels = np.random.default_rng(channels).integers(0, 256, (40, 50, channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.webp", lossless=True, exact=True)
    expected = grey_bgr(pixels[..., 0]) if channels == 1 else pixels[..., 2::-1]
    np.testing.assert_array_equal(read_image(tmp_path / "a.webp"), expected)


def test_pictures_of_webp_and_jpeg_2000_have_the_limits_of_others(tmp_path):
    frames = [Image.fromarray(np.full((40, 50, 3), level, np.uint8)) for level in (0, 99)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="it holds 2 frames, expected one image"):
        open_image(tmp_path / "moving.webp")
    frames[1].save(tmp_path / "a.webp")
    frames[1].save(tmp_path / "a.jp2")
    for name in ("a.webp", "a.jp2"):
        with pytest.raises(ValueError, match="more than the limit of 1999"):
            open_image(tmp_path / name, max_pixels=1999)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name):
            open_image(tmp_path / name)
    at = content.index(b"\xff\x4f\xff\x51") + 8  # the size in the codestream, behind the one in the boxes
    (tmp_path / "a.jp2").write_bytes(content[:at] + struct.pack(">II", 50_000, 40_000) + content[at + 8 :])
    with pytest.raises(ValueError, match="its headers claim different sizes"):
        open_image(tmp_path / "a.jp2")

"""Reading and writing images."""

import io
import struct
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from kg_detectron.io import images
from kg_detectron.io.images import decode_image, read_image, read_pages, write_png

RNG = np.random.default_rng(0)
RGB16 = RNG.integers(0, 2**16, (6, 9, 3), dtype=np.uint16)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = RGB[..., 2:]


def bgr(image: np.ndarray) -> np.ndarray:
    """RGB or grey -> BGR of three channels."""
    return np.stack([image] * 3, axis=2) if image.ndim == 2 else image[..., ::-1]


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("image", [GREY, RGB, np.dstack([RGB, ALPHA])], ids=["grey", "rgb", "rgba"])
def test_8_bit(tmp_path: Path, ending: str, image: np.ndarray):
    path = tmp_path / f"image.{ending}"
    Image.fromarray(image).save(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, bgr(image[..., :3] if image.ndim == 3 else image))


def test_jpeg(tmp_path: Path):
    path = tmp_path / "image.jpg"
    smooth = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (16, 1))
    Image.fromarray(np.dstack([smooth, smooth // 2, smooth // 4])).save(path, quality=100, subsampling=0)
    difference = read_image(path).astype(int) - np.dstack([smooth // 4, smooth // 2, smooth])
    assert np.abs(difference).max() <= 4


def test_grey_with_alpha(tmp_path: Path):
    Image.fromarray(np.dstack([GREY, ALPHA]), "LA").save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), bgr(GREY))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path: Path, ending: str, transparent: bool):
    image = Image.fromarray(RGB).quantize(8)
    image.save(tmp_path / f"image.{ending}", **({"transparency": 1} if transparent and ending == "png" else {}))
    np.testing.assert_array_equal(read_image(tmp_path / f"image.{ending}"), bgr(np.asarray(image.convert("RGB"))))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_1_bit(tmp_path: Path, ending: str):
    Image.fromarray(GREY > 99).save(tmp_path / f"image.{ending}")
    read = read_image(tmp_path / f"image.{ending}")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, bgr(np.where(GREY > 99, 255, 0)))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit(tmp_path: Path, ending: str, channels: int):
    path = tmp_path / f"image.{ending}"
    image = np.dstack([RGB16, RGB16[..., :1]])[..., :channels].squeeze()
    if ending == "tif":
        tifffile.imwrite(path, image, photometric="minisblack" if channels == 1 else "rgb")
    else:
        cv2.imwrite(str(path), image if channels == 1 else image[..., [2, 1, 0, 3][:channels]])
    read = read_image(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, bgr(image if channels == 1 else image[..., :3]))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("image", [GREY, RGB], ids=["grey", "rgb"])
def test_other_types_keep_their_values(tmp_path: Path, dtype: type, image: np.ndarray):
    image = (image.astype(np.float64) * 300 - 20000).astype(dtype)
    if np.dtype(dtype).kind == "f":
        image[1, 2] = np.nan
    tifffile.imwrite(tmp_path / "image.tif", image, photometric="rgb" if image.ndim == 3 else "minisblack")
    read = read_image(tmp_path / "image.tif")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, bgr(image))


def test_complex_numbers_are_refused(tmp_path: Path):
    tifffile.imwrite(tmp_path / "waves.tif", np.zeros((4, 5), np.complex64))
    with pytest.raises(ValueError, match=r"waves\.tif.*complex64"):
        read_image(tmp_path / "waves.tif")


def test_tiff_planes_and_white_is_zero(tmp_path: Path):
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "planes.tif"), bgr(RGB))
    tifffile.imwrite(tmp_path / "white.tif", 255 - GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "white.tif"), bgr(GREY))


@pytest.mark.parametrize("image", [GREY, RGB, RGB16[..., 0]], ids=["grey", "rgb", "grey16"])
def test_tiff_lzw(tmp_path: Path, image: np.ndarray):
    """The compression most microscopes' software writes; tifffile alone cannot read it."""
    Image.fromarray(image).save(tmp_path / "image.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), bgr(image))


STACK = np.random.default_rng(1).integers(0, 2**16, (2, 3, 6, 9), dtype=np.uint16)


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({"imagej": True, "metadata": {"axes": "TZYX"}}, None),
        ({"ome": True, "metadata": {"axes": "TZYX"}}, None),
        ({"metadata": {"axes": "TZYX"}, "compression": "zlib"}, None),
        ({"metadata": None}, None),  # plain pages
        ({}, "TZYX"),
        ({"metadata": {"axes": "TCYX"}}, "TZYX"),  # declared wrongly
    ],
    ids=["imagej", "ome", "zlib", "plain", "axes", "override"],
)
def test_pages_of_a_stack(tmp_path: Path, options: dict, axes: str | None):
    stack = STACK.reshape(-1, 6, 9) if options.get("metadata", {}) is None else STACK
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack", **options)
    pages = read_pages(tmp_path / "stack.tif", axes=axes)
    np.testing.assert_array_equal(pages, [bgr(page) for page in STACK.reshape(-1, 6, 9)])
    with pytest.raises(ValueError, match=r"stack\.tif"):
        read_image(tmp_path / "stack.tif")


def test_pages_of_colour_and_of_several_sizes(tmp_path: Path):
    tifffile.imwrite(tmp_path / "film.tif", np.stack([RGB, 255 - RGB]), photometric="rgb", metadata={"axes": "TYXS"})
    np.testing.assert_array_equal(read_pages(tmp_path / "film.tif"), [bgr(RGB), bgr(255 - RGB)])
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as file:
        file.write(GREY)
        file.write(GREY[:4])
    first, second = read_pages(tmp_path / "sizes.tif")
    np.testing.assert_array_equal(first, bgr(GREY))
    np.testing.assert_array_equal(second, bgr(GREY[:4]))


def test_pages_in_lzw(tmp_path: Path):
    pages = [Image.fromarray(page) for page in STACK[0]]
    pages[0].save(tmp_path / "lzw.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    np.testing.assert_array_equal(read_pages(tmp_path / "lzw.tif"), [bgr(page) for page in STACK[0]])


@pytest.mark.parametrize(
    ("array", "options", "axes"),
    [
        (STACK, {"imagej": True, "metadata": {"axes": "ZCYX"}}, None),
        (STACK, {"ome": True, "metadata": {"axes": "ZCYX"}}, None),
        (STACK, {}, "ZCYX"),
        (np.moveaxis(STACK, 1, 3)[0], {"planarconfig": "contig"}, None),
        (STACK[0], {"planarconfig": "separate"}, None),
        (STACK[0], {}, "CYX"),
    ],
    ids=["imagej", "ome", "axes", "contiguous", "separate", "axes of one"],
)
def test_channels(tmp_path: Path, array: np.ndarray, options: dict, axes: str | None):
    path = tmp_path / "channels.tif"
    tifffile.imwrite(path, array, photometric="minisblack", **options)
    planes = STACK if array.ndim == 4 else STACK[:1]
    with pytest.raises(ValueError, match="it has 3 channels.*--channels"):
        read_pages(path, axes=axes)
    with pytest.raises(ValueError, match="no channel 4"):
        read_pages(path, axes=axes, channels=[4])
    np.testing.assert_array_equal(read_pages(path, axes=axes, channels=[2]), [bgr(page[1]) for page in planes])
    picked = read_pages(path, axes=axes, channels=(3, 1, 2))  # red, green, blue
    np.testing.assert_array_equal(picked, [np.moveaxis(page[[1, 0, 2]], 0, 2) for page in planes])


def test_channel_of_a_colour_image(tmp_path: Path):
    write_png(tmp_path / "image.png", bgr(RGB))
    np.testing.assert_array_equal(read_pages(tmp_path / "image.png", channels=[3])[0], bgr(RGB[..., 2]))
    for channels in ([], [1, 2], [0]):
        with pytest.raises(ValueError, match="channels: expected one or three"):
            read_pages(tmp_path / "image.png", channels=channels)


@pytest.mark.parametrize("shape", [(5, 6, 9), (2, 5, 6, 9)])
def test_ambiguous_axes(tmp_path: Path, shape: tuple):
    path = tmp_path / "what.tif"
    tifffile.imwrite(path, np.zeros(shape, np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"what\.tif.*ambiguous.*--axes"):
        read_pages(path)
    for axes in ("YX", "ZCTYX", "ZCTX"[-len(shape) :], "ZZYX"[-len(shape) :] if len(shape) == 4 else "YYX"):
        with pytest.raises(ValueError, match=rf"--axes {axes} does not fit"):
            read_pages(path, axes=axes)


def test_axes_are_of_stacks_alone(tmp_path: Path):
    """A folder may hold plain images beside the stacks that ``axes`` is meant for."""
    for name, image in (("grey", GREY), ("colour", RGB)):
        Image.fromarray(image).save(tmp_path / f"{name}.tif")
        np.testing.assert_array_equal(read_pages(tmp_path / f"{name}.tif", axes="CYX")[0], bgr(image))


def test_largest_level_of_a_pyramid(tmp_path: Path):
    image = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(image, subifds=1, photometric="rgb", tile=(32, 32))
        file.write(image[::2, ::2], subfiletype=1, photometric="rgb", tile=(32, 32))
        file.write(image[:9, :9], photometric="rgb")  # a thumbnail
    (page,) = read_pages(tmp_path / "slide.tif")
    np.testing.assert_array_equal(page, bgr(image))


def test_large_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_MAP_FROM", 1)
    tifffile.imwrite(tmp_path / "slide.tif", RGB, photometric="rgb")
    (page,) = read_pages(tmp_path / "slide.tif")
    base = page
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    np.testing.assert_array_equal(page, bgr(RGB))


def bomb(ending: str, width: int, height: int) -> bytes:
    """A file of a few hundred bytes whose header claims a size."""
    if ending == "png":
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in body
        )
    small = io.BytesIO()
    tifffile.imwrite(small, GREY, compression="zlib" if ending == "zlib.tif" else None, metadata=None)
    with tifffile.TiffFile(io.BytesIO(small.getvalue())) as tiff:
        tags = tiff.pages[0].tags
        places = [(tags[name].valueoffset, value) for name, value in (("ImageWidth", width), ("ImageLength", height))]
        data = bytearray(small.getvalue())
    for place, value in places:
        data[place : place + 4] = struct.pack("<I", value)
        data[place - 6 : place - 4] = struct.pack("<H", 4)  # the type: 32 bits
    return bytes(data)


@pytest.mark.parametrize("ending", ["png", "tif", "zlib.tif"])
def test_absurd_sizes_are_refused_with_their_numbers(tmp_path: Path, ending: str):
    path = tmp_path / f"bomb.{ending}"
    path.write_bytes(bomb(ending, 60000, 50000))
    with pytest.raises(ValueError, match=r"bomb\..*60000 x 50000 pixels.*limit of 1000000000 \(--max-pixels\)"):
        read_pages(path)
    path.write_bytes(bomb(ending, 20000, 100))
    with pytest.raises(ValueError, match=r"20000 x 100 pixels.*limit of 1999999"):
        read_pages(path, max_pixels=1999999)
    with pytest.raises(ValueError, match="cannot be read") as error:  # not for its size, but for what is missing
        read_pages(path, max_pixels=2000000)
    assert "limit" not in str(error.value)


def test_compressed_stacks_are_limited_as_a_whole(tmp_path: Path):
    tifffile.imwrite(
        tmp_path / "stack.tif", STACK, photometric="minisblack", metadata={"axes": "TZYX"}, compression="zlib"
    )
    with pytest.raises(ValueError, match="9 x 6 pixels on 6 pages, more than the limit of 323"):
        read_pages(tmp_path / "stack.tif", max_pixels=323)
    assert len(read_pages(tmp_path / "stack.tif", max_pixels=324)) == 6


def test_a_png_above_pillows_own_limit_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    write_png(tmp_path / "large.png", RGB)
    np.testing.assert_array_equal(read_image(tmp_path / "large.png"), RGB)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_animation_and_print_colours(tmp_path: Path):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"film\.gif.*2 frames"):
        read_image(tmp_path / "film.gif")
    frames[0].convert("CMYK").save(tmp_path / "print.jpg")
    with pytest.raises(ValueError, match=r"print\.jpg.*CMYK"):
        read_image(tmp_path / "print.jpg")


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError, match="folder"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", b"\x89PNG", b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10\x02", b"II*\0", b"II*\0garbage", b"MM\0*"],
)
def test_not_an_image(tmp_path: Path, content: bytes):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png: cannot be read as an image"):
        read_image(tmp_path / "bad.png")


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [("png", np.uint8), ("png", np.uint16), ("jpg", np.uint8), ("tif", np.uint8), ("tif", np.uint16)],
)
def test_truncated(tmp_path: Path, ending: str, dtype: type):
    path = tmp_path / f"cut.{ending}"
    image = RNG.integers(0, np.iinfo(dtype).max, (40, 50, 3), dtype=dtype)
    if ending == "tif":
        tifffile.imwrite(path, image, photometric="rgb")
    else:
        cv2.imwrite(str(path), image)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\."):
        read_image(path)


def test_flipped_bit_in_png(tmp_path: Path):
    write_png(tmp_path / "flip.png", RGB)
    data = bytearray((tmp_path / "flip.png").read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="flip"):
        decode_image(bytes(data), "flip")


@given(
    npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
    st.booleans(),
)
def test_write_and_read_back(image: np.ndarray, grey: bool):

    if grey:
        image = np.repeat(image[..., :1], 3, axis=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        write_png(path, image)
        np.testing.assert_array_equal(read_image(path), image)
        colour_type = path.read_bytes()[25]
    is_grey = (image == image[..., :1]).all()
    assert colour_type == (0 if is_grey else 2)


def test_write_rounds_and_clips(tmp_path: Path):
    values = np.array([-3.0, 0.4, 0.6, 254.6, 300.0], np.float32)
    write_png(tmp_path / "image.png", np.repeat(values[None, :, None], 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "image.png")[0, :, 0], [0, 0, 1, 255, 255])


@given(
    npst.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.uint32, np.float32]),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    ),
    st.permutations("TCYX"),
    st.sampled_from([None, "zlib"]),
    st.data(),
)
def test_stacks_of_any_axis_order_read_back(stack: np.ndarray, order: list[str], compression: str | None, data):
    """Written T, C, Y, X in any order, every time's every channel comes back, whatever has length 1."""
    axes = "".join(order)
    channel = data.draw(st.integers(1, stack.shape[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stack.tif"
        written = np.ascontiguousarray(stack.transpose(["TCYX".index(axis) for axis in order]))
        tifffile.imwrite(path, written, photometric="minisblack", metadata={"axes": axes}, compression=compression)
        pages = read_pages(path, channels=[channel])
        np.testing.assert_array_equal(pages, [bgr(time[channel - 1]) for time in stack])

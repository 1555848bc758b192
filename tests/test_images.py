"""Reading and writing images."""

import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from kg_detectron.io.images import decode_image, read_image, write_png

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
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, bgr(image if channels == 1 else image[..., :3]) / 257, rtol=1e-6)


@pytest.mark.parametrize("image", [GREY, RGB], ids=["grey", "rgb"])
def test_16_bit_equals_8_bit_times_257(image: np.ndarray):
    eight, sixteen = (cv2.imencode(".png", pixels)[1].tobytes() for pixels in (image, image.astype(np.uint16) * 257))
    np.testing.assert_array_equal(decode_image(sixteen, "16"), decode_image(eight, "8"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("image", [GREY, RGB], ids=["grey", "rgb"])
def test_float(tmp_path: Path, dtype: type, image: np.ndarray):
    tifffile.imwrite(
        tmp_path / "image.tif", (image / 255).astype(dtype), photometric="rgb" if image.ndim == 3 else "minisblack"
    )
    read = read_image(tmp_path / "image.tif")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, bgr(image), atol=0.2 if dtype == np.float16 else 1e-4)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_float_out_of_range(tmp_path: Path, value: float):
    image = np.full((4, 5), 0.5, np.float32)
    image[1, 2] = value
    tifffile.imwrite(tmp_path / "wild.tif", image)
    with pytest.raises(ValueError, match=r"wild\.tif.*expected 0\.\.1"):
        read_image(tmp_path / "wild.tif")


def test_tiff_planes_and_white_is_zero(tmp_path: Path):
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "planes.tif"), bgr(RGB))
    tifffile.imwrite(tmp_path / "white.tif", 255 - GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "white.tif"), bgr(GREY))


@pytest.mark.parametrize("image", [GREY, RGB, RGB16[..., 0]], ids=["grey", "rgb", "grey16"])
def test_tiff_lzw(tmp_path: Path, image: np.ndarray):
    """The compression most microscopes' software writes; tifffile alone cannot read it."""
    Image.fromarray(image).save(tmp_path / "image.tif", compression="tiff_lzw")
    expected = bgr(image) / (257 if image.dtype == np.uint16 else 1)
    np.testing.assert_allclose(read_image(tmp_path / "image.tif"), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 6, 9), {"photometric": "minisblack"}),
        ((5, 6, 9), {"imagej": True, "metadata": {"axes": "ZYX"}}),
        ((6, 9, 2), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((6, 9, 5), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((3, 6, 9, 3), {"photometric": "rgb"}),
    ],
)
def test_tiff_that_is_no_single_image(tmp_path: Path, shape: tuple, options: dict):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros(shape, np.uint8), **options)
    with pytest.raises(ValueError, match=r"stack\.tif.*it has axes"):
        read_image(tmp_path / "stack.tif")


@pytest.mark.parametrize("dtype", [np.int16, np.uint32])
def test_type_not_understood(tmp_path: Path, dtype: type):
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((4, 5), dtype))
    with pytest.raises(ValueError, match=rf"deep\.tif.*{np.dtype(dtype)}"):
        read_image(tmp_path / "deep.tif")


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

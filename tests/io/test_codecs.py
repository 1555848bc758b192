"""TIFFs in every codec that tifffile and imagecodecs can write: each is read right, or refused; none is black."""

import itertools
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from kg_detectron.io.images import read_image, read_pages
from kg_detectron.io.labels import read_label_image

CODECS = [codec.name for codec in tifffile.COMPRESSION]
BYTES = {"NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PIXTIFF", "PACKBITS", "LZMA", "ZSTD", "ZSTD_DEPRECATED"}
# How far levels of a smooth image may be off, as a part of the largest.
TOLERANCE = {"JPEG": 0.02, "JPEG_LOSSY": 0.02, "JPEGXR": 1e-4, "JPEGXR_NDPI": 1e-4}
# Those that tifffile writes with imagecodecs' wheels for Linux; others may be missing elsewhere.
WRITTEN = {
    *("NONE", "LZW", "JPEG", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "JPEG2000", "LERC", "LZMA", "PNG", "JPEGXR"),
    *("ZSTD", "WEBP", "JPEGXL"),
}


def smooth(dtype: str, samples: int, size: tuple[int, int] = (48, 80)) -> np.ndarray:
    """(H, W) or (H, W, samples), alpha opaque."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.stack([0.5 + 0.5 * np.sin((y * (c + 1) + x * 2) / 25 + c) for c in range(max(samples, 1))], axis=2)
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    image = (waves * top).astype(dtype)
    if samples == 4:
        image[..., 3] = top
    return image[..., 0] if samples == 1 else image


def bgr(image: np.ndarray) -> np.ndarray:
    return np.stack([image] * 3, axis=2) if image.ndim == 2 else image[..., 2::-1]


def variants(codec: str) -> list[dict]:
    """All ways to write a TIFF in a codec that make sense; tifffile writes big-endian pixels wrong in image codecs."""
    predictors = (None, "horizontal", "floatingpoint") if codec in BYTES else (None,)
    orders = "<>" if codec in BYTES else "<"
    ways = itertools.product(("uint8", "uint16", "float32"), (1, 3, 4), (False, True), predictors, orders, (1, 2))
    return [
        {
            "dtype": dtype,
            "samples": samples,
            "options": {
                "compression": codec,
                "photometric": "minisblack" if samples == 1 else "rgb",
                "extrasamples": ["unassalpha"] if samples == 4 else None,
                "planarconfig": planar if samples > 1 else None,
                "predictor": predictor,
                "byteorder": byteorder,
                **({"tile": (32, 32)} if tiled else {"rowsperstrip": 20}),
            },
        }
        for dtype, samples, tiled, predictor, byteorder, planar in ways
        if not (predictor == "floatingpoint" and dtype != "float32")
        and not (planar == 2 and samples == 1)
        and not (codec.startswith("JPEG") and codec in TOLERANCE and "XR" not in codec and dtype == "uint16")  # 12 bits
        and (tiled, byteorder) in ((False, "<"), (True, orders[-1]))
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_read_right_or_refused(tmp_path: Path, codec: str):
    path, written, right = tmp_path / "image.tif", 0, 0
    for variant in variants(codec):
        image = smooth(variant["dtype"], variant["samples"])
        options = variant["options"]
        stored = np.moveaxis(image, 2, 0) if options["planarconfig"] == 2 else image
        try:
            tifffile.imwrite(path, stored, metadata=None, **options)
        except Exception:  # tifffile cannot write this
            continue
        written += 1
        try:
            read = read_image(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: cannot be read as an image: "), variant
            continue
        right += 1
        assert read.dtype == image.dtype.newbyteorder("="), variant
        differences = np.abs(read.astype(float) - bgr(image)) / image.max()
        difference = differences.mean() if "JPEG_LOSSY" in (codec, f"{codec}_LOSSY") else differences.max()
        is_exact = codec not in TOLERANCE or (codec.startswith("JPEGXR") and variant["dtype"] != "float32")
        assert difference <= (0 if is_exact else TOLERANCE[codec]), (variant, difference)
    if codec in WRITTEN:
        assert written > 0 and right == written, f"{written - right} of {written} refused"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("codec", sorted(WRITTEN - set(TOLERANCE)))
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "float32"])
def test_label_images_in_every_codec(tmp_path: Path, codec: str, dtype: str):
    labels = (np.arange(48 * 80).reshape(48, 80) // 40).astype(dtype)
    if codec == "JPEG2000" and labels.itemsize == 4:
        return  # written with rounding
    try:
        tifffile.imwrite(tmp_path / "labels.tif", labels, compression=codec, tile=(32, 32), metadata=None)
    except Exception:
        return
    read = read_label_image(tmp_path / "labels.tif")
    assert read.dtype.kind in "iu"
    np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "packbits", "tiff_lzw", "raw"])
def test_1_bit_of_facsimile_codecs(tmp_path: Path, compression: str):
    image = smooth("uint8", 1) > 99
    Image.fromarray(image).save(tmp_path / "image.tif", compression=compression)
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), bgr(np.where(image, 255, 0)))
    np.testing.assert_array_equal(read_label_image(tmp_path / "image.tif"), image)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits", "png"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_white_is_zero_in_every_codec(tmp_path: Path, compression: str | None, dtype: str, tile: tuple | None):
    image = smooth(dtype, 1)
    tifffile.imwrite(
        tmp_path / "image.tif", ~image, photometric="miniswhite", compression=compression, tile=tile, metadata=None
    )
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), bgr(image))


@pytest.mark.parametrize("codec", ["LZW", "ZSTD", "PNG", "JPEG2000", "JPEGXL", "JPEG", "ADOBE_DEFLATE", "PACKBITS"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_decode_that_fails_is_an_error(tmp_path: Path, codec: str, samples: int):
    """Bytes of the second half of every strip are gone."""
    path = tmp_path / "image.tif"
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)[: 2 + samples // 3], dtype=np.uint8)
    photometric = "minisblack" if samples == 1 else "rgb"
    tifffile.imwrite(path, image, compression=codec, photometric=photometric, metadata=None)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for offset, length in zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True):
            data[offset + length // 2 : offset + length] = bytes(length - length // 2)
    path.write_bytes(data)
    try:
        read = read_image(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: cannot be read as an image: ")
    else:  # codecs without checksums read on, but what is sound stays
        assert read.any()


@pytest.mark.parametrize("codec", ["PNG", "JPEG", "JPEG2000", "JPEGXL", "JPEGXR", "WEBP", "LERC"])
@pytest.mark.parametrize("read", [read_image, read_label_image])
def test_a_tile_of_absurd_size_is_refused_before_it_is_decoded(tmp_path: Path, codec: str, read):
    """The TIFF says 32 x 32; the header of the image in its tile says 2200 x 2100."""
    path = tmp_path / "bomb.tif"
    tifffile.imwrite(path, np.zeros((32, 32), np.uint8), compression="PNG", tile=(32, 32), metadata=None)
    large = np.zeros((2100, 2200), np.uint8)
    encode = {
        "PNG": imagecodecs.png_encode,
        "JPEG": imagecodecs.jpeg_encode,
        "JPEG2000": imagecodecs.jpeg2k_encode,
        "JPEGXL": imagecodecs.jpegxl_encode,
        "JPEGXR": imagecodecs.jpegxr_encode,
        "WEBP": lambda image: imagecodecs.webp_encode(np.stack([image] * 3, axis=2)),
        "LERC": imagecodecs.lerc_encode,
    }[codec]
    bomb = encode(large)
    with tifffile.TiffFile(path) as tiff:
        tags = tiff.pages[0].tags
        places = {name: tags[name].valueoffset for name in ("TileOffsets", "TileByteCounts", "Compression")}
    data = bytearray(path.read_bytes())
    values = {"TileOffsets": len(data), "TileByteCounts": len(bomb), "Compression": tifffile.COMPRESSION[codec].value}
    for name, place in places.items():
        if name != "Compression":
            data[place - 6 : place - 4] = (4).to_bytes(2, "little")  # the type: 32 bits
        size = 2 if name == "Compression" else 4
        data[place : place + size] = values[name].to_bytes(size, "little")
    path.write_bytes(bytes(data) + bomb)
    with pytest.raises(ValueError, match=r"bomb\.tif.*unpacks to 2200 x 2100 pixels, expected 32 x 32"):
        read(path)


def test_codecs_of_a_pyramid_of_a_slide(tmp_path: Path):
    """As Aperio's slides: JPEG 2000 in tiles, YCbCr."""
    rgb = smooth("uint8", 3, (128, 192))
    r, g, b = np.moveaxis(rgb.astype(float), 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycbcr = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], axis=2).round().clip(0, 255).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.svs") as tiff:
        tiff.write(
            ycbcr,
            photometric="ycbcr",
            subsampling=(1, 1),
            tile=(64, 64),
            compression="zlib",
            description="Aperio Image Library\n|AppMag = 20|MPP = 0.4990",
            metadata=None,
        )
    (page,) = read_pages(tmp_path / "slide.svs")
    assert np.abs(page.astype(int) - rgb[..., ::-1]).max() <= 2

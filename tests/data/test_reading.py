from __future__ import annotations

import os
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overfly.core.errors import DataError
from overfly.core.records import Array, Item
from overfly.data import headers
from overfly.data.headers import read_header
from overfly.data.reading import nodata_mask, read_image, read_index_label, read_label_pixels

RANDOM = np.random.default_rng(0)


def random_image(height: int = 6, width: int = 5, bands: int = 3, dtype: str = "uint8") -> Array:
    top = {"uint8": 256, "uint16": 65536}.get(dtype)
    values = RANDOM.random((height, width, bands)) if top is None else RANDOM.integers(0, top, (height, width, bands))
    return values.astype(dtype)


def tiff(path: Path, image: Array, **profile: Any) -> Path:
    import warnings

    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        height, width, count = image.shape
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=count, dtype=image.dtype, **profile
        ) as file:
            file.write(np.moveaxis(image, -1, 0))
    return path


def png16(path: Path, image: Array) -> Path:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), kind=st.sampled_from([("uint8", 1), ("uint8", 3), ("uint16", 1)])
)
def test_png_comes_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, kind: tuple[str, int]
) -> None:
    dtype, bands = kind
    image = random_image(height, width, bands, dtype)
    path = tmp_path_factory.mktemp("png") / "a.png"
    Image.fromarray(image[..., 0] if bands == 1 else image).save(path)
    read = read_image(path, bands=bands)
    assert read.dtype == dtype
    assert read.flags.writeable
    np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize(
    ("bands", "dtype"),
    [
        (1, "uint8"),
        (3, "uint8"),
        (4, "uint8"),
        (6, "uint8"),
        (1, "uint16"),
        (3, "uint16"),
        (2, "float32"),
        (8, "uint16"),
    ],
)
def test_tiff_comes_back_as_written(tmp_path: Path, bands: int, dtype: str) -> None:
    image = random_image(bands=bands, dtype=dtype)
    path = tiff(tmp_path / "a.tif", image)
    read = read_image(path, bands=bands)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, image)
    found = read_header(path)
    assert (found.height, found.width, found.dtype) == (6, 5, dtype)
    assert found.stored == dtype


def test_color_of_16_bits_keeps_all_of_them(tmp_path: Path) -> None:
    image = random_image(dtype="uint16")
    np.testing.assert_array_equal(read_image(png16(tmp_path / "a.png", image), bands=3), image)


def test_format_does_not_depend_on_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "really_jpeg.png"
    Image.fromarray(random_image(16, 16)).save(path, format="JPEG")
    assert read_image(path, bands=3).shape == (16, 16, 3)
    assert read_header(path).kind == "jpeg"


def test_a_jpeg_of_several_images_is_its_first(tmp_path: Path) -> None:
    path = tmp_path / "drone.jpg"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(
        path, format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    assert (read_image(path, bands=3) == 9).all()


def test_alpha_band_is_left_out_unless_bands_include_it(tmp_path: Path) -> None:
    image = random_image(bands=4)
    image[..., 3] = 255
    image[0, 0, 3] = 0
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    np.testing.assert_array_equal(read_image(path, bands=3), np.where(image[..., 3:] == 0, 0, image[..., :3]))
    np.testing.assert_array_equal(read_image(path, bands=4), image)
    mask = nodata_mask(path, bands=3)
    assert mask is not None
    assert np.argwhere(mask).tolist() == [[0, 0]]
    assert nodata_mask(path, bands=4) is None


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 0.0), ("uint16", 7.0), ("float32", -9999.0), ("float32", float("nan"))]
)
@pytest.mark.parametrize("bands", [1, 3])
def test_no_data_is_zero_and_masked(tmp_path: Path, dtype: str, nodata: float, bands: int) -> None:
    image = random_image(bands=bands, dtype=dtype)
    image = np.where(image == nodata, np.array(1, dtype), image)
    image[1:3, 2] = nodata
    image[4, 4, 0] = nodata
    path = tiff(tmp_path / "a.tif", image, nodata=nodata)
    read = read_image(path, bands=bands)
    assert np.isfinite(read).all()
    assert (read[1:3, 2] == 0).all()
    mask = nodata_mask(path, bands=bands)
    assert mask is not None
    assert mask[1:3, 2].all()
    assert mask.sum() == (3 if bands == 1 else 2)


def test_non_finite_pixels_are_no_data(tmp_path: Path) -> None:
    image = random_image(bands=2, dtype="float32")
    image[0, 1] = np.inf
    mask = nodata_mask(tiff(tmp_path / "a.tif", image), bands=2)
    assert mask is not None
    assert np.argwhere(mask).tolist() == [[0, 1]]


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize(("dtype", "bands"), [("uint8", 3), ("uint8", 1), ("uint16", 3), ("float32", 2)])
@pytest.mark.parametrize("inside", ["YES", "NO"])
def test_masked_pixels_are_no_data(tmp_path: Path, dtype: str, bands: int, inside: str) -> None:
    import rasterio

    image = np.maximum(random_image(64, 50, bands, dtype), 1)
    path = tiff(tmp_path / "a.tif", image)
    assert nodata_mask(path, bands=bands) is None
    shown = np.full((64, 50), 255, np.uint8)
    shown[:10, 20:] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(path, "r+") as file:
        file.build_overviews([2])
        file.write_mask(shown)
    assert read_header(path).masked
    np.testing.assert_array_equal(nodata_mask(path, bands=bands), shown == 0)
    np.testing.assert_array_equal(read_image(path, bands=bands), np.where(shown[..., None] == 0, 0, image))


def bad_image(kind: str, path: Path) -> None:
    whole = random_image(64, 64)
    if kind in ("png", "jpeg", "tiff"):
        Image.fromarray(whole).save(path, format=kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "corrupt":
        Image.fromarray(whole).save(path, format="png")
        data = bytearray(path.read_bytes())
        data[200:260] = bytes(60)
        path.write_bytes(data)
    elif kind == "palette":
        Image.fromarray(whole).quantize(8).save(path)
    elif kind == "gray":
        Image.fromarray(whole[..., 0]).save(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nothing":
        Image.fromarray(whole).save(path)
        start = path.read_bytes()
        path.write_bytes(start[:16] + bytes(8) + start[24:])
    elif kind != "missing":
        path.write_bytes(
            {
                "html": b"<!DOCTYPE html><html>",
                "empty": b"",
                "lfs": b"version https://git-lfs.github.com",
                "zip": b"PK\x03\x04",
            }[kind]
        )


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("png", "damaged"), ("jpeg", "damaged"), ("tiff", "damaged"),
        ("corrupt", "damaged"), ("palette", "palette"), ("gray", "1 band"),
        ("missing", "does not exist"), ("html", "web page"), ("empty", "empty"),
        ("lfs", "Git LFS"), ("zip", "archive"),
        ("folder", "folder"), ("pipe", "pipe"), ("device", "device"), ("nothing", "damaged"),
    ],
)  # fmt: skip
def test_damaged_image_is_an_error(tmp_path: Path, kind: str, match: str) -> None:
    path = tmp_path / "bad.png"
    bad_image(kind, path)
    with pytest.raises(DataError, match=match) as caught:
        read_image(path, bands=3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_too_large_images_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(random_image(20, 20)).save(path)
    monkeypatch.setattr(headers, "MAX_PIXELS", 399)
    with pytest.raises(DataError, match="million pixels"):
        read_image(path, bands=3)


def save_pair(folder: Path, label: Array, size: tuple[int, int] = (4, 4), **options: Any) -> Item:
    Image.fromarray(random_image(*size)).save(folder / "image.png")
    Image.fromarray(label).save(folder / "mask.png", **options)
    return Item("a", folder / "image.png", folder / "mask.png")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_of_few_bits_keeps_its_numbers(tmp_path: Path, bits: int) -> None:
    label = (np.arange(16).reshape(4, 4) % 2**bits).astype(np.uint8)
    item = save_pair(tmp_path, label)
    rows = b"".join(
        b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in label
    )
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    np.testing.assert_array_equal(read_index_label(item, 16), label)


def test_index_label_keeps_ids_and_ignored(tmp_path: Path) -> None:
    label = np.array([[0, 1], [2, 255]], np.uint8).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(read_index_label(save_pair(tmp_path, label), 3), label)


def test_label_out_of_range(tmp_path: Path) -> None:
    label = np.zeros((4, 4), np.uint8)
    label[1, 1] = 3
    with pytest.raises(DataError, match=r"mask\.png .*0 to 2 .*3"):
        read_index_label(save_pair(tmp_path, label), 3)


def test_label_of_16_bits_does_not_wrap(tmp_path: Path) -> None:
    label = np.full((4, 4), 256, np.uint16)
    with pytest.raises(DataError, match="256"):
        read_index_label(save_pair(tmp_path, label), 3)


def test_label_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mask\.png is 5×4 pixels.*image\.png is 4×4"):
        read_index_label(save_pair(tmp_path, np.zeros((4, 5), np.uint8)), 3)


def test_label_that_is_missing_a_jpeg_or_colors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no mask"):
        read_index_label(Item("a", tmp_path / "image.png"), 3)
    with pytest.raises(DataError, match="JPEG"):
        read_index_label(save_pair(tmp_path, np.zeros((4, 4), np.uint8), format="JPEG"), 3)
    with pytest.raises(DataError, match="colors"):
        read_index_label(save_pair(tmp_path, random_image(4, 4)), 3)
    with pytest.raises(DataError, match="2"):
        read_label_pixels(tiff(tmp_path / "a.tif", random_image(bands=2)))
    with pytest.raises(DataError, match=r"\.tif"):
        read_label_pixels(tiff(tmp_path / "a.tif", random_image(bands=1, dtype="float32")))


def test_generated_images_are_read() -> None:
    assert read_image(partial(np.ones, (4, 5)), bands=1).shape == (4, 5, 1)
    with pytest.raises(DataError, match=r"1 bands.* 3"):
        read_image(partial(np.ones, (4, 5)), bands=3)

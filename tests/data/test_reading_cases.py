"""Files that other tools write, each with its right value."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio import Affine

from overfly.core.errors import DataError
from overfly.core.records import Array, Item
from overfly.data import headers
from overfly.data.folder import Folder
from overfly.data.headers import open_raster, read_header
from overfly.data.reading import nodata_mask, read_image, read_item_label, read_label_pixels
from overfly.raster.raster_source import inspect_raster
from rasters import pointwise

GRID = {"crs": "EPSG:32633", "transform": Affine(1, 0, 5e5, 0, -1, 5e6)}


def origin(west: float, north: float, x: float = 1, y: float = 1) -> Affine:
    return Affine(x, 0, west, 0, -y, north)


def noise(height: int = 40, width: int = 60, bands: int = 3) -> Array:
    return np.random.default_rng(0).integers(1, 255, (height, width, bands), dtype=np.uint8)


def label(height: int = 40, width: int = 60) -> Array:
    return np.random.default_rng(1).integers(0, 3, (height, width), dtype=np.uint8)


def tiff(path: Path, image: Array, **profile: Any) -> Path:
    bands = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", "GTiff", bands.shape[2], bands.shape[1], len(bands), dtype=bands.dtype, **profile
        ) as file:
            file.write(bands)
    return path


def png(path: Path, image: Array) -> Path:
    Image.fromarray(image).save(path)
    return path


def folder(root: Path, **settings: Any) -> Folder:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return Folder(root=root, masks="masks", **{"classes": ["green", "gray", "blue"]} | settings)


@pytest.mark.parametrize("compress", ["none", "lzw"])
def test_blocks_that_were_never_written_are_zero(tmp_path: Path, compress: str) -> None:
    image = noise(100, 100)
    path = tmp_path / "a.tif"
    profile = {"tiled": True, "blockxsize": 32, "blockysize": 32, "photometric": "RGB", "SPARSE_OK": "TRUE"}
    with rasterio.open(path, "w", "GTiff", 100, 100, 3, dtype="uint8", compress=compress, **GRID, **profile) as file:
        file.write(np.moveaxis(image, -1, 0)[:, :32, :32], window=((0, 32), (0, 32)))
    read = read_image(path, bands=3)
    np.testing.assert_array_equal(read[:32, :32], image[:32, :32])
    assert not read[32:].any()
    assert not read[:, 32:].any()


def test_big_endian_floats(tmp_path: Path) -> None:
    image = (noise(bands=1) / 255).astype(np.float32)
    path = tiff(tmp_path / "a.tif", image, ENDIANNESS="BIG", compress="deflate")
    np.testing.assert_array_equal(read_image(path, bands=1), image)


@pytest.mark.parametrize("turn", [3, 6])
def test_images_are_turned_as_viewers_turn_them(tmp_path: Path, turn: int) -> None:
    image = noise()
    upright = image[::-1, ::-1] if turn == 3 else np.rot90(image, -1)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extratags=[(274, 3, 1, turn, True)])
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif.tobytes())
    Image.fromarray(image).save(tmp_path / "plain.jpg")
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif.tobytes())
    stored = read_image(tmp_path / "plain.jpg", bands=3)
    for name, right in {
        "a.tif": upright,
        "a.png": upright,
        "a.jpg": stored[::-1, ::-1] if turn == 3 else np.rot90(stored, -1),
    }.items():
        np.testing.assert_array_equal(read_image(tmp_path / name, bands=3), right)
        header = read_header(tmp_path / name)
        assert (header.orientation, (header.height, header.width)) == (turn, right.shape[:2])


def test_a_georeferenced_image_keeps_its_grid(tmp_path: Path) -> None:
    image = noise()
    tifffile.imwrite(
        tmp_path / "a.tif", image, photometric="rgb",
        extratags=[(274, 3, 1, 3, True), (33550, 12, 3, (1, 1, 0), True), (33922, 12, 6, (0, 0, 0, 9, 9, 0), True)],
    )  # fmt: skip
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", bands=3), image)


def test_a_turned_image_keeps_its_mask(tmp_path: Path) -> None:
    image, valid = noise(), np.full((40, 60), 255, np.uint8)
    valid[:5] = 0
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", extratags=[(274, 3, 1, 3, True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(f"{path}.msk", "w", "GTiff", 60, 40, 1, dtype="uint8", NBITS=1) as file:
            file.write(valid // 255, 1)
            file.update_tags(INTERNAL_MASK_FLAGS_1="2")
    missing = nodata_mask(path, bands=3)
    assert missing is not None
    assert missing[-5:].all()
    assert missing.sum() == 300


def test_a_mask_of_another_size_names_the_orientation(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(), photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    with pytest.raises(DataError, match="orientation tag 6"):
        read_item_label(Item("a", tmp_path / "a.tif", png(tmp_path / "m.png", label())))


def test_cmyk_is_rgb(tmp_path: Path) -> None:
    image = np.repeat(np.repeat(noise(5, 8), 8, axis=0), 8, axis=1)
    Image.fromarray(image).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(image).convert("CMYK").save(tmp_path / "a.tif")
    for name, tolerance in (("a.jpg", 6), ("a.tif", 2)):
        read = read_image(tmp_path / name, bands=3).astype(int)
        assert read.shape == image.shape
        assert np.abs(read - image).mean() < tolerance


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_of_few_bits_is_as_stored(tmp_path: Path, bits: int) -> None:
    image = noise(bands=1)[..., 0] % 2**bits
    Image.fromarray(image).save(tmp_path / "a.png", bits=bits)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", bands=1)[..., 0], image)
    np.testing.assert_array_equal(read_label_pixels(tmp_path / "a.png").values, image)
    path = tiff(tmp_path / "a.tif", image, NBITS=bits)
    np.testing.assert_array_equal(read_image(path, bands=1)[..., 0], image)
    item = Item("a", path, path)
    np.testing.assert_array_equal(folder(tmp_path, classes=[*"abcdefghijklmnop"], bands=1).read_label(item), image)


def test_a_gray_palette_is_gray(tmp_path: Path) -> None:
    image = noise(bands=1)[..., 0]
    Image.fromarray(image).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(read_image(tmp_path / "a.bmp", bands=1)[..., 0], image)


@pytest.mark.parametrize("interleave", ["band", "pixel"])
def test_masks_of_16_bits(tmp_path: Path, interleave: str) -> None:
    path = tiff(tmp_path / "m.tif", label().astype("uint16"), interleave=interleave)
    np.testing.assert_array_equal(read_label_pixels(path).values, label())


def test_hidden_files_and_sidecars_are_no_images(tmp_path: Path) -> None:
    domain = folder(tmp_path)
    for part, array in (("images", noise()), ("masks", label())):
        png(tmp_path / part / "t.png", array)
        for name in ("._t.png", "Thumbs.db", "t.png.aux.xml"):
            (tmp_path / part / name).write_bytes(b"\0\5\26\7")
    for pattern in ("", "/*", "/*.png"):
        found = domain.model_copy(update={"images": f"images{pattern}", "masks": f"masks{pattern}"}).items("train")
        assert [item.name for item in found] == ["t.png" if pattern == "/*" else "t"]


@pytest.mark.parametrize("value", [-9999.0, float(np.finfo("float32").min), 1e20])
def test_undeclared_no_data_is_rejected_until_it_is_declared(tmp_path: Path, value: float) -> None:
    image = (noise() / 255).astype(np.float32)
    image[:, :6] = value
    path = tiff(tmp_path / "a.tif", image)
    with pytest.raises(DataError, match=r"a\.tif .*10.0%.*nodata") as caught:
        read_image(path, bands=3)
    named = float(str(caught.value).split("nodata: ")[1].split(" ")[0])
    read, missing = read_image(path, bands=3, nodata=named), nodata_mask(path, bands=3, nodata=named)
    assert not read[:, :6].any()
    assert missing is not None
    assert missing[:, :6].all()
    assert missing.sum() == 240
    domain = folder(tmp_path, nodata=named)
    np.testing.assert_array_equal(domain.read_image(Item("a", path)), read)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-9999, "int16"), (9, "uint8")])
def test_no_data_of_a_mask_is_ignored(tmp_path: Path, value: float, dtype: str) -> None:
    stored = label().astype(dtype)
    stored[:10] = value
    item = Item("a", png(tmp_path / "i.png", noise()), tiff(tmp_path / "m.tif", stored, nodata=value))
    read = folder(tmp_path).read_label(item)
    assert (read[:10] == 255).all()
    np.testing.assert_array_equal(read[10:], label()[10:])
    if not np.isnan(value):
        ids = {"green": 0, "gray": 1, "blue": [2, int(value)]}
        assert (folder(tmp_path, ids=ids).read_label(item)[:10] == 2).all()


def test_negative_numbers_of_masks_can_be_listed(tmp_path: Path) -> None:
    stored = label().astype(np.int16) - 1
    item = Item("a", png(tmp_path / "i.png", noise()), tiff(tmp_path / "m.tif", stored))
    read = folder(tmp_path, ids={"green": -1, "gray": 0}, ignore=[1]).read_label(item)
    np.testing.assert_array_equal(read, np.where(label() == 2, 255, label()))


def test_a_mask_is_laid_on_the_grid_of_its_image(tmp_path: Path) -> None:
    image = tiff(tmp_path / "i.tif", noise(), **GRID)
    south_up = tiff(tmp_path / "s.tif", label()[::-1], crs="EPSG:32633", transform=Affine(1, 0, 5e5, 0, 1, 5e6 - 40))
    np.testing.assert_array_equal(read_item_label(Item("a", image, south_up)).values, label())
    around = np.pad(label(), ((3, 5), (2, 4)), constant_values=7)
    wide = tiff(tmp_path / "w.tif", around, crs="EPSG:32633", transform=origin(5e5 - 2, 5e6 + 3, 1, 1))
    np.testing.assert_array_equal(read_item_label(Item("a", image, wide)).values, label())


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32633", origin(7e5, 5.2e6, 1, 1)),
        ("EPSG:32633", origin(5e5, 5e6, 2, 2)),
        ("EPSG:32633", origin(5e5 + 1, 5e6, 1, 1)),
        ("EPSG:32632", origin(5e5, 5e6, 1, 1)),
    ],
)
def test_a_mask_of_another_place_is_rejected(tmp_path: Path, crs: str, transform: Affine) -> None:
    item = Item(
        "a", tiff(tmp_path / "i.tif", noise(), **GRID), tiff(tmp_path / "m.tif", label(), crs=crs, transform=transform)
    )
    with pytest.raises(DataError, match=r"m\.tif .*i\.tif"):
        read_item_label(item)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_lists_of_windows_are_read(tmp_path: Path, encoding: str) -> None:
    domain = folder(tmp_path, splits={"train": "train.txt"})
    for name in ("forêt_1", "t2", "t3"):
        png(tmp_path / "images" / f"{unicodedata.normalize('NFD', name)}.png", noise())
        png(tmp_path / "masks" / f"{unicodedata.normalize('NFC', name)}.png", label())
    (tmp_path / "train.txt").write_bytes("forêt_1\r\nt2\r\n".encode(encoding))
    assert [item.name for item in domain.items("train")] == ["forêt_1", "t2"]
    pattern = domain.model_copy(update={"images": "images/forê*.png", "masks": "masks/forê*.png", "splits": {}})
    assert [item.name for item in pattern.items("train")] == ["t_1"]


@pytest.mark.parametrize("kind", ["bmp", "webp", "jp2"])
def test_more_formats(tmp_path: Path, kind: str) -> None:
    image = noise(64, 64)
    options: dict[str, Any] = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(kind, {})
    Image.fromarray(image).save(tmp_path / f"a.{kind}", **options)
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{kind}", bands=3), image)
    (tmp_path / "images").mkdir()
    (tmp_path / f"a.{kind}").rename(tmp_path / "images" / f"a.{kind}")
    assert len(Folder(root=tmp_path, classes=["a"]).items("train")) == 1


def test_a_folder_without_images_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.heic").touch()
    with pytest.raises(DataError, match=r"\.png.*\.heic"):
        Folder(root=tmp_path, classes=["a"]).items("train")


@pytest.mark.parametrize("how", ["JPEG", "WEBP", "tiff"])
def test_lossy_masks_are_rejected(tmp_path: Path, how: str) -> None:
    path = tmp_path / "m.png"
    if how == "tiff":
        tiff(path, label(), compress="jpeg")
    else:
        Image.fromarray(np.repeat(label()[..., None], 3, axis=-1)).save(path, how)
    with pytest.raises(DataError, match="lossy"):
        read_label_pixels(path)


def test_a_vrt_reads_other_files_only_if_it_is_named_so(tmp_path: Path) -> None:
    secret = tiff(tmp_path / "secret.tif", noise(), **GRID)
    text = (
        '<VRTDataset rasterXSize="60" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    for name in ("a.tif", "a.png", "upload"):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name, bands=1)
        with pytest.raises(DataError, match=name):
            inspect_raster(str(tmp_path / name), pointwise().metadata, bands="1", nodata=None, max_value=None)
    (tmp_path / "a.vrt").write_text(text)
    np.testing.assert_array_equal(read_image(tmp_path / "a.vrt", bands=1)[..., 0], noise()[..., 0])


def test_mutated_files_end_in_one_sentence(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    image = noise(64, 64)
    files = [tiff(tmp_path / f"{name}.tif", image, compress=name, **GRID) for name in ("none", "deflate", "jpeg")]
    for kind in ("png", "jpeg", "bmp", "webp"):
        Image.fromarray(image).save(tmp_path / f"a.{kind}")
        files.append(tmp_path / f"a.{kind}")
    for path in files:
        whole, right = path.read_bytes(), read_image(path, bands=3)
        for number in range(40):
            data = bytearray(whole)
            if number < 5:
                data = data[: int(len(data) * (0.2 + 0.15 * number))]
            for place in draw.integers(0, min(400, len(data)), 0 if number < 5 else 6):
                data[place] = draw.integers(256)
            path.write_bytes(data)
            headers._header.cache_clear()
            with suppress(OneSentenceError), one_sentence(path):
                assert np.array_equal(read_image(path, bands=3), right) or number >= 5, "a truncated file was read"


class OneSentenceError(Exception):
    pass


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if str(path) in str(error) and "\n" not in str(error):
            raise OneSentenceError from None
        raise


@pytest.mark.parametrize(
    ("crs", "transform", "gsd"),
    [
        ("EPSG:3857", origin(1e6, 8399737.9, 1, 1), 0.5),  # 60° north
        ("EPSG:4326", origin(10, 60, 1e-5, 1e-5), 0.56),
        ("EPSG:32633", origin(5e5, 5e6, 1, 1), 1.0),
        ("EPSG:2263", origin(9.8e5, 2e5, 1, 1), 0.3048),
        ("EPSG:3995", origin(0, -3.5e6, 1, 1), 0.953),  # polar stereographic, at 58° north
    ],
)
def test_ground_resolution_counts_the_scale_of_the_projection(
    tmp_path: Path, crs: str, transform: Affine, gsd: float
) -> None:
    path = tiff(tmp_path / "a.tif", noise(), crs=crs, transform=transform)
    found = inspect_raster(str(path), pointwise().metadata, bands=None, nodata=None, max_value=None).gsd
    assert found is not None
    expected = (1.115, 0.56) if crs == "EPSG:4326" else (gsd, gsd)
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_no_data_of_each_band_counts(tmp_path: Path) -> None:
    image = noise()
    image[0, 0] = [255, 0, 255]
    image[0, 1] = [255, 7, 7]
    Image.fromarray(image).save(tmp_path / "a.png", transparency=(255, 0, 255))
    read = read_image(tmp_path / "a.png", bands=3)
    assert read[0, :2].tolist() == [[0, 0, 0], [255, 7, 7]]
    with open_raster(tmp_path / "a.png") as dataset:
        assert dataset.count == 3

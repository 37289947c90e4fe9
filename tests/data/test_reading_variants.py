"""Training and maps read the same pixels of generated files, and those that were written.

``OVERFLY_READING_VARIANTS`` sets the number of files.
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from PIL import Image
from rasterio.enums import ColorInterp

from overfly.core.classes import Classes
from overfly.core.records import Array
from overfly.data.reading import Mask, nodata_mask, read_image, read_label_pixels
from overfly.exporting.predictor import ModelMetadata
from overfly.raster.raster_source import inspect_raster
from overfly.raster.tiling import ColumnStrip, FinishedRows, TilingPlan, WindowBatch, read_windows

VARIANTS = int(os.environ.get("OVERFLY_READING_VARIANTS", "300"))
GROUPS = 20
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
COMPRESSIONS = ("none", "lzw", "deflate", "packbits", "zstd", "lzma", "lerc")


class Variant(NamedTuple):
    """A file with the pixels (H, W, C) and the mask of no data (H, W) that are right, and pixels with no data kept."""

    path: Path
    image: Array
    missing: Mask
    description: str
    stored: Array
    lossy: bool = False


def pixels(draw: random.Random, bands: int, dtype: str) -> Array:
    noise = np.random.default_rng(draw.randrange(2**32))
    height, width = draw.randint(1, 80), draw.randint(1, 80)
    if np.dtype(dtype).kind == "f":
        return noise.random((height, width, bands)).astype(dtype) + 0.5
    low, high = (1, 256) if dtype == "uint8" else (-128, 128) if dtype == "int8" else (1, 30_000)
    return noise.integers(low, high, (height, width, bands)).astype(dtype)


def layout(draw: random.Random, dtype: str, bands: int, lack: str) -> dict[str, Any]:
    """Options of GDAL's writer."""
    profile: dict[str, Any] = {"interleave": draw.choice(("pixel", "band")), "compress": draw.choice(COMPRESSIONS)}
    if dtype == "int8" and profile["compress"] == "lerc":
        profile["compress"] = "lzw"
    if profile["compress"] in {"lzw", "deflate", "zstd"} and draw.random() < 0.6:
        profile["predictor"] = 3 if dtype[0] == "f" and draw.random() < 0.5 else 2
    if draw.random() < 0.5:
        profile |= {"tiled": True, "blockxsize": draw.choice((16, 32)), "blockysize": draw.choice((16, 64))}
    # GDAL 3.10 writes blocks of no data little-endian, and LERC wrongly if big-endian
    little = lack in {"nodata", "nan"} or profile["compress"] == "lerc"
    endian = ("LITTLE",) if little else ("LITTLE", "BIG")
    profile |= {"ENDIANNESS": draw.choice(endian), "BIGTIFF": draw.choice(("YES", "NO"))}
    if draw.random() < 0.5:
        profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)}
    if bands == 3 and dtype == "uint8" and draw.random() < 0.5:
        profile["photometric"] = "RGB"
    return profile


def geotiff(draw: random.Random, path: Path) -> Variant:
    dtype, bands = draw.choice(DTYPES), draw.choice((1, 1, 2, 3, 4, 5))
    stored = pixels(draw, bands, dtype)
    height, width = stored.shape[:2]
    missing = np.zeros((height, width), np.bool_)
    missing[draw.randrange(height) :, draw.randrange(width) :] = True
    lack = draw.choice(("no", "no", "nodata", "nan", "internal mask", "external mask", "alpha", "sparse"))
    if lack == "nan" and dtype[0] != "f":
        lack = "no"
    alpha = lack == "alpha" and bands in {1, 3} and dtype == "uint8"
    if lack == "no" or (lack == "alpha" and not alpha):
        lack, missing = "no", np.zeros_like(missing)
    profile = layout(draw, dtype, bands, lack)
    few = draw.choice((1, 2, 4)) if dtype == "uint8" and bands == 1 and lack == "no" and draw.random() < 0.5 else 0
    if few and profile.get("predictor") is None and profile["compress"] not in {"lerc"}:
        profile["NBITS"] = few
        stored = stored % 2**few
    stored = np.ascontiguousarray(stored)
    if lack in {"nodata", "nan"}:
        profile["nodata"] = np.nan if lack == "nan" else 77
        stored = np.where(stored == 77, np.array(78, dtype), stored)
        stored[missing] = profile["nodata"]
    if lack == "sparse":
        profile["SPARSE_OK"] = "TRUE"
    written = stored
    if alpha:
        written = np.concatenate([stored, np.where(missing, 0, 255).astype(np.uint8)[..., None]], axis=-1)
        profile.pop("photometric", None)
    count = written.shape[-1]
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=lack == "internal mask"):
        with rasterio.open(path, "w", "GTiff", width, height, count, dtype=dtype, **profile) as file:
            if alpha:
                colors = [ColorInterp.gray] if count == 2 else [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
                file.colorinterp = [*colors, ColorInterp.alpha]
            elif bands in {2, 4}:
                file.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (bands - 1)]
            if lack == "sparse":  # only one block is written
                rows, columns = file.block_shapes[0]
                window = ((0, min(rows, height)), (0, min(columns, width)))
                file.write(np.moveaxis(written, -1, 0)[:, : window[0][1], : window[1][1]], window=window)
                stored = stored.copy()
                stored[window[0][1] :], stored[:, window[1][1] :] = 0, 0
                missing = np.zeros_like(missing)
            else:
                file.write(np.moveaxis(written, -1, 0))
        if lack.endswith("mask"):
            with rasterio.open(path, "r+") as file:
                file.write_mask(~missing)
    image = np.where(missing[..., None], np.array(0, dtype), stored)
    return Variant(path, image, missing, f"GeoTIFF {dtype} {bands} bands, {lack}, {profile}", stored)


def turned_tiff(draw: random.Random, path: Path) -> Variant:
    dtype, bands = draw.choice(("uint8", "uint16", "float32", ">u2", ">f4")), draw.choice((1, 3))
    stored, turn = pixels(draw, bands, np.dtype(dtype).name), draw.randint(1, 8)
    options: dict[str, Any] = {"byteorder": ">" if dtype[0] == ">" else "<", "bigtiff": draw.random() < 0.5}
    options["compression"] = draw.choice((None, "zlib"))
    if draw.random() < 0.4:
        options["tile"] = (16, 32)
    if options["compression"] and dtype.startswith("uint") and draw.random() < 0.5:
        options["predictor"] = True
    planar = bands == 3 and draw.random() < 0.4
    tifffile.imwrite(
        path,
        np.moveaxis(stored, -1, 0) if planar else stored[..., 0] if bands == 1 else stored,
        photometric="rgb" if bands == 3 else "minisblack",
        planarconfig=("separate" if planar else "contig") if bands == 3 else None,
        extratags=[(274, 3, 1, turn, True)],
        metadata=None,
        **options,
    )
    right = upright(stored, turn)
    return Variant(path, right, none(right), f"TIFF {dtype} {turn} {options}", right)


def upright(stored: Array, turn: int) -> Array:
    """Turn pixels as Pillow turns them."""
    how = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    if turn == 1:
        return stored
    numbers = Image.fromarray(np.arange(stored.shape[0] * stored.shape[1], dtype=np.int32).reshape(stored.shape[:2]))
    order = np.asarray(numbers.transpose(how[turn]))
    right: Array = stored.reshape(-1, stored.shape[-1])[order]
    return right


def none(image: Array) -> Mask:
    return np.zeros(image.shape[:2], np.bool_)


def pillow_file(draw: random.Random, path: Path) -> Variant:
    kind = draw.choice(("png", "png", "jpeg", "cmyk", "bmp", "webp"))
    bands = 3 if kind in {"webp", "cmyk"} else draw.choice((1, 3))
    stored, turn = pixels(draw, bands, "uint8"), 1
    options: dict[str, Any] = {}
    if kind in {"jpeg", "cmyk"}:  # decoders differ where colors change from pixel to pixel
        size = (stored.shape[1] * 24, stored.shape[0] * 24)
        bands_first = (Image.fromarray(band) for band in np.moveaxis(stored, -1, 0))
        stored = np.stack([np.asarray(band.resize(size)) for band in bands_first], axis=-1)
    missing = none(stored)
    image = Image.fromarray(stored[..., 0] if bands == 1 else stored)
    if kind == "png":
        extra = draw.choice(("no", "alpha", "bits", "transparent color"))
        if extra == "alpha":
            missing[draw.randrange(missing.shape[0]) :] = True
            image.putalpha(Image.fromarray(np.where(missing, 0, 255).astype(np.uint8)))
            stored = np.where(missing[..., None], np.uint8(0), stored)
        elif extra == "bits" and bands == 1:
            options["bits"] = draw.choice((1, 2, 4))
            stored = stored % 2 ** options["bits"]
            image = Image.fromarray(stored[..., 0])
        elif extra == "transparent color" and bands == 3:
            options["transparency"] = tuple(int(value) for value in stored[0, 0])
            missing = (stored == stored[0, 0]).all(axis=-1)
            stored = np.where(missing[..., None], np.uint8(0), stored)
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "webp":
        options = {"lossless": True, "exact": True}
    if kind in {"png", "jpeg", "cmyk", "webp"} and not missing.any():
        turn = draw.randint(1, 8)
        exif = Image.Exif()
        exif[274] = turn
        options["exif"] = exif.tobytes()
    if kind in {"jpeg", "cmyk"}:
        options |= {"quality": draw.randint(30, 100), "subsampling": draw.choice((0, 1, 2))}
        options["progressive"] = draw.random() < 0.5
    image.save(path, "JPEG" if kind == "cmyk" else kind.upper(), **options)
    if lossy := kind in {"jpeg", "cmyk"}:
        with Image.open(path) as decoded:
            stored = np.asarray(decoded.convert("RGB") if kind == "cmyk" else decoded).reshape(stored.shape)
    right = upright(stored, turn)
    return Variant(path, right, missing if turn == 1 else none(right), f"{kind} {turn} {options}", right, lossy)


def other_file(draw: random.Random, path: Path) -> Variant:
    kind = draw.choice(("jp2", "png16", "vrt"))
    bands = 1 if kind == "vrt" else 3
    stored = pixels(draw, bands, draw.choice(("uint8", "uint16")) if kind == "jp2" else "uint16")
    stored = np.resize(stored, (64, 48, bands)) if kind == "jp2" else stored
    height, width, _ = stored.shape
    options = {"QUALITY": "100", "REVERSIBLE": "YES"} if kind == "jp2" else {}
    driver = {"jp2": "JP2OpenJPEG", "png16": "PNG", "vrt": "GTiff"}[kind]
    file_path = path.with_suffix(".tif") if kind == "vrt" else path
    with rasterio.open(file_path, "w", driver, width, height, bands, dtype=stored.dtype, **options) as file:
        file.write(np.moveaxis(stored, -1, 0))
    if kind == "vrt":
        path = path.with_suffix(".vrt")
        rasterio.shutil.copy(file_path, path, driver="VRT")
    return Variant(path, stored, none(stored), f"{kind} {stored.dtype}", stored)


def variant(number: int, folder: Path) -> Variant:
    draw = random.Random(number)
    make = draw.choices((geotiff, turned_tiff, pillow_file, other_file), (10, 3, 4, 1))[0]
    return make(draw, folder / f"{number}.tif")


def read_map(path: Path, bands: int, dtype: str) -> tuple[Array, Mask]:
    """Pixels (H, W, C) and no data (H, W) as ``overfly predict`` reads them."""
    metadata = ModelMetadata(
        architecture="pidnet_s", classes=Classes(names=("a",)), bands=bands, mean=(0,) * bands, std=(1,) * bands,
        max_value=255 if dtype == "uint8" else 65535,
    )  # fmt: skip
    source = inspect_raster(str(path), metadata, bands=None, nodata=None, max_value=None)
    height, width = source.height, source.width
    size = max(height, width)
    plan = TilingPlan(height, width, (1.0, 1.0), size, (0,), (ColumnStrip(0, width, 0, width, (0,)),))
    image, mask = np.zeros((height, width, bands), np.float32), np.zeros((height, width), np.bool_)
    for item in read_windows(source, plan, 1):
        if isinstance(item, WindowBatch):
            image = np.moveaxis(item.images[0], 0, -1)[:height, :width]
        elif isinstance(item, FinishedRows) and item.nodata_mask is not None:
            mask = item.nodata_mask
    return image, mask


def same_pixels(image: Array, file: Variant) -> bool:
    """Whether pixels are right; decoders of JPEG differ by little."""
    if image.shape != file.image.shape:
        return False
    difference = np.abs(image.astype(np.float64) - file.image.astype(image.dtype))
    return bool(difference.mean() < 4 if file.lossy else not difference.any())


def disagreements(number: int, folder: Path) -> list[str]:
    """Ways in which a file is not read as it was written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = variant(number, folder)
    bands = file.image.shape[-1]
    image, mask = read_image(file.path, bands=bands), nodata_mask(file.path, bands=bands)
    mapped, map_mask = read_map(file.path, bands, str(file.stored.dtype))
    mask = none(image) if mask is None else mask
    wrong = []
    if not same_pixels(image, file):
        wrong.append("pixels in training")
    if not map_mask.all() and not np.array_equal(mapped, image.astype(np.float32)):
        wrong.append("pixels in a map")
    wrong += [
        f"no data in {name}"
        for name, found in (("training", mask), ("a map", map_mask))
        if (found != file.missing).any()
    ]
    if bands == 1 and file.stored.dtype.kind != "f" and not file.lossy:
        valid = ~file.missing
        if (read_label_pixels(file.path).values[valid] != file.stored[..., 0][valid]).any():
            wrong.append("label")
    return [f"{number} ({file.description}): {what}" for what in wrong]


@pytest.mark.parametrize("group", range(GROUPS))
def test_files_are_read_as_they_were_written(group: int, tmp_path: Path) -> None:
    wrong = [line for number in range(group, VARIANTS, GROUPS) for line in disagreements(number, tmp_path)]
    assert not wrong, "\n".join(wrong)

"""Open image files with GDAL: format, errors, orientation, header. The rules stand in `overfly.data.reading`."""

import html
import math
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import rasterio
from PIL import Image, TiffImagePlugin
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile
from rasterio.transform import xy
from rasterio.warp import transform as project

from overfly.core.errors import DataError
from overfly.core.records import Array, UInt8

ImageFormat = Literal["png", "jpeg", "tiff", "jp2", "bmp", "webp", "vrt"]

FORMATS: dict[ImageFormat, tuple[str, tuple[bytes, ...]]] = {
    "png": ("PNG", (b"\x89PNG\r\n\x1a\n",)),
    "jpeg": ("JPEG", (b"\xff\xd8\xff",)),
    "tiff": ("GTiff", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    "jp2": ("JP2OpenJPEG", (b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")),
    "bmp": ("BMP", (b"BM",)),
    "webp": ("WEBP", ()),
    "vrt": ("VRT", ()),
}
"""GDAL's driver of each format, and the first bytes of its files."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2", ".bmp", ".webp")
"""File name suffixes of images in folders."""
MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image that is read as a whole; Pillow's own limit."""
CACHE = 96 * 2**20
"""Bytes of decoded blocks that GDAL may cache; its default is a share of the machine's memory."""
OPTIONS = {"GDAL_CACHEMAX": CACHE, "GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PNG_WHOLE_IMAGE_OPTIM": False}
"""Options of GDAL; without the last two, truncated JPEG and PNG files are read as if the rest were black or gray."""
GDAL_ERRORS = (RasterioError, CPLE_BaseError)
"""Errors of rasterio, and those of GDAL that it passes on."""
MAX_OPEN = 16
"""Rasters that a thread keeps open."""
SAME_GRID = 0.005
"""Difference from 1 of a projection's scale below which it is ignored."""
EQUATOR, ECCENTRICITY = 6_378_137.0, 0.00669437999014
"""Radius in meters of the ellipsoid at the equator, and its squared eccentricity (WGS 84)."""
_OPENING = threading.Lock()
_OPEN = threading.local()
_BOMB = Image.DecompressionBombError
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf")


class ImageHeader(NamedTuple):
    """Header of an image file, as it is read: upright, in RGB.

    Attributes:
        bands: bands as stored, including an alpha band, which is the last.
        dtype, stored: pixel type of the returned array (uint8, uint16 or float32) and in the file.
        palette: True if pixels are indices of a table of colors other than grays.
        nodata: value of pixels without data of each band, or None.
        masked: True if a mask or a transparent color excludes pixels.
        orientation: tag by which the pixels were turned, 1 to 8 as in TIFF; 1: not turned.
        crs, transform: coordinate reference system as WKT; transform from pixel to coordinate in GDAL's order.
    """

    height: int
    width: int
    bands: int
    dtype: str
    stored: str
    kind: ImageFormat
    alpha: bool
    palette: bool
    nodata: tuple[float | None, ...]
    masked: bool
    lossy: bool
    orientation: int
    crs: str
    transform: tuple[float, ...] | None


@contextmanager
def open_raster(source: Path | str) -> Iterator[Any]:
    """Open a file or an address as a dataset of rasterio, upright; raise `DataError` if it is missing or damaged."""
    with gdal_errors(source), rasterio.Env(**_options(source)), _open(source) as dataset:
        yield dataset


@contextmanager
def keep_raster(source: Path | str) -> Iterator[Any]:
    """Open a raster as `open_raster` does, and keep it open for the thread's next call: opening takes milliseconds."""
    with gdal_errors(source), rasterio.Env(**_options(source)):
        key = (os.getpid(), str(source), *file_stamp(source))  # a forked process would share the position in the file
        kept: dict[object, tuple[ExitStack, Any]] = _OPEN.__dict__.setdefault("kept", {})
        if key not in kept:
            while len(kept) >= MAX_OPEN:
                kept.pop(next(iter(kept)))[0].close()
            stack = ExitStack()
            kept[key] = stack, stack.enter_context(_open(source))
        yield kept[key][1]


def is_address(source: Path | str) -> bool:
    """Whether a source is an address, such as ``https://…`` or ``s3://…``, not a file."""
    return "://" in str(source) or str(source).startswith("/vsi")


def file_stamp(source: Path | str) -> tuple[int, int]:
    """Size and time of a file, by which a change is noticed; zeros for an address."""
    state = None if is_address(source) else Path(source).stat()
    return (0, 0) if state is None else (state.st_size, state.st_mtime_ns)


def _options(source: Path | str) -> dict[str, object]:
    return {**OPTIONS, "GDAL_DISABLE_READDIR_ON_OPEN": "FALSE" if is_address(source) else "TRUE"}


@contextmanager
def _open(source: Path | str) -> Iterator[Any]:
    driver = None if is_address(source) else FORMATS[image_format(Path(source))][0]
    if driver == "VRT":
        _check_vrt(Path(source))
    with _quiet():
        dataset = rasterio.open(source, driver=driver)
    with dataset:
        known = [name for name, _ in FORMATS.values() if (name == "VRT") == str(source).endswith(".vrt")]
        if dataset.driver not in known:
            raise DataError(f"{source} is a {dataset.driver}, which is not read; export it as GeoTIFF")
        turn = 1 if is_address(source) else _orientation(source, dataset)
        if turn == 1:
            yield dataset
        else:
            with _turned(source, dataset, turn) as upright:
                yield upright


def _check_vrt(path: Path, depth: int = 0) -> None:
    """Raise `DataError` if a VRT names anything but image files of this machine: GDAL would also read addresses."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for tag, escaped in set(re.findall(r"<(Source(?:Filename|Dataset)[^>]*)>(.*?)</Source", text, re.DOTALL)):
        name = html.unescape(escaped).strip()
        source = path.parent / name if re.search("relativeToVRT=.1", tag) else Path(name)
        if is_address(name) or depth > MAX_OPEN:
            raise DataError(f"{path} names {name}, and a VRT may name image files only; give the address itself")
        if image_format(source) == "vrt":
            _check_vrt(source, depth + 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore warnings; other threads wait, since they share Python's filters."""
    with _OPENING, warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def gdal_errors(source: Path | str) -> Iterator[None]:
    """Convert all errors of GDAL, rasterio and the system to a `DataError` that names the file."""
    known = (*GDAL_ERRORS, OSError, ValueError, TypeError, LookupError, ArithmeticError, SyntaxError)
    try:
        yield
    except (*known, MemoryError, struct.error) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".").removeprefix(f"{source}: ")
        reason = reason or type(error).__name__
        raise DataError(f"{source} is truncated or damaged ({reason}); copy, download or export it again") from error


def read_header(path: Path) -> ImageHeader:
    """Read the header of an image; raise `DataError` if it is none, or larger than can be read as a whole."""
    header = read_raster_header(path)
    if header.height * header.width > MAX_PIXELS:
        raise DataError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} million pixels; use the domain raster")
    return header


def read_raster_header(source: Path | str) -> ImageHeader:
    """Read the header of a raster of any size, a file or an address; errors are those of `read_header`."""
    if not is_address(source):
        image_format(Path(source))
    return _header(source, *file_stamp(source))


@lru_cache(maxsize=4096)
def _header(path: Path | str, *stamp: int) -> ImageHeader:  # noqa: ARG001 - the stamp is a part of the key
    with open_raster(path) as dataset:
        drivers = {driver: kind for kind, (driver, _) in FORMATS.items()}
        kind = drivers[dataset.driver] if is_address(path) else image_format(Path(path))
        if not dataset.count:
            raise DataError(f"{path} has no bands of its own; give one of its subdatasets, or export it again")
        stored = str(np.result_type(*dataset.dtypes))
        structure = dataset.tags(ns="IMAGE_STRUCTURE")
        return ImageHeader(
            dataset.height, dataset.width, dataset.count,
            dtype=stored if stored in ("uint8", "uint16") else "float32", stored=stored, kind=kind,
            alpha=dataset.count > 1 and dataset.colorinterp[-1].name == "alpha",
            palette=dataset.colorinterp[0].name == "palette" and not is_gray(read_palette(dataset)),
            nodata=band_nodata(dataset), masked=has_mask(dataset), lossy=kind == "jpeg"
            or "JPEG" in structure.get("COMPRESSION", "")
            or "LOSSY" in structure.get("COMPRESSION_REVERSIBILITY", ""),
            orientation=int(dataset.tags(ns="OVERFLY").get("ORIENTATION", 1)),
            crs=dataset.crs.to_wkt() if dataset.crs else "",
            transform=None if dataset.transform.is_identity else tuple(dataset.transform.to_gdal()),
        )  # fmt: skip


def band_nodata(dataset: Any) -> tuple[float | None, ...]:
    """The declared no-data value of each band; None where it only counts in all bands together, as `has_mask`."""
    return (None,) * dataset.count if has_mask(dataset) else tuple(dataset.nodatavals)


def has_mask(dataset: Any) -> bool:
    """Whether a dataset has a mask of valid pixels other than an alpha band, or a transparent color."""
    flags = {flag.name for flag in dataset.mask_flag_enums[0]}
    return "per_dataset" in flags and "alpha" not in flags


def is_gray(palette: UInt8) -> bool:
    """Whether a palette (P, 3) holds the grays 0, 1, 2 …, or black and white only, so that its numbers are values."""
    ramp = np.arange(len(palette), dtype=np.uint8) * (255 if len(palette) == 2 else 1)
    return np.array_equal(palette, np.repeat(ramp[:, None], 3, axis=1))


def image_format(path: Path) -> ImageFormat:
    """Detect the format of a file by its first bytes; raise `DataError` if it is missing or in another format."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe or a device could block
            kind = "a folder" if path.is_dir() else "a pipe" if path.is_fifo() else "a device or a socket"
            raise DataError(f"{path} is {kind}, not a file; remove it or replace it by the image")
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}); check its permissions") from None
    for kind, (_, starts) in FORMATS.items():
        if start.startswith(starts):
            return kind
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if path.suffix == ".vrt" and b"<" in start[:8]:
        return "vrt"
    raise DataError(f"{path} is {_describe(start)}, not a PNG, JPEG or TIFF; download or export it again")


def _describe(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if start.startswith(_ARCHIVES):
        return "an archive"
    return "text" if start.isascii() and b"\0" not in start else "in another format or damaged in its first bytes"


def _orientation(source: Path | str, dataset: Any) -> int:
    """Orientation of a file's pixels, 1 to 8 as in TIFF; 1 if it is georeferenced."""
    known = not dataset.transform.is_identity or dataset.gcps[0] or dataset.tags(ns="RPC")
    if known or dataset.driver not in ("GTiff", "JPEG", "PNG", "WEBP"):
        return 1
    value: Any = 1
    with suppress(OSError, ValueError, TypeError, LookupError, SyntaxError, _BOMB, struct.error), _quiet():
        if dataset.driver == "GTiff":
            with Path(source).open("rb") as file:
                start = file.read(16)
                order: Literal["little", "big"] = "little" if start[:1] == b"I" else "big"
                tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=start[:2])
                tags._bigtiff = big = 43 in start[2:4]  # Pillow misses it in big-endian files
                file.seek(int.from_bytes(start[8:16] if big else start[4:8], order))
                tags.load(file)
                value = tags.get(274, 1)
        elif dataset.driver == "JPEG":
            value = int(dataset.tags().get("EXIF_Orientation", 1))
        else:
            with Image.open(source) as image:
                value = Image.Image.getexif(image).get(274, 1)  # PNG's own method would decode the image
    return value if value in range(1, 9) else 1


@contextmanager
def _turned(source: Path | str, dataset: Any, turn: int) -> Iterator[Any]:
    """A copy of a dataset in memory, turned by an orientation."""

    def upright(pixels: Array) -> Array:
        turned = pixels.swapaxes(-1, -2) if turn >= 5 else pixels
        return np.ascontiguousarray(
            turned[..., :: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
        )

    if dataset.height * dataset.width > MAX_PIXELS:
        raise DataError(
            f"{source} has more than {MAX_PIXELS / 1e6:.0f} million pixels, to be turned by its orientation tag "
            f"{turn}; save it with its pixels turned and without the tag"
        )
    pixels = upright(dataset.read())
    count, height, width = pixels.shape
    dtype, masked = pixels.dtype, has_mask(dataset)
    profile = {"count": count, "height": height, "width": width, "dtype": dtype, "nodata": dataset.nodata}
    with MemoryFile() as memory:
        with _quiet(), memory.open(driver="GTiff", photometric="MINISBLACK", bigtiff="IF_SAFER", **profile) as copy:
            copy.write(pixels)
            if masked:
                copy.write_mask(upright(dataset.dataset_mask()))
            if dataset.colorinterp[0].name == "palette":
                copy.write_colormap(1, dataset.colormap(1))
            copy.colorinterp = dataset.colorinterp
            copy.update_tags(ns="OVERFLY", ORIENTATION=turn)
            copy.update_tags(ns="IMAGE_STRUCTURE", **dataset.tags(ns="IMAGE_STRUCTURE"))
        with _quiet():
            copy = memory.open()
        with copy:
            yield copy


def read_palette(dataset: Any) -> UInt8:
    """Colors (P, 3) of a dataset's first band."""
    table = dataset.colormap(1)
    return np.array([table.get(entry, (0, 0, 0))[:3] for entry in range(max(table) + 1)], np.uint8)


def ground_distance(dataset: Any) -> tuple[float, float] | None:
    """Return the ground sample distance (y, x) in meters at the center of a dataset; None if unknown.

    It is measured on the ellipsoid, so that the projection's scale counts: a pixel of Web Mercator at 60° north is half
    as long as its grid says. Scales within `SAME_GRID` of 1, as in the zones of UTM, are taken as 1.
    """
    crs, grid = dataset.crs, dataset.transform
    if not crs or grid.is_identity:
        return None
    row, column = dataset.height / 2, dataset.width / 2
    rows, columns = [row - 0.5, row + 0.5, row, row], [column, column, column - 0.5, column + 0.5]
    try:
        longitude, latitude = np.radians(project(crs, "EPSG:4326", *xy(grid, rows, columns, offset="ul")))
    except Exception:  # rasterio has its own errors for a local system
        return None
    sine = np.sin(latitude.mean())
    curvature = EQUATOR / np.sqrt(1 - ECCENTRICITY * sine**2)  # Snyder (1987), equations 4-18 to 4-20
    north = np.diff(latitude)[::2] * curvature**3 * (1 - ECCENTRICITY) / EQUATOR**2
    east = (np.diff(longitude)[::2] + np.pi) % (2 * np.pi) - np.pi
    y, x = (float(length) for length in np.hypot(north, east * curvature * np.cos(latitude.mean())))
    if not crs.is_projected:
        return y, x
    meters = float(crs.linear_units_factor[1])
    on_grid = meters * math.hypot(grid.b, grid.e), meters * math.hypot(grid.a, grid.d)
    return on_grid if max(abs(y / on_grid[0] - 1), abs(x / on_grid[1] - 1)) < SAME_GRID else (y, x)

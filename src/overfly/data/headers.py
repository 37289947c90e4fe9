"""Read image headers: format, size, bands, pixel type, no-data value.

The format is detected by the first bytes. Pillow reads what it supports without loss; rasterio (extra ``geo``)
reads the others: more than four bands, 16 bits in color, JPEG 2000.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from PIL import Image, TiffImagePlugin

from overfly.core.errors import DataError, MissingExtraError

ImageFormat = Literal["png", "jpeg", "tiff", "jp2"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2")
"""File name suffixes of images."""
MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image that is read as a whole; Pillow's own limit."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_OTHER_FORMATS = (
    ((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf"), "an archive"),
    ((b"GIF8", b"BM", b"RIFF", b"\x89HDF", b"\x93NUMPY"), "in another format"),
)


class ImageHeader(NamedTuple):
    """Header of an image file.

    Attributes:
        height: rows.
        width: columns.
        bands: bands as stored, including an alpha band.
        dtype: pixel type of the returned array: uint8, uint16 or float32.
        alpha: True if the last band is an alpha band.
        palette: True if pixels are indices of a color table.
        nodata: value of pixels without data, or None.
        kind: file format.
        scale: factor by which Pillow scales gray values of 1, 2 or 4 bits to 0..255.
        engine: library that reads the pixels.
        masked: True if the file has a validity mask for all bands, which rasterio reads.
        stored: pixel type in the file if it differs from ``dtype``, else empty.
    """

    height: int
    width: int
    bands: int
    dtype: str
    alpha: bool = False
    palette: bool = False
    nodata: float | None = None
    kind: ImageFormat = "png"
    scale: int = 1
    engine: Literal["pillow", "rasterio"] = "pillow"
    masked: bool = False
    stored: str = ""


def read_header(path: Path) -> ImageHeader:
    """Read the header of an image.

    Raises:
        DataError: the file is missing, empty, not an image, or larger than can be read as a whole.
        MissingExtraError: the format needs rasterio.
    """
    kind = image_format(path)
    header = {"png": _png_header, "jpeg": _jpeg_header, "tiff": _tiff_header, "jp2": _rasterio_header}[kind](path)
    if not header.height * header.width:
        raise DataError(f"{path} is empty ({header.width}×{header.height} pixels); remove it or export it again")
    if header.height * header.width > MAX_PIXELS:
        _too_large(path)
    return header._replace(kind=kind)


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
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if start.startswith((b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")):
        return "jp2"
    raise DataError(f"{path} is {_describe(start)}, not a PNG, JPEG or TIFF; download or export it again")


def broken(path: Path, error: BaseException) -> DataError:
    """Create the error for a file that cannot be decoded."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return DataError(f"{path} is truncated or damaged ({reason}); copy, download or export it again")


@contextmanager
def open_pillow(path: Path) -> Iterator[Image.Image]:
    """Open with Pillow, without its warnings; raise `DataError`, in the block too, if it is damaged or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
                yield image
    except Image.DecompressionBombError:
        _too_large(path)
    except _BROKEN as error:
        raise broken(path, error) from error


@contextmanager
def open_raster(path: Path) -> Iterator[Any]:
    """Open with rasterio, else raise `MissingExtraError`; raise `DataError`, in the block too, if it is damaged."""
    try:
        import rasterio
        from rasterio.errors import RasterioError
    except ImportError:
        raise MissingExtraError("rasterio", "geo", f"reading {path}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path) as dataset:
                yield dataset
    except (RasterioError, *_BROKEN) as error:
        raise broken(path, error) from error


def _describe(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    for starts, description in _OTHER_FORMATS:
        if start.startswith(starts):
            return description
    return "text" if start.isascii() and b"\0" not in start else "of an unknown format or damaged in its first bytes"


def _too_large(path: Path) -> NoReturn:
    raise DataError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} million pixels; cut it into tiles")


def _png_header(path: Path) -> ImageHeader:
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or head[12:16] != b"IHDR":
        raise broken(path, ValueError("the header is incomplete"))
    width, height, depth, color = struct.unpack(">IIBB", head[16:26])
    if color not in _PNG_BANDS or depth not in (1, 2, 4, 8, 16):
        raise broken(path, ValueError("the header is invalid"))
    return ImageHeader(
        height,
        width,
        bands=_PNG_BANDS[color],
        dtype="uint16" if depth == 16 else "uint8",
        alpha=color in (4, 6),
        palette=color == 3,
        scale=255 // (2**depth - 1) if color == 0 and depth < 8 else 1,
        engine="rasterio" if depth == 16 and color != 0 else "pillow",
    )


def _jpeg_header(path: Path) -> ImageHeader:
    with open_pillow(path) as image:
        return ImageHeader(image.height, image.width, len(image.getbands()), "uint8")


def _tiff_header(path: Path) -> ImageHeader:
    """Header of a TIFF: Pillow's if Pillow returns the pixels as they are stored, else rasterio's."""
    header = None
    with suppress(DataError), open_pillow(path) as image:
        header = _pillow_tiff_header(image)
    return header or _rasterio_header(path)


def _pillow_tiff_header(image: Image.Image) -> ImageHeader | None:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    tags = image.tag_v2
    bands, depths, photometric = tags.get(277, 1), set(tags.get(258, (1,))), tags.get(262)
    eight = depths == {8} and (bands in (1, 3) or (bands == 4 and tags.get(338) == (2,)))
    modes = {"L", "P", "RGB", "RGBA"} if eight else {"I;16", "I;16B", "F"} if bands == 1 else set()
    if image.mode not in modes or photometric not in (1, 2, 3, 6) or len(image.getbands()) != bands:
        return None
    dtype = "uint8" if eight else "float32" if image.mode == "F" else "uint16"
    try:
        nodata = float(str(tags[42113]).strip("\0 ")) if 42113 in tags else None
    except ValueError:
        nodata = None
    return ImageHeader(
        image.height,
        image.width,
        bands,
        dtype,
        alpha=image.mode == "RGBA",
        palette=image.mode == "P",
        nodata=nodata,
        masked=_has_mask(image),
    )


def _has_mask(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Return True if a TIFF has a mask of the whole image, in another directory or in a file .msk."""
    directory, file, seen = image.tag_v2, image.fp, set[int]()
    while file is not None and directory.next and directory.next not in seen:
        seen.add(directory.next)
        file.seek(0)
        head = file.read(16)
        file.seek(directory.next)
        directory = TiffImagePlugin.ImageFileDirectory_v2(head if head[2] == 43 else head[:8])
        directory.load(file)
        if directory.get(254, 0) & 5 == 4:  # a mask, but not that of an overview
            return True
    return Path(os.fsdecode(image.filename) + ".msk").exists()


def _rasterio_header(path: Path) -> ImageHeader:
    with open_raster(path) as dataset:
        colors = [color.name for color in dataset.colorinterp]
        flags = {flag.name for flag in dataset.mask_flag_enums[0]}
        stored = dataset.dtypes[0]
        dtype = stored if stored in ("uint8", "uint16") else "float32"
        return ImageHeader(
            dataset.height,
            dataset.width,
            dataset.count,
            dtype,
            alpha=dataset.count > 1 and colors[-1] == "alpha",
            palette=colors[0] == "palette",
            nodata=dataset.nodata,
            engine="rasterio",
            masked="per_dataset" in flags and "alpha" not in flags,
            stored=stored if stored != dtype else "",
        )

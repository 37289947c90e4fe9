"""Images of the server: uploads, and PNG tiles read from rasters and maps of any size."""

import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling
from rasterio.windows import Window

from overfly.core.classes import Classes
from overfly.core.errors import DataError, NotFiniteError
from overfly.core.records import IGNORE, UInt8
from overfly.data.headers import ImageHeader, open_raster, read_raster_header
from overfly.data.reading import read_part
from overfly.evaluation.panels import ValueRange, to_rgb, value_range
from overfly.exporting.predictor import ModelMetadata
from overfly.raster.manifest import MapSettings
from overfly.raster.raster_source import RasterSource, inspect_raster
from overfly.reporting.figures import encode_image
from overfly.web.service import ImageSummary

SIDE = 256
"""Side of a tile in pixels."""
_BANDS = zip((255, 255, 204, 0), (254, 178, 76, 190), (128, 0, 38, 235), strict=True)
COLORS = np.stack([np.interp(np.arange(256) % 255, (0, 43, 100), band) for band in _BANDS], axis=1).round().astype("u1")
"""RGBA of each uncertainty: transparent at 0 and for no data, dark red at 100."""
OPTIONS = {"--no-alpha-band": "alpha_band=false", "--alpha-band": "alpha_band=true"}
"""Form fields that replace options of `overfly predict` in messages, beside those of the same names."""
MAX_SAMPLE = 1024
"""Longest side of the sample from which contrast and largest value of an image are estimated, in pixels."""


class TilePart(NamedTuple):
    """The window of a raster under a tile, and the rows and columns that it has there; keywords of rasterio's read."""

    window: Any
    out_shape: tuple[int, int]


def max_zoom(height: int, width: int) -> int:
    """Return the zoom at full resolution; at zoom 0 the whole image is one tile."""
    return max(0, math.ceil(math.log2(max(height, width) / SIDE)))


def tile_part(height: int, width: int, zoom: int, column: int, row: int) -> TilePart | None:
    """Return the part of a raster under a tile; None outside of it.

    ``zoom`` is 0 for the whole raster, up to `max_zoom` for full resolution; column and row count from the top left.
    """
    full_zoom = max_zoom(height, width)
    step = 2 ** (full_zoom - zoom) if 0 <= zoom <= full_zoom else 0
    extent = SIDE * step
    if not step or column < 0 or row < 0 or column * extent >= width or row * extent >= height:
        return None
    wide, high = min(extent, width - column * extent), min(extent, height - row * extent)
    return TilePart(Window(column * extent, row * extent, wide, high), (-(-high // step), -(-wide // step)))


def read_display(source: RasterSource, **part: Any) -> tuple[NDArray[Any], UInt8]:
    """Read a part of the bands that are shown, averaged: values (h, w, 3), and opacity (h, w), 0 for no data."""
    with open_raster(source.source) as dataset:
        pixels, missing = read_part(dataset, source, resampling=Resampling.average, **part)
    opacity = np.full(pixels.shape[1:], 255, np.uint8)
    if missing is not None:
        opacity[missing] = 0
    return np.moveaxis(pixels[[0, 1, 2] if len(pixels) > 2 else [0, 0, 0]], 0, -1), opacity


def display_range(source: RasterSource) -> ValueRange | None:
    """Return the `value_range` of a sample of an image; None for 8 bits, which are shown as they are."""
    if source.dtype == "uint8":
        return None
    step = max(1.0, max(source.height, source.width) / MAX_SAMPLE)
    pixels, opacity = read_display(source, out_shape=(math.ceil(source.height / step), math.ceil(source.width / step)))
    return value_range(np.where(opacity[..., None] > 0, pixels, np.nan))


def render_image(source: RasterSource, limits: ValueRange | None, part: TilePart) -> bytes:
    """Render a tile of an image as PNG, transparent without data and beyond the image's border."""
    pixels, opacity = read_display(source, **part._asdict())
    tile = np.zeros((SIDE, SIDE, 4), np.uint8)
    tile[: opacity.shape[0], : opacity.shape[1]] = np.dstack([to_rgb(pixels, limits), opacity])
    return encode_image(Image.fromarray(tile), "PNG", compress_level=3)


def class_colors(classes: Classes, hidden: Sequence[int] = ()) -> UInt8:
    """RGBA (256, 4) of each class id; ``hidden`` ones, and ids of no class, are transparent."""
    shown = [255 * (number < len(classes) and number not in hidden) for number in range(256)]
    return np.column_stack([classes.paint(np.arange(256).astype(np.uint8)), np.array(shown, np.uint8)])


def render_table(path: Path, part: TilePart, colors: UInt8) -> bytes:
    """Render a tile of a map's only band as PNG, by the ``colors`` (256, 4) of its values; 255 beyond its border."""
    tile = np.full((SIDE, SIDE), IGNORE, np.uint8)
    with open_raster(path) as dataset:
        tile[: part.out_shape[0], : part.out_shape[1]] = dataset.read(1, **part._asdict())
    return encode_image(Image.fromarray(colors[tile]), "PNG", compress_level=3)


@contextmanager
def field_errors(path: Path, name: str = "the image") -> Iterator[None]:
    """Let errors within the context name an image instead of its path, and form fields instead of options."""
    try:
        yield
    except (DataError, NotFiniteError) as error:
        text = str(error).replace(str(path), name)
        for option, field in OPTIONS.items():
            text = text.replace(option, field)
        option = r"--(bands|max-value|nodata)( (?=\d))?"
        text = re.sub(option, lambda found: found[1].replace("-", "_") + "=" * bool(found[2]), text)
        raise DataError(text) from None


@contextmanager
def stored_upload(file: BinaryIO) -> Iterator[Path]:
    """Store an upload in a temporary file within the context; errors say "the image" instead of its path."""
    with tempfile.TemporaryDirectory(prefix="overfly-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        with field_errors(Path(folder), "the folder of maps"), field_errors(path):
            yield path


def check_header(path: Path, *, pixels: int) -> ImageHeader:
    """Read the header of an image; raise `DataError` if it has too many pixels."""
    header = read_raster_header(path)
    if header.height * header.width > pixels:
        raise DataError(
            f"{path} has {header.height * header.width / 1e6:.1f} million pixels, more than the {pixels / 1e6:g} "
            "million that this server accepts; send a part of it, or serve its folder with --scenes"
        )
    return header


def inspect_image(path: Path, metadata: ModelMetadata, settings: MapSettings) -> RasterSource:
    """Check that an image fits a network with the bands, value range and no data of settings; see `inspect_raster`."""
    return inspect_raster(
        str(path), metadata, bands=settings.bands, nodata=settings.nodata, max_value=settings.max_value,
        alpha_band=settings.alpha_band,
    )  # fmt: skip


def describe_image(path: Path, metadata: ModelMetadata, name: str = "the image") -> ImageSummary:
    """Describe an image, called ``name``, and suggest values of the form fields by which a network reads it."""
    header, max_value = read_raster_header(path), metadata.max_value
    bands = tuple(range(1, metadata.bands + 1)) if metadata.bands <= header.bands - header.alpha else ()
    nodata = next((f"{value:.12g}" for value in header.nodata if value is not None), "")
    problem = ""
    try:
        with field_errors(path, name):
            source = inspect_image(path, metadata, MapSettings())
        bands, max_value = source.bands, metadata.max_value / source.gain
    except DataError as error:
        problem = str(error)
        try:  # with these bands it may fit
            inspect_image(path, metadata, MapSettings(bands=",".join(map(str, bands)) or None))
        except DataError:
            max_value = 255.0 if header.stored == "uint8" else _largest_value(path) or max_value
    return ImageSummary(
        width=header.width, height=header.height, image_bands=header.bands, dtype=header.stored,
        network_bands=metadata.bands, network_max_value=metadata.max_value, bands=",".join(map(str, bands)),
        max_value=f"{max_value:.6g}", nodata=nodata, problem=problem,
    )  # fmt: skip


def _largest_value(path: Path) -> float:
    """Return the largest value of a sample of an image's pixels, at least 0."""
    with open_raster(path) as dataset:
        shape = [min(MAX_SAMPLE, length) for length in dataset.shape]
        sample = dataset.read(dataset.indexes[:4], out_shape=(min(4, dataset.count), *shape), masked=True)
    largest = np.ma.masked_invalid(np.real(sample)).max()
    return 0.0 if largest is np.ma.masked else max(0.0, float(largest))

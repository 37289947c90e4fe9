"""Images of the server: uploads, PNG tiles of images and class maps, and class maps as GeoTIFF."""

import io
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, UInt8
from overfly.data.headers import ImageHeader, open_raster, read_header
from overfly.data.reading import Mask, nodata_mask, read_image
from overfly.raster.raster_source import Georeference, georeference
from overfly.raster.writer import describe_classes, write_georeference
from overfly.reporting.figures import encode_png

SIDE = 256
"""Side of a tile in pixels."""
_BANDS = zip((255, 255, 204, 0), (254, 178, 76, 190), (128, 0, 38, 235), strict=True)
COLORS = np.stack([np.interp(np.arange(256) % 255, (0, 43, 100), band) for band in _BANDS], axis=1).round().astype("u1")
"""RGBA of each uncertainty: transparent at 0 and for no data, dark red at 100."""


class Layer(NamedTuple):
    """A layer of a map: an image (H, W, 3), class ids (H, W) with their classes, or uncertainty (H, W).

    Uncertainty is in percent, 255 for no data.
    """

    values: UInt8
    classes: Classes | None = None


def max_zoom(height: int, width: int) -> int:
    """Return the zoom at full resolution; at zoom 0 the whole image is one tile."""
    return max(0, math.ceil(math.log2(max(height, width) / SIDE)))


def render_tile(layer: Layer, zoom: int, column: int, row: int) -> bytes | None:
    """Render a tile as PNG, transparent beyond the image's border; None outside the image.

    ``zoom`` is 0 for the whole image, up to `max_zoom` for full resolution; column and row count from the top left.
    """
    height, width = layer.values.shape[:2]
    full_zoom = max_zoom(height, width)
    step = 2 ** (full_zoom - zoom) if 0 <= zoom <= full_zoom else 0
    extent = SIDE * step
    if not step or column < 0 or row < 0 or column * extent >= width or row * extent >= height:
        return None
    part = layer.values[row * extent : (row + 1) * extent, column * extent : (column + 1) * extent]
    if layer.classes is not None:
        ids = np.full((SIDE, SIDE), IGNORE, np.uint8)
        sampled = part[step // 2 :: step, step // 2 :: step]
        ids[: sampled.shape[0], : sampled.shape[1]] = sampled
        return encode_png(ids, layer.classes, transparent=True)
    image = Image.fromarray(COLORS[part] if part.ndim == 2 else part).convert("RGBA")
    small = image.resize((math.ceil(part.shape[1] / step), math.ceil(part.shape[0] / step)), Image.Resampling.BOX)
    whole = Image.new("RGBA", (SIDE, SIDE))
    whole.paste(small, (0, 0))
    file = io.BytesIO()
    whole.save(file, "PNG", compress_level=3)
    return file.getvalue()


def encode_geotiff(ids: UInt8, classes: Classes, georeference: Georeference | None) -> bytes:
    """Encode class ids (H, W), 255 for no data, as GeoTIFF with colors, names and georeference."""
    import rasterio
    from rasterio.io import MemoryFile

    height, width = ids.shape
    settings: dict[str, Any] = {"compress": "deflate", "nodata": IGNORE}
    if height >= SIDE and width >= SIDE:
        settings |= {"tiled": True, "blockxsize": SIDE, "blockysize": SIDE}
    with MemoryFile() as memory:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with memory.open(driver="GTiff", height=height, width=width, count=1, dtype="uint8", **settings) as file:
                if georeference is not None:
                    write_georeference(file, georeference)
                file.write(ids, 1)
                describe_classes(file, classes)
        memory.seek(0)
        return bytes(memory.read())


class UploadedImage(NamedTuple):
    """A decoded image (H, W, C), in its own type and range, and the mask (H, W) of pixels without data, or None."""

    image: Array
    nodata_mask: Mask | None
    georeference: Georeference | None


@contextmanager
def stored_upload(file: BinaryIO) -> Iterator[Path]:
    """Store an upload in a temporary file within the context; errors say "the image" instead of its path."""
    with tempfile.TemporaryDirectory(prefix="overfly-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        try:
            yield path
        except DataError as error:
            raise DataError(str(error).replace(str(path), "the image")) from None


def check_header(path: Path, *, pixels: int, bands: int | None = None, network: str = "the network") -> ImageHeader:
    """Read the header of an image; raise `DataError` if it has too many pixels or, if given, other bands."""
    header = read_header(path)
    if header.height * header.width > pixels:
        raise DataError(
            f"{path} has {header.height * header.width / 1e6:.1f} million pixels, more than the {pixels / 1e6:g} "
            "million that this server accepts; send a part of it, or use overfly predict"
        )
    if bands not in (None, header.bands, header.bands - header.alpha):
        raise DataError(f"{path} has {header.bands} bands and {network} reads {bands}; send an image with these bands")
    return header


def read_upload(path: Path, header: ImageHeader, bands: int) -> UploadedImage:
    """Decode an image after `check_header`."""
    coordinates: Georeference | None = None
    if header.kind in ("tiff", "jp2"):
        with open_raster(path) as dataset:
            place = georeference(dataset)
        coordinates = place if place.crs or place.transform is not None or place.gcps or place.rpcs else None
    return UploadedImage(read_image(path, bands=bands), nodata_mask(path, bands=bands), coordinates)

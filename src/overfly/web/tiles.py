"""Squares of a picture for a map in a browser, and maps of classes as files."""

from __future__ import annotations

import io
import json
import math
import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.errors import MissingExtraError
from overfly.core.records import IGNORE, UInt8
from overfly.raster.georeference import Georeference
from overfly.reporting.embedded import png

SIDE = 256
"""Side of a tile in pixels."""
DOUBT = ((0, (255, 255, 204, 0)), (110, (254, 178, 76, 190)), (255, (128, 0, 38, 235)))
"""Colors of doubt: clear where the network is sure, dark red where it knows nothing."""


class Layer(NamedTuple):
    """What a tile is cut from.

    Attributes:
        values: a picture (H, W, 3), class ids (H, W), or doubt (H, W) from 0 to 255.
        classes: colors of class ids; None for doubt and pictures.
    """

    values: UInt8
    classes: Classes | None = None


def depth(height: int, width: int) -> int:
    """The zoom at which a pixel of the picture is one of the screen; at 0 the whole picture is one tile."""
    return max(0, math.ceil(math.log2(max(height, width) / SIDE)))


def tile(layer: Layer, zoom: int, column: int, row: int) -> bytes | None:
    """One square of a picture as PNG, transparent beyond its border; None where there is no such square.

    Args:
        layer: the picture.
        zoom: 0 for the whole picture, up to `depth` for its own pixels.
        column: counted from the left.
        row: counted from the top.
    """
    height, width = layer.values.shape[:2]
    step = 2 ** (depth(height, width) - zoom) if 0 <= zoom <= depth(height, width) else 0
    reach = SIDE * step
    if not step or column < 0 or row < 0 or column * reach >= width or row * reach >= height:
        return None
    part = layer.values[row * reach : (row + 1) * reach, column * reach : (column + 1) * reach]
    if layer.classes is not None:
        ids = np.full((SIDE, SIDE), IGNORE, np.uint8)
        thin = part[step // 2 :: step, step // 2 :: step]
        ids[: thin.shape[0], : thin.shape[1]] = thin
        return png(ids, layer.classes, clear=True)
    picture = Image.fromarray(_heat(part) if part.ndim == 2 else part).convert("RGBA")
    small = picture.resize((math.ceil(part.shape[1] / step), math.ceil(part.shape[0] / step)), Image.Resampling.BOX)
    whole = Image.new("RGBA", (SIDE, SIDE))
    whole.paste(small, (0, 0))
    return _file(whole, "PNG", compress_level=3)


def _heat(doubt: UInt8) -> UInt8:
    """Doubt (H, W) as a picture with opacity (H, W, 4)."""
    stops = [stop for stop, _ in DOUBT]
    table = np.stack(
        [np.interp(np.arange(256), stops, [color[band] for _, color in DOUBT]) for band in range(4)], axis=1
    )
    painted: UInt8 = table.round().astype(np.uint8)[doubt]
    return painted


def geotiff(ids: UInt8, classes: Classes, place: Georeference | None) -> bytes:
    """A map of classes (H, W) as a GeoTIFF: colors, names, no data 255, and the image's own coordinates.

    Args:
        ids: class ids, 255 for none.
        classes: names and colors.
        place: where it lies; None leaves coordinates out.

    Raises:
        MissingExtraError: rasterio is not installed.
    """
    try:
        import rasterio
        from rasterio.io import MemoryFile
    except ImportError:
        raise MissingExtraError("rasterio", "geo", "writing a GeoTIFF") from None
    height, width = ids.shape
    settings: dict[str, Any] = {"compress": "deflate", "nodata": IGNORE}
    if height >= SIDE and width >= SIDE:
        settings |= {"tiled": True, "blockxsize": SIDE, "blockysize": SIDE}
    with MemoryFile() as memory:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with memory.open(driver="GTiff", height=height, width=width, count=1, dtype="uint8", **settings) as file:
                if place is not None:
                    _put(file, place)
                file.write(ids, 1)
                colors = {index: (*color, 255) for index, color in enumerate(classes.colors)}
                file.write_colormap(1, {**colors, IGNORE: (0, 0, 0, 0)})
                file.set_band_description(1, "class")
                file.update_tags(CLASS_NAMES=json.dumps(dict(enumerate(classes.names))))
                file.update_tags(1, **{f"CLASS_{index}": name for index, name in enumerate(classes.names)})
        memory.seek(0)
        return bytes(memory.read())


def _put(file: Any, place: Georeference) -> None:
    """Say in a new dataset where it lies."""
    import rasterio
    from rasterio.control import GroundControlPoint

    if place.point:
        file.update_tags(AREA_OR_POINT="Point")
    if place.points:
        right, down = _drift() if place.point else (0.0, 0.0)
        points = [
            GroundControlPoint(row - down, column - right, x, y, z, name) for column, row, x, y, z, name in place.points
        ]
        file.gcps = (points, rasterio.CRS.from_wkt(place.points_crs) if place.points_crs else rasterio.CRS())
    if place.crs:
        file.crs = rasterio.CRS.from_wkt(place.crs)
    if place.transform is not None:
        file.transform = rasterio.Affine.from_gdal(*place.transform)
    if place.rational:
        file.update_tags(ns="RPC", **dict(place.rational))


@cache
def _drift() -> tuple[float, float]:
    """How far off (columns, rows) GDAL gives a control point back that it wrote where coordinates are those of centers.

    GDAL 3.10 says one pixel: it moves such points by half a pixel the same way when it writes and when it reads.
    """
    import rasterio
    from rasterio.control import GroundControlPoint
    from rasterio.io import MemoryFile

    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(driver="GTiff", height=1, width=1, count=1, dtype="uint8") as file:
            file.update_tags(AREA_OR_POINT="Point")
            file.gcps = ([GroundControlPoint(8, 8, 0, 0, 0)] * 4, rasterio.CRS.from_epsg(4326))
        with memory.open() as file:
            point = file.gcps[0][0]
            return point.col - 8, point.row - 8


def _file(picture: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


__all__ = ["SIDE", "Layer", "depth", "geotiff", "tile"]

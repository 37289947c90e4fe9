"""Small rasters with polygons, whose class ids are known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio.raw
import rasterio
import shapely
from rasterio import Affine
from rasterio.features import shapes

from overfly.core.records import UInt8
from overfly.data.domain import Domain
from overfly.data.raster import Raster

NAMES = ["water", "land", "built"]
GRID = Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)


def moved(columns: float, rows: float = 0) -> Affine:
    """`GRID`, moved to the right and down."""
    return Affine(0.5, 0, 500_000 + 0.5 * columns, 0, -0.5, 5_000_000 - 0.5 * rows)


def squares(height: int, width: int, side: int = 16, seed: int = 0) -> UInt8:
    """Class ids of random squares."""
    ids = np.random.default_rng(seed).integers(0, 3, (-(-height // side), -(-width // side)), dtype=np.uint8)
    return ids.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]


def write_raster(
    path: Path, pixels: Any, *, crs: str | None = "EPSG:32633", grid: Affine | None = GRID, **more: Any
) -> Path:
    """Write bands (C, H, W) as a tiled GeoTIFF."""
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    count, height, width = pixels.shape
    more = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate", **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, crs=crs,
            transform=grid or Affine.identity(), **more,
        ) as out:  # fmt: skip
            out.write(pixels)
    return path


def write_polygons(
    path: Path, polygons: Any, values: Any, *, crs: str | None = "EPSG:32633", attribute: str = "use", **more: Any
) -> Path:
    """Write polygons with one attribute."""
    drivers = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile", ".fgb": "FlatGeobuf"}
    fields = [np.array(values, object if isinstance(values[0], str | None) else None)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyogrio.raw.write(
            str(path), shapely.to_wkb(np.array(polygons, object)), fields, [attribute], crs=crs,
            geometry_type=str(polygons[0].geom_type), driver=drivers[path.suffix], **more,
        )  # fmt: skip
    return path


def outline(ids: UInt8, grid: Affine = GRID) -> tuple[list[Any], list[str]]:
    """Polygons of class ids, and their classes."""
    found = list(shapes(ids, transform=grid))
    return [shapely.geometry.shape(shape) for shape, _ in found], [NAMES[int(value)] for _, value in found]


def colors(ids: UInt8, seed: int = 0) -> UInt8:
    """An image (3, H, W) whose first band is 80 times the class id plus noise below 80."""
    noise = np.random.default_rng(seed).integers(1, 80, (3, *ids.shape), dtype=np.uint8)
    return (80 * ids + noise).astype(np.uint8)


def scene(folder: Path, height: int = 300, width: int = 400, suffix: str = ".gpkg", seed: int = 0) -> UInt8:
    """Write ``a.tif`` and polygons of its classes; return its class ids."""
    ids = squares(height, width, seed=seed)
    write_raster(folder / "a.tif", colors(ids, seed))
    write_polygons(folder / f"a{suffix}", *outline(ids))
    return ids


def raster(folder: Path, **settings: Any) -> Raster:
    """The domain of ``a.tif`` with its polygons."""
    given = {"labels": str(folder / "a.gpkg"), "attribute": "use", "block": 100, "gap": 10, **settings}
    found = Domain.model_validate({"name": "raster", "images": str(folder / "a.tif"), "classes": NAMES, **given})
    assert isinstance(found, Raster)
    assert Domain.model_validate(found.model_dump(mode="json")) == found
    return found

"""The areas of a map as polygons: GeoPackage or GeoJSON."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from overfly.core.classes import Classes
from overfly.core.errors import MissingExtraError
from overfly.deploy.scene import opened
from overfly.deploy.store import UnwrittenError

AT_ONCE = 20_000
"""Polygons that are written at once."""


def write_polygons(map_: Path, out: Path, classes: Classes, *, smallest: int = 10) -> Path:
    """Outline the areas of each class of a finished map.

    Outlines follow the pixels' edges, so that neighbours share them. Areas below the smallest are left out, and so are
    holes below it in others. Attributes: class_id, class, colour, and area in square units of the coordinate system
    (metres, mostly; square pixels where there is none). GeoJSON is written in longitude and latitude (RFC 7946), where
    the map has a coordinate system.

    Args:
        map_: a map of class ids, 255 where nothing was measured.
        out: file that ends in .gpkg or .geojson.
        classes: names and colours.
        smallest: area of the smallest polygon, in pixels.

    Raises:
        MissingExtraError: pyogrio or shapely is not installed.
        UnwrittenError: the file cannot be written.
    """
    try:
        import shapely
        from pyogrio.errors import DataLayerError, DataSourceError
    except ImportError as error:
        raise MissingExtraError(str(error.name or "pyogrio"), "vector", "polygons of a map") from None
    from rasterio.features import shapes

    web = out.suffix == ".geojson"
    with opened(str(map_)) as dataset:
        transform = dataset.transform
        least = smallest * abs(transform.determinant) * (1 - 1e-6)  # a square's area is rounded
        crs = dataset.crs.to_wkt() if dataset.crs else None
        rings: list[Any] = []
        ids: list[int] = []
        band = dataset.read(1)
        for shape, number in shapes(band, mask=band != 255, transform=transform):
            polygon = _filled(shapely, shape["coordinates"], least)
            if polygon is not None:
                rings.append(polygon)
                ids.append(int(number))
    numbers = np.array(ids, np.int32)
    names = np.array([classes.names[number] for number in ids], object)
    colours = np.array(["#{:02x}{:02x}{:02x}".format(*classes.colours[number]) for number in ids], object)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a map of a plain picture has no coordinate system
            _write(out, crs, rings, [numbers, names, colours], web)
    except (DataSourceError, DataLayerError) as error:
        raise UnwrittenError(
            f"{out.name} cannot be written ({' '.join(str(error).split())}); make room there"
        ) from error
    return out


def _write(out: Path, crs: str | None, polygons: list[Any], fields: list[Any], web: bool) -> None:
    import pyogrio.raw
    import shapely

    options: dict[str, Any] = {"RFC7946": "YES"} if web and crs else {}
    step = max(1, len(polygons)) if web else AT_ONCE
    for begin in range(0, max(1, len(polygons)), step):
        part = slice(begin, begin + step)
        values = [*(field[part] for field in fields), shapely.area(polygons[part])]
        pyogrio.raw.write(
            str(out), shapely.to_wkb(polygons[part]), values, ["class_id", "class", "colour", "area"], layer="map",
            crs=crs, geometry_type="Polygon", driver="GeoJSON" if web else "GPKG", append=begin > 0, **options,
        )  # fmt: skip


def _filled(shapely: Any, coordinates: list[Any], least: float) -> Any:
    """A polygon without small holes; None where it is too small itself."""
    outer, *holes = coordinates
    if shapely.area(shapely.polygons(outer)) < least:
        return None
    kept = [hole for hole in holes if shapely.area(shapely.polygons(hole)) >= least]
    return shapely.polygons(outer, [shapely.linearrings(hole) for hole in kept] or None)


__all__ = ["write_polygons"]

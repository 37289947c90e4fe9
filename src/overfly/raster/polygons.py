"""The areas of a map as polygons: GeoPackage or GeoJSON."""

from __future__ import annotations

import shutil
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfly.core.classes import Classes
from overfly.core.errors import DataError, MissingExtraError
from overfly.raster.georeference import Plane, equal_area_plane
from overfly.raster.raster_source import open_raster
from overfly.raster.resume_store import UnwrittenError

AT_ONCE = 20_000
"""Polygons that are written at once."""


def write_polygons(map_: Path, out: Path, classes: Classes, *, min_area: int = 10) -> Path:
    """Outline the areas of each class of a finished map.

    Outlines follow the pixels' edges, so that neighbors share them. Areas below the smallest are left out, and so are
    holes below it in others. Attributes: class_id, class, color, and area in square meters: on the ellipsoid where
    coordinates are degrees, else in the plane of the map's projection; in pixels where there is no coordinate system.
    GeoJSON is written in longitude and latitude (RFC 7946), where the map has a coordinate system.

    Args:
        map_: a map of class ids, 255 where nothing was measured.
        out: file that ends in .gpkg or .geojson.
        classes: names and colors.
        min_area: area of the smallest polygon, in pixels.

    Raises:
        MissingExtraError: pyogrio or shapely is not installed.
        UnwrittenError: the file cannot be written whole, as on a full disk, or the map cannot be read.
    """
    try:
        import shapely  # noqa: F401 - seen here, used below
        from pyogrio._err import CPLE_BaseError
        from pyogrio.errors import DataLayerError, DataSourceError, FeatureError
    except ImportError as error:
        raise MissingExtraError(str(error.name or "pyogrio"), "vector", "polygons of a map") from None
    try:
        crs, plane, rings, ids = _outlines(map_, min_area)
    except DataError as error:  # the map has just been made: it is the disk that fails
        raise UnwrittenError(f"{error}, by giving the same command again") from error
    numbers = np.array(ids, np.int32)
    names = np.array([classes.names[number] for number in ids], object)
    colors = np.array(["#{:02x}{:02x}{:02x}".format(*classes.colors[number]) for number in ids], object)
    for part in out.parent.glob(f"{out.name}*"):  # of a try that failed
        part.unlink()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a map of a plain picture has no coordinate system
            fields = [numbers, names, colors, _areas(rings, plane)]
            _write(out, crs, rings, fields, out.suffix == ".geojson")
        reason = _flaw(out, len(rings))
    except (DataSourceError, DataLayerError, FeatureError, CPLE_BaseError, OSError) as error:
        reason = " ".join(str(error).split())
    if reason:
        room = shutil.disk_usage(out.parent).free
        out.unlink(missing_ok=True)
        raise UnwrittenError(
            f"{out.name} could not be written whole into {out.parent} ({reason}; {room / 1e6:.1f} MB were free); free "
            "space there and give the same command again: it goes on where it was"
        )
    return out


def _outlines(map_: Path, min_area: int) -> tuple[str | None, Plane, list[Any], list[int]]:
    """The map's coordinate system, a plane in which areas are true, its polygons, and the class of each."""
    import shapely
    from rasterio.features import shapes

    rings: list[Any] = []
    ids: list[int] = []
    with open_raster(str(map_)) as dataset:
        transform = dataset.transform
        least = min_area * abs(transform.determinant) * (1 - 1e-6)  # a square's area is rounded
        band = dataset.read(1)
        for shape, number in shapes(band, mask=band != 255, transform=transform):
            polygon = _filled(shapely, shape["coordinates"], least)
            if polygon is not None:
                rings.append(polygon)
                ids.append(int(number))
        return dataset.crs.to_wkt() if dataset.crs else None, equal_area_plane(dataset), rings, ids


def _flaw(out: Path, count: int) -> str:
    """What is wrong with a written file; empty where it is whole: what fails at closing, GDAL tells nobody."""
    if not out.is_file():
        return "it is not there"
    if out.suffix == ".gpkg":
        try:
            with closing(sqlite3.connect(out)) as base:
                state = base.execute("PRAGMA integrity_check(1)").fetchone()[0]
                held = base.execute("SELECT count(*) FROM map").fetchone()[0]
        except sqlite3.Error as error:
            return str(error)
        return "it is not whole" if state != "ok" or held != count else ""
    held, last = 0, b""
    with out.open("rb") as file:
        for line in file:
            held += line.startswith(b'{ "type": "Feature",')
            if b"\0" in line:
                return "it has holes"
            last = line.strip() or last
    return "it breaks off" if held != count or last != b"}" else ""


def _write(out: Path, crs: str | None, polygons: list[Any], fields: list[Any], web: bool) -> None:
    import pyogrio.raw
    import shapely

    options: dict[str, Any] = {"RFC7946": "YES"} if web and crs else {}
    step = max(1, len(polygons)) if web else AT_ONCE
    for begin in range(0, max(1, len(polygons)), step):
        part = slice(begin, begin + step)
        values = [field[part] for field in fields]
        pyogrio.raw.write(
            str(out), shapely.to_wkb(polygons[part]), values, ["class_id", "class", "color", "area"], layer="map",
            crs=crs, geometry_type="Polygon", driver="GeoJSON" if web else "GPKG", append=begin > 0, **options,
        )  # fmt: skip


def _areas(polygons: list[Any], plane: Plane) -> NDArray[np.float64]:
    """Area of each polygon, in square meters."""
    import shapely

    parts = (polygons[begin : begin + AT_ONCE] for begin in range(0, len(polygons), AT_ONCE))
    found = [shapely.area(shapely.transform(np.array(part, object), plane)) for part in parts]
    return np.concatenate([np.zeros(0), *found])


def _filled(shapely: Any, coordinates: list[Any], least: float) -> Any:
    """A polygon without small holes; None where it is too small itself."""
    outer, *holes = coordinates
    if shapely.area(shapely.polygons(outer)) < least:
        return None
    kept = [hole for hole in holes if shapely.area(shapely.polygons(hole)) >= least]
    return shapely.polygons(outer, [shapely.linearrings(hole) for hole in kept] or None)

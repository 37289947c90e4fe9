"""Outline the areas of a map as polygons: GeoPackage or GeoJSON."""

import math
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import CRS, warp
from rasterio.features import shapes

from overfly.core.classes import Classes
from overfly.core.errors import DataError, import_extra
from overfly.core.records import IGNORE
from overfly.data.headers import ground_distance, open_raster
from overfly.raster.writer import UnwrittenError, incomplete_file

CHUNK = 20_000
"""Polygons that are written at once."""
Projection = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Converts coordinates (N, 2) of a raster to meters in a plane (N, 2)."""


def write_polygons(map_: Path, out: Path, classes: Classes, *, min_area: int = 10) -> Path:
    """Outline the areas of each class of a finished map.

    Outlines follow the pixels' edges, so that neighbors share them. Areas below ``min_area`` are left out, and holes
    below it are filled. Attributes: class_id, class, color, and area in square meters: on the ellipsoid if coordinates
    are degrees, else in the plane of the map's projection; in pixels without a coordinate reference system. GeoJSON is
    written in longitude and latitude (RFC 7946) if the map has a coordinate reference system. The map holds class ids,
    255 for no data; ``out`` ends in .gpkg or .geojson; ``min_area`` is in pixels. Raises
    `MissingExtraError`: pyogrio or shapely is not installed, and `UnwrittenError`: the file cannot be written whole, as
    on a full disk, or the map cannot be read.
    """
    for package in ("shapely", "pyogrio"):
        import_extra(package, "vector", "polygons of a map")
    from pyogrio._err import CPLE_BaseError
    from pyogrio.errors import DataLayerError, DataSourceError, FeatureError

    for part in out.parent.glob(f"{out.name}*"):  # of a failed attempt
        part.unlink()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # maps without a coordinate reference system
            reason = _damage(out, _write(map_, out, classes, min_area))
    except DataError as error:  # the map was just written, so the disk has failed
        raise UnwrittenError(f"{error}, by giving the same command again") from error
    except (DataSourceError, DataLayerError, FeatureError, CPLE_BaseError, sqlite3.Error, OSError) as error:
        reason = " ".join(str(error).split())
    if reason:
        failure = incomplete_file(out, reason)
        out.unlink(missing_ok=True)
        raise failure
    return out


def _write(map_: Path, out: Path, classes: Classes, min_area: int) -> int:
    """Write the polygons of a map, and return their number. GeoJSON cannot be appended to: all are written at once."""
    import pyogrio.raw
    import shapely

    written, begun = 0, False
    with open_raster(str(map_)) as dataset:
        crs, projection = dataset.crs.to_wkt() if dataset.crs else None, _equal_area_projection(dataset)
        geojson = out.suffix == ".geojson"
        options: dict[str, Any] = {"RFC7946": "YES"} if geojson and crs else {}
        outlines = _outlines(dataset, min_area)
        while (part := list(islice(outlines, None if geojson else CHUNK))) or not begun:
            polygons = np.array([polygon for polygon, _ in part], object)
            ids = np.array([number for _, number in part], np.int32)
            names = np.array([classes.names[number] for number in ids], object)
            colors = np.array(["#{:02x}{:02x}{:02x}".format(*classes.colors[number]) for number in ids], object)
            areas = shapely.area(shapely.transform(polygons, projection))
            pyogrio.raw.write(
                str(out), shapely.to_wkb(polygons), [ids, names, colors, areas], ["class_id", "class", "color", "area"],
                layer="map", crs=crs, geometry_type="Polygon", driver="GeoJSON" if geojson else "GPKG",
                append=begun, **options,
            )  # fmt: skip
            written, begun = written + len(part), True
    return written


def _outlines(dataset: Any, min_area: int) -> Iterator[tuple[Any, int]]:
    """Yield polygon and class id of each area of a map."""
    import shapely

    transform = dataset.transform
    least = min_area * abs(transform.determinant) * (1 - 1e-6)  # a square's area is rounded
    band = dataset.read(1)
    for shape, number in shapes(band, mask=band != IGNORE, transform=transform):
        outer, *holes = shape["coordinates"]
        if shapely.area(shapely.polygons(outer)) >= least:
            large = [hole for hole in holes if shapely.area(shapely.polygons(hole)) >= least]
            yield shapely.polygons(outer, [shapely.linearrings(hole) for hole in large] or None), int(number)


def _damage(out: Path, count: int) -> str:
    """Return the defect of a written file, or an empty text. GDAL does not report errors on closing a file."""
    import pyogrio.raw

    if out.suffix == ".gpkg":
        with closing(sqlite3.connect(out)) as base:
            state = base.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if state != "ok":
            return str(state)
    written = pyogrio.raw.read(out, columns=[], return_fids=True, read_geometry=False)[1]
    return "" if len(written) == count else "it is incomplete"


def _equal_area_projection(dataset: Any) -> Projection:
    """Return the projection to a plane in meters that keeps areas: of degrees cylindrical; identity if unknown."""
    crs = dataset.crs
    if not crs or not crs.is_geographic:
        grid, ground = dataset.transform, ground_distance(dataset)
        factor = 1.0 if ground is None else math.sqrt(ground[0] * ground[1] / abs(grid.determinant))
        return lambda points: points * factor
    shape = [part for part in crs.to_proj4().split() if part.startswith(("+ellps", "+datum", "+a=", "+b=", "+R="))]
    own, plane = (CRS.from_proj4(" ".join([f"+proj={name}", *shape, "+over"])) for name in ("longlat", "cea"))
    degrees = math.degrees(crs.units_factor[1])
    return lambda points: np.stack(warp.transform(own, plane, *(points * degrees).T), axis=1)

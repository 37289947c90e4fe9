"""Where a raster lies on the ground: CRS, transform, control points; kept exactly, and measured in meters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement

import numpy as np
from numpy.typing import NDArray

EQUATOR = 111_319.49
"""Meters that a degree is long on the equator (WGS 84)."""
MERIDIAN = 110_574.0
"""Meters that a degree of latitude is long there."""
ELLIPSOID = (6_378_137.0, 298.257223563)
"""Half the longer axis in meters, and the inverse flattening, of WGS 84."""
Plane = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From coordinates (N, 2) of a raster to meters in a plane (N, 2)."""


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies.

    Attributes:
        crs: coordinate system as WKT; empty where there is none.
        transform: from pixel to coordinate in GDAL's order (x of the corner, x a column, x a row, y of the corner,
            y a column, y a row); None where there is none.
        points: control points (column, row, x, y, z, name).
        points_crs: their coordinate system as WKT.
        rational: coefficients of a rational polynomial camera model, as the file's text.
        point: whether coordinates are those of pixel centers in the file's own words (AREA_OR_POINT).
    """

    crs: str = ""
    transform: tuple[float, ...] | None = None
    points: tuple[tuple[float, float, float, float, float, str], ...] = ()
    points_crs: str = ""
    rational: tuple[tuple[str, str], ...] = ()
    point: bool = False


def georeference(dataset: Any) -> Georeference:
    """Where an open rasterio dataset lies."""
    points, points_crs = dataset.gcps
    transform = dataset.transform
    return Georeference(
        crs=dataset.crs.to_wkt() if dataset.crs else "",
        transform=None if transform.is_identity else tuple(transform.to_gdal()),
        points=tuple((p.col, p.row, p.x, p.y, p.z or 0.0, str(p.id)) for p in points),
        points_crs=points_crs.to_wkt() if points_crs else "",
        rational=tuple(sorted(dataset.tags(ns="RPC").items())),
        point=dataset.tags().get("AREA_OR_POINT") == "Point",
    )


def ground_size(dataset: Any) -> tuple[float, float] | None:
    """Meters on the ground that a pixel of an open dataset is high and wide (y, x), at its middle; None if unknown."""
    crs, transform = dataset.crs, dataset.transform
    if not crs or transform.is_identity:
        return None
    x, y = math.hypot(transform.a, transform.d), math.hypot(transform.b, transform.e)
    if crs.is_geographic:
        latitude = transform.d * dataset.width / 2 + transform.e * dataset.height / 2 + transform.f
        return y * MERIDIAN, x * EQUATOR * max(0.01, math.cos(math.radians(latitude)))
    try:
        meters = float(crs.linear_units_factor[1])
    except Exception:  # rasterio raises its own for a system without a linear unit
        return None
    return y * meters, x * meters


def equal_area_plane(dataset: Any) -> Plane:
    """A plane in which areas of an open dataset's polygons are square meters; its own where it says no unit.

    Degrees go to the cylindrical equal-area projection of their ellipsoid (Snyder, Map Projections: A Working Manual,
    1987, equations 3-12, 10-14 and 10-15): edges of pixels, along meridians and parallels, stay straight in it.
    """
    crs = dataset.crs
    if not crs or not crs.is_geographic:
        try:
            meters = float(crs.linear_units_factor[1]) if crs else 1.0
        except Exception:  # rasterio raises its own for a system without a linear unit
            meters = 1.0
        return lambda points: points * meters
    said = re.search(r'(?:SPHEROID|ELLIPSOID)\["[^"]*",\s*([\d.]+),\s*([\d.]+)', crs.to_wkt())
    axis, inverse = (float(said[1]), float(said[2])) if said else ELLIPSOID
    squared = 2 / inverse - 1 / inverse**2 if inverse else 0.0
    radians = float(crs.units_factor[1])

    def plane(points: NDArray[np.float64]) -> NDArray[np.float64]:
        east, sine = axis * radians * points[:, 0], np.sin(radians * points[:, 1])
        if not squared:
            return np.stack([east, axis * sine], axis=1)
        ratio = math.sqrt(squared)
        bent = sine / (1 - squared * sine**2) + np.arctanh(ratio * sine) / ratio
        return np.stack([east, axis * (1 - squared) / 2 * bent], axis=1)

    return plane


def describe(root: Element, place: Georeference) -> None:
    """Write a place into a VRT's root element."""
    if place.crs:
        SubElement(root, "SRS").text = place.crs
    if place.transform is not None:
        SubElement(root, "GeoTransform").text = ", ".join(repr(float(number)) for number in place.transform)
    if place.points:
        listed = SubElement(root, "GCPList", {"Projection": place.points_crs})
        for column, row, x, y, z, name in place.points:
            values = {"Id": name, "Pixel": repr(column), "Line": repr(row), "X": repr(x), "Y": repr(y), "Z": repr(z)}
            SubElement(listed, "GCP", values)
    if place.rational:
        domain = SubElement(root, "Metadata", {"domain": "RPC"})
        for key, value in place.rational:
            SubElement(domain, "MDI", {"key": key}).text = value

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio.raw
import pytest
import shapely
from rasterio import Affine

from overfly.raster import polygons
from overfly.raster.polygons import write_polygons
from rasters import CLASSES, write


@pytest.fixture
def class_map(tmp_path: Path) -> Path:
    label = np.zeros((40, 60), np.uint8)
    label[:, 30:] = 2
    label[10:14, 10:14] = 1
    label[5, 5] = 2  # a speck
    label[30:, :20] = 255
    return write(tmp_path / "map.tif", label[None], nodata=255)


def areas(table: tuple[Any, ...]) -> dict[str, list[float]]:
    names, fields = table[0]["fields"], table[3]
    result: dict[str, list[float]] = {}
    for name, area in zip(fields[list(names).index("class")], fields[list(names).index("area")], strict=True):
        result.setdefault(name, []).append(round(float(area) / 0.09, 3))
    return result


@pytest.mark.parametrize("chunk", [1, 2, 20_000])
def test_areas_are_outlined_and_small_ones_merged(
    class_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(polygons, "CHUNK", chunk)
    table = pyogrio.raw.read(write_polygons(class_map, tmp_path / "a.gpkg", CLASSES, min_area=10))
    assert areas(table) == {"dark": [40 * 30 - 16 - 200], "middle": [16], "bright": [40 * 30]}
    assert table[0]["crs"] == "EPSG:32640"
    shapes = shapely.from_wkb(table[2])
    assert shapely.is_valid(shapes).all()
    assert shapely.intersection_all(shapes).is_empty
    assert set(table[3][list(table[0]["fields"]).index("color")]) == {"#0a141e", "#78828c", "#faf0e6"}
    every = areas(pyogrio.raw.read(write_polygons(class_map, tmp_path / "b.gpkg", CLASSES, min_area=1)))
    assert every == {"dark": [40 * 30 - 17 - 200], "middle": [16], "bright": [1, 40 * 30]}


def test_geojson_is_in_longitude_and_latitude(class_map: Path, tmp_path: Path) -> None:
    held = json.loads(write_polygons(class_map, tmp_path / "a.geojson", CLASSES).read_text())
    longitude, latitude = held["features"][0]["geometry"]["coordinates"][0][0]
    assert 54 < longitude < 56
    assert 24 < latitude < 25
    assert {feature["properties"]["class"] for feature in held["features"]} == {"dark", "middle", "bright"}


@pytest.mark.parametrize(
    ("crs", "north", "axis", "flat", "ending"),
    [("EPSG:4326", 60.0, 6_378_137.0, 1 / 298.257223563, "gpkg"),
     ("EPSG:4326", -8.0, 6_378_137.0, 1 / 298.257223563, "geojson"),
     ("+proj=longlat +R=1737400 +no_defs", 45.0, 1_737_400.0, 0.0, "gpkg")],
)  # fmt: skip
def test_areas_of_degrees_are_square_meters(  # noqa: PLR0917 - fixtures
    tmp_path: Path, crs: str, north: float, axis: float, flat: float, ending: str
) -> None:
    label, step = np.zeros((40, 60), np.uint8), 0.01
    label[10:30, 20:50] = 1  # a hole in the first class
    georeference = {"crs": crs, "transform": Affine(step, 0, 179.7, 0, -step, north)}
    map_ = write(tmp_path / "map.tif", label[None], nodata=255, **georeference)

    def patch(rows: tuple[int, int], columns: int) -> float:
        """Meridian and parallel lengths of an ellipsoid, summed up row by row in small steps."""
        latitude = np.radians(north - step * (np.linspace(*rows, 20_001)[1:] - (rows[1] - rows[0]) / 40_000))
        squared = flat * (2 - flat)
        bend = 1 - squared * np.sin(latitude) ** 2
        lengths = axis * (1 - squared) / bend**1.5 * axis * np.cos(latitude) / bend**0.5
        return float(lengths.mean() * np.radians(step) ** 2 * (rows[1] - rows[0]) * columns)

    expected = {"middle": patch((10, 30), 30), "dark": patch((0, 40), 60) - patch((10, 30), 30)}
    table = pyogrio.raw.read(write_polygons(map_, tmp_path / f"a.{ending}", CLASSES))
    names, fields = list(table[0]["fields"]), table[3]
    result = dict(zip(fields[names.index("class")], fields[names.index("area")], strict=True))
    assert result == pytest.approx(expected, rel=1e-6)


def test_feet_are_meters(tmp_path: Path) -> None:
    georeference = {
        "crs": "EPSG:2263",
        "transform": Affine(10, 0, 980_000, 0, -10, 200_000),
    }  # New York, in US survey feet
    map_ = write(tmp_path / "map.tif", np.zeros((1, 20, 30), np.uint8), nodata=255, **georeference)
    table = pyogrio.raw.read(write_polygons(map_, tmp_path / "a.gpkg", CLASSES))
    area = table[3][list(table[0]["fields"]).index("area")]
    assert area == pytest.approx([600 * 100 * (1200 / 3937) ** 2])


def test_a_map_without_crs_has_pixel_coordinates(tmp_path: Path) -> None:
    label = np.zeros((1, 20, 30), np.uint8)
    map_ = write(tmp_path / "map.tif", label, nodata=255, crs=None, transform=Affine(1, 0, 0, 0, -1, 20))
    held = json.loads(write_polygons(map_, tmp_path / "a.geojson", CLASSES).read_text())
    assert held["features"][0]["properties"]["area"] == 600


def test_no_data_has_no_polygons(tmp_path: Path) -> None:
    map_ = write(tmp_path / "map.tif", np.full((1, 20, 30), 255, np.uint8), nodata=255)
    assert len(pyogrio.raw.read(write_polygons(map_, tmp_path / "a.gpkg", CLASSES))[2]) == 0

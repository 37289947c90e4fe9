from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from overfly.core.records import IGNORE, UInt8
from overfly.raster.raster_source import Georeference, georeference
from overfly.web.images import SIDE, Layer, encode_geotiff, max_zoom, render_tile
from served import CLASSES


def _opened(data: bytes | None) -> UInt8:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def test_tiles_at_max_zoom_equal_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 255, (300, 520, 3), dtype=np.uint8)
    assert max_zoom(300, 520) == 2
    whole = np.zeros((2 * SIDE, 3 * SIDE, 4), np.uint8)
    for row in range(2):
        for column in range(3):
            result = _opened(render_tile(Layer(image), 2, column, row))
            whole[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = result
    np.testing.assert_array_equal(whole[:300, :520, :3], image)
    assert (whole[:300, :520, 3] == 255).all()
    assert not whole[300:, :, 3].any()
    assert not whole[:, 520:, 3].any()


def test_class_tiles_are_not_interpolated() -> None:
    ids = np.zeros((600, 600), np.uint8)
    ids[:, 300:] = 1
    ids[500:] = IGNORE
    result = _opened(render_tile(Layer(ids, CLASSES), 0, 0, 0))
    colors = {tuple(color) for color in result.reshape(-1, 4)}
    assert {color for color in colors if color[3]} == {(*color, 255) for color in CLASSES.colors}
    assert result[140, 10, 3] == 0


def test_uncertainty_is_transparent_at_zero() -> None:
    uncertainty = np.zeros((10, 10), np.uint8)
    uncertainty[:, 5:] = 100
    uncertainty[:, 8:] = 255  # no data
    result = _opened(render_tile(Layer(uncertainty), 0, 0, 0))
    assert result[5, 2, 3] == 0
    assert result[5, 7, 3] > 200
    assert result[5, 9, 3] == 0


@pytest.mark.parametrize("place", [(3, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0)])
def test_tiles_outside_the_image_are_none(place: tuple[int, int, int]) -> None:
    assert render_tile(Layer(np.zeros((200, 200, 3), np.uint8)), *place) is None


def test_geotiff_has_coordinates_colors_and_names() -> None:
    rasterio = pytest.importorskip("rasterio")
    ids = np.random.default_rng(0).integers(0, 2, (300, 310), dtype=np.uint8)
    ids[0, 0] = IGNORE
    crs = rasterio.CRS.from_epsg(32650).to_wkt()
    data = encode_geotiff(ids, CLASSES, Georeference(crs, (500000.0, 0.3, 0.0, 3500000.0, 0.0, -0.3)))
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        assert file.crs.to_epsg() == 32650
        assert tuple(file.transform)[:6] == (0.3, 0.0, 500000.0, 0.0, -0.3, 3500000.0)
        assert file.nodata == IGNORE
        assert file.colormap(1)[1] == (250, 240, 230, 255)
        assert json.loads(file.tags()["CLASS_NAMES"])["1"] == CLASSES.names[1]
        np.testing.assert_array_equal(file.read(1), ids)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("kind", ["nothing", "point", "points", "both", "transform", "turned", "rational"])
def test_geotiff_keeps_every_kind_of_georeference(kind: str) -> None:
    rasterio = pytest.importorskip("rasterio")
    crs = rasterio.CRS.from_epsg(32650).to_wkt()
    points = tuple((5.0 * i, 7.0 * (i % 2), 500000.0 + 2 * i, 3500000.0 - 3 * i, 10.0, str(i)) for i in range(1, 5))
    numbers = " ".join(["1", *["0"] * 19])
    rational = {f"{way}_{part}_COEFF": numbers for way in ("LINE", "SAMP") for part in ("NUM", "DEN")}
    rational |= {
        f"{name}_{what}": "10" for name in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT") for what in ("OFF", "SCALE")
    }
    place = {
        "nothing": Georeference(),
        "point": Georeference(crs, (500000.0, 0.5, 0.0, 3500000.0, 0.0, -0.5), pixel_is_point=True),
        "points": Georeference(gcps=points, gcps_crs=crs),
        "both": Georeference(gcps=points, gcps_crs=crs, pixel_is_point=True),
        "transform": Georeference(transform=(5.0, 0.5, 0.0, 9.0, 0.0, -0.5)),
        "turned": Georeference(crs, (500000.0, 0.4, 0.3, 3500000.0, 0.3, -0.4)),
        "rational": Georeference(rpcs=tuple(sorted(rational.items()))),
    }[kind]
    data = encode_geotiff(np.zeros((20, 30), np.uint8), CLASSES, place)
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        result = georeference(file)
        assert (result.crs, result.gcps_crs) == (place.crs, place.gcps_crs)
        assert result.pixel_is_point == place.pixel_is_point
        assert result.gcps == place.gcps
        assert result.transform == (None if place.transform is None else pytest.approx(place.transform))
        tags = {key: value.split() for key, value in result.rpcs}
        assert {key: [float(each) for each in tags[key]] for key, _ in place.rpcs} == {
            key: [float(each) for each in value.split()] for key, value in place.rpcs
        }

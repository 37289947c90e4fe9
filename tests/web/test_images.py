from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overfly.core.records import IGNORE, UInt8
from overfly.raster.manifest import MapSettings
from overfly.raster.raster_source import RasterSource, inspect_raster
from overfly.web.images import (
    COLORS,
    SIDE,
    TilePart,
    class_colors,
    describe_image,
    display_range,
    inspect_image,
    max_zoom,
    render_image,
    render_table,
    tile_part,
)
from rasters import CLASSES, metadata, write


def _opened(data: bytes | None) -> UInt8:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def _source(path: Path, bands: int = 3) -> RasterSource:
    return inspect_raster(str(path), metadata(bands=bands), bands=None, nodata=None, max_value=255.0)


def _part(place: tuple[int, int, int], height: int, width: int) -> TilePart:
    part = tile_part(height, width, *place)
    assert part is not None
    return part


def test_tiles_at_max_zoom_equal_the_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 255, (3, 300, 520), dtype=np.uint8)
    image[:, 7, 9] = 0
    source = _source(write(tmp_path / "a.tif", image, nodata=0))
    assert max_zoom(300, 520) == 2
    whole = np.zeros((2 * SIDE, 3 * SIDE, 4), np.uint8)
    for row in range(2):
        for column in range(3):
            result = _opened(render_image(source, display_range(source), _part((2, column, row), 300, 520)))
            whole[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = result
    np.testing.assert_array_equal(np.moveaxis(whole[:300, :520, :3], -1, 0), image)
    assert np.argwhere(whole[:300, :520, 3] != 255).tolist() == [[7, 9]]
    assert not whole[300:, :, 3].any()
    assert not whole[:, 520:, 3].any()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_deep_images_are_stretched_between_percentiles(tmp_path: Path, dtype: str) -> None:
    image = np.broadcast_to(np.linspace(0, 10_000, 200), (4, 200, 200)).astype(dtype)
    source = _source(write(tmp_path / "a.tif", image), bands=4)
    limits = display_range(source)
    assert limits is not None
    low, high = limits
    np.testing.assert_allclose([low.ravel(), high.ravel()], [[200] * 3, [9800] * 3], atol=60)
    tile = _opened(render_image(source, (low, high), _part((0, 0, 0), 200, 200)))
    assert tile[0, 0].tolist() == [0, 0, 0, 255]
    assert tile[0, 199].tolist() == [255, 255, 255, 255]
    assert abs(int(tile[0, 100, 0]) - 128) < 4


def test_class_tiles_are_not_interpolated_and_hide_classes(tmp_path: Path) -> None:
    ids = np.zeros((1, 600, 600), np.uint8)
    ids[:, :, 300:] = 1
    ids[:, 500:] = IGNORE
    path, part = write(tmp_path / "a.tif", ids), _part((0, 0, 0), 600, 600)
    result = _opened(render_table(path, part, class_colors(CLASSES)))
    colors = {tuple(color) for color in result.reshape(-1, 4)}
    assert {color for color in colors if color[3]} == {(*color, 255) for color in CLASSES.colors[:2]}
    assert result[140, 10, 3] == 0
    result = _opened(render_table(path, part, class_colors(CLASSES, [0, 7])))
    assert {tuple(color) for color in result.reshape(-1, 4) if color[3]} == {(*CLASSES.colors[1], 255)}


def test_uncertainty_is_transparent_at_zero(tmp_path: Path) -> None:
    uncertainty = np.zeros((1, 10, 10), np.uint8)
    uncertainty[:, :, 5:] = 100
    uncertainty[:, :, 8:] = 255  # no data
    path = write(tmp_path / "a.tif", uncertainty, tiled=False)
    result = _opened(render_table(path, _part((0, 0, 0), 10, 10), COLORS))
    assert result[5, 2, 3] == 0
    assert result[5, 7, 3] > 200
    assert result[5, 9, 3] == 0


@pytest.mark.parametrize("place", [(3, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0)])
def test_tiles_outside_the_image_are_none(place: tuple[int, int, int]) -> None:
    assert tile_part(200, 200, *place) is None


@pytest.mark.parametrize(
    ("dtype", "bands", "nodata", "expected"),
    [
        ("uint8", 3, None, ("1,2,3", "255", "", True)),
        ("uint8", 5, 0, ("1,2,3", "255", "0", False)),
        ("uint16", 3, 7, ("1,2,3", "4000", "7", False)),
        ("float32", 4, float("nan"), ("1,2,3", "4000", "nan", False)),
        ("uint8", 1, None, ("", "255", "", False)),
    ],
)
def test_fields_are_suggested_from_file_and_network(
    tmp_path: Path, dtype: str, bands: int, nodata: float | None, expected: tuple[str, str, str, bool]
) -> None:
    image = np.full((bands, 40, 50), 9, dtype)
    image[0, 20, 20] = 4000 if dtype != "uint8" else 200
    path = write(tmp_path / "a.tif", image, nodata=nodata, tiled=False)
    found = describe_image(path, metadata())
    assert (found.bands, found.max_value, found.nodata, not found.problem) == expected
    if found.bands:  # the suggestion fits
        settings = MapSettings(bands=found.bands, max_value=float(found.max_value))
        assert inspect_image(path, metadata(), settings).bands == (1, 2, 3)

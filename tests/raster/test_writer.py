"""Maps that cannot be written whole, and maps of few pixels."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from overfly.core.atomic_files import TRAILER_BYTES
from overfly.core.errors import DataError
from overfly.raster import map_raster as module
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster
from overfly.raster.polygons import write_polygons
from overfly.raster.writer import write_cog
from rasters import brightness_classes, ids, noise, pointwise, write

SETTINGS = MapSettings(window=64, batch=8, uncertainty=True, polygons="gpkg")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk on which files grow to a size, and no further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_disk(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    whole: Any = {"write_cog": write_cog, "write_polygons": write_polygons}[name]

    def limited_write(*arguments: Any, **more: Any) -> Any:
        with file_size_limit(size):
            return whole(*arguments, **more)

    monkeypatch.setattr(module, name, limited_write)


@pytest.mark.parametrize("missing", [1, 3000, 30_000, 90_000])
def test_incomplete_map_is_not_published(missing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(600, 700)
    source, out = write(tmp_path / "scene.tif", pixels), tmp_path / "map.tif"
    settings = replace(SETTINGS, uncertainty=False, polygons=None)
    map_raster(pointwise(), str(source), tmp_path / "whole.tif", settings, network="none")
    with monkeypatch.context() as patched:
        limit_disk(patched, "write_cog", (tmp_path / "whole.tif").stat().st_size - TRAILER_BYTES - missing)
        with pytest.raises(DataError, match=r"\.tif"):
            map_raster(pointwise(), str(source), out, settings, network="none")
    left = {path.name for path in tmp_path.glob("*map*")}
    assert left == {".map.tif.unfinished"}
    assert {path.name for path in (tmp_path / ".map.tif.unfinished").iterdir()} >= {
        "classes_unfinished.tif",
        "progress.json",
    }
    assert map_raster(pointwise(), str(source), out, settings, network="none").windows == 0
    np.testing.assert_array_equal(ids(out), ids(tmp_path / "whole.tif"))


@pytest.mark.parametrize("kind", ["gpkg", "geojson"])
@pytest.mark.parametrize("size", [3000, 30_000, 100_000, 120_000])
def test_incomplete_polygons_are_not_published(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "scene.tif", noise(100, 90)), tmp_path / "map.tif"
    settings = replace(SETTINGS, polygons=kind, min_area=1)
    with monkeypatch.context() as patched:
        limit_disk(patched, "write_polygons", size)
        with pytest.raises(DataError, match=rf"polygons.{kind}"):
            map_raster(pointwise(), str(source), out, settings, network="none")
    assert sorted(path.name for path in tmp_path.glob("*map*")) == [".map.tif.unfinished"]
    result = map_raster(pointwise(), str(source), out, settings, network="none")
    assert result.windows == 0
    assert all(file.stat().st_size > 0 for file in result.files)


def test_blocked_file_is_reported(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(60, 60)), tmp_path / "map.tif"
    os.makedirs(tmp_path / ".map.tif.unfinished" / "classes.tif")  # noqa: PTH103
    with pytest.raises(DataError, match=r"classes.tif"):
        map_raster(pointwise(), str(source), out, SETTINGS, network="none")
    assert (tmp_path / ".map.tif.unfinished" / "classes_unfinished.tif").exists()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (1, 1300), (2, 2)])
def test_rasters_of_few_pixels(height: int, width: int, tmp_path: Path) -> None:
    pixels = noise(height, width)
    source, out = write(tmp_path / "scene.tif", pixels), tmp_path / "map.tif"
    settings = replace(SETTINGS, probabilities=True, min_area=1)
    result = map_raster(pointwise(), str(source), out, settings, network="none")
    np.testing.assert_array_equal(ids(out), brightness_classes(pixels[None].astype(np.float32))[0].argmax(0))
    with rasterio.open(tmp_path / "map_probabilities.tif") as actual:
        truth = 100 * brightness_classes(pixels[None].astype(np.float32))[0]
        np.testing.assert_allclose(actual.read(), truth, atol=0.51)
    assert len(result.files) == 4

"""No data in rasters that are resampled for the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp, Resampling

from overfly.core.errors import DataError, NotFiniteError
from overfly.data import raster_grid
from overfly.data.raster_grid import read_resampled
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster
from overfly.raster.raster_source import inspect_raster
from rasters import brightness_classes, ids, noise, pointwise, write

SETTINGS = MapSettings(window=64, batch=8)


@pytest.mark.parametrize("resolution", [0.17, 0.6, 1.0, 7.0])
@pytest.mark.parametrize("how", ["given", "declared", "undeclared nan", "nan and given", "mask", "alpha"])
def test_no_data_has_no_weight_when_resampled(how: str, resolution: float, tmp_path: Path) -> None:
    pixels = np.full((3, 90, 110), 128, np.float32 if "nan" in how else np.int16 if "a" not in how[:1] else np.uint8)
    dead = np.random.default_rng(0).random((90, 110)) < 0.1
    dead[:40, :40] = True
    settings, path, predictor = (
        replace(SETTINGS, resolution=resolution, max_value=255),
        tmp_path / "scene.tif",
        pointwise(),
    )
    if how in ("mask", "alpha"):
        alpha = np.where(dead, 0, 255).astype(np.uint8)
        shown = np.where(dead, 0, pixels).astype(np.uint8)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write(path, np.concatenate([shown, alpha[None]]) if how == "alpha" else shown)
            with rasterio.open(path, "r+") as dataset:
                if how == "mask":
                    dataset.write_mask(~dead)
                else:
                    colors = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
                    dataset.colorinterp = colors
    else:
        value = np.nan if how == "undeclared nan" else -9999
        stored = np.where(dead, value, pixels).astype(pixels.dtype)
        if how == "nan and given":
            stored[:, 60, 60:80], dead[60, 60:80] = np.nan, True
        write(path, stored, nodata=-9999 if how == "declared" else None)
        settings = replace(settings, nodata=-9999.0) if "given" in how else settings
    seen: list[np.ndarray] = []

    def run(images: np.ndarray) -> np.ndarray:
        seen.append(np.unique(images))
        return brightness_classes(images)

    map_raster(replace(predictor, run=run), str(path), tmp_path / "map.tif", settings, network="none")
    assert set(np.concatenate(seen).round(3)) <= {0, 128}
    np.testing.assert_array_equal(ids(tmp_path / "map.tif") == 255, dead)


@pytest.mark.parametrize("scale", [(0.25, 0.25), (0.4, 0.31), (0.011, 0.02), (2.0, 3.0)])
def test_valid_pixels_are_averaged_as_by_gdal(
    scale: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raster_grid, "CHUNK", 32)
    pixels = noise(200, 300).astype(np.float32)
    source = write(tmp_path / "scene.tif", pixels)
    scene = inspect_raster(str(source), pointwise().metadata, bands=None, nodata=None, max_value=255)
    rows, columns = round(200 * scale[0]), round(300 * scale[1])
    how = Resampling.average if max(scale) <= 1 else Resampling.bilinear
    with rasterio.open(source) as dataset:
        expected = dataset.read(out_shape=(3, rows, columns), resampling=how)
        grid = (rows / 200, columns / 300)
        result, nodata_mask = read_resampled(dataset, scene, grid, (0, rows), (0, columns))
        np.testing.assert_allclose(result, expected, atol=0.01)
        assert not nodata_mask.any()
        part, _ = read_resampled(dataset, scene, grid, (rows // 2, rows), (columns // 3, columns))
    np.testing.assert_allclose(part, result[:, rows // 2 :, columns // 3 :], atol=0.001)


def test_excessive_enlargement_is_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "scene.tif", noise(60, 60))
    settings = replace(SETTINGS, resolution=1e-8)
    with pytest.raises(DataError, match=r"--resolution .*0\.00473"):
        map_raster(pointwise(), str(source), tmp_path / "map.tif", settings, network="none")


def test_nodata_of_nan_gives_equal_manifests(tmp_path: Path) -> None:
    source, out = write(tmp_path / "scene.tif", noise(60, 60)), tmp_path / "map.tif"
    settings = replace(SETTINGS, nodata=float("nan"))
    assert map_raster(pointwise(), str(source), out, settings, network="none").created
    assert not map_raster(pointwise(), str(source), out, settings, network="none").created


def test_implausible_values_are_reported_with_options(tmp_path: Path) -> None:
    pixels = (noise(60, 60) / 255).astype(np.float32)
    pixels[:, :9, :9] = -9e19
    source = write(tmp_path / "scene.tif", pixels)
    broken = replace(pointwise(), run=lambda images: brightness_classes(images) + np.float32(0) * images[:, :1] ** 2)
    with (
        np.errstate(all="ignore"),
        pytest.raises(NotFiniteError, match=r"scene\.tif; .*--nodata .*--max-value"),
    ):
        map_raster(broken, str(source), tmp_path / "map.tif", replace(SETTINGS, max_value=1.0), network="none")
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.parametrize("resolution", [None, 1.2])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_undeclared_no_data_is_rejected(tmp_path: Path, dtype: str, resolution: float | None) -> None:
    pixels = noise(60, 60).astype(dtype)
    pixels[:, :9, :9] = -9999
    source = write(tmp_path / "scene.tif", pixels)
    settings = replace(SETTINGS, max_value=255, resolution=resolution)
    with pytest.raises(DataError, match=r"scene\.tif .*-9999 .*--nodata"):
        map_raster(pointwise(), str(source), tmp_path / "map.tif", settings, network="none")
    map_raster(pointwise(), str(source), tmp_path / "map.tif", replace(settings, nodata=-9999.0), network="none")
    assert (ids(tmp_path / "map.tif")[:9, :9] == 255).all()

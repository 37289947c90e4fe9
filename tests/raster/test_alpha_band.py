"""Alpha bands: which band is one, where they mask the map, and what the network reads where they are 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray

from overfly.core.errors import DataError
from overfly.data.reading import nodata_mask, read_image
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import MapResult, map_raster
from rasters import brightness_classes, ids, noise, pointwise, write

SETTINGS = MapSettings(window=64, batch=8)


def make_map(source: Path, out: Path, predictor: Any = None, **changes: Any) -> MapResult:
    settings = replace(SETTINGS, **changes)
    return map_raster(predictor or pointwise(), str(source), out, settings, network="none")


def shown(source: Path, out: Path, **changes: Any) -> NDArray[np.float32]:
    """The windows (B, C, H, W) that a network of three bands reads."""
    seen: list[NDArray[np.float32]] = []

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(images.copy())
        return brightness_classes(images)

    make_map(source, out, replace(pointwise(), run=run), **changes)
    return np.concatenate(seen)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Red, green, blue and near infrared, written without color interpretation: GDAL marks the last as alpha."""
    path = write(tmp_path / "nir.tif", np.concatenate([noise(100, 120), noise(100, 120, 1, seed=1)]))
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[-1].name == "alpha"
        assert (dataset.read(4) == 0).any()
    return path


def test_varying_alpha_band_needs_an_option(measured: Path, tmp_path: Path) -> None:
    for bands in (None, "3,2,1"):
        with pytest.raises(DataError, match=r"--no-alpha-band --bands .*, or --alpha-band"):
            make_map(measured, tmp_path / "map.tif", bands=bands)
    assert [path.name for path in tmp_path.iterdir()] == ["nir.tif"]
    result = make_map(measured, tmp_path / "map.tif", alpha_band=False, bands="1,2,3")
    assert not result.notes
    assert (ids(tmp_path / "map.tif") != 255).all()
    with pytest.raises(DataError, match="--bands"):
        make_map(measured, tmp_path / "other.tif", alpha_band=False)
    make_map(measured, tmp_path / "hidden.tif", alpha_band=True)
    with rasterio.open(measured) as dataset:
        np.testing.assert_array_equal(ids(tmp_path / "hidden.tif") == 255, dataset.read(4) == 0)


def test_network_of_four_bands_reads_the_marked_band(measured: Path, tmp_path: Path) -> None:
    predictor = replace(pointwise(bands=4), run=lambda images: brightness_classes(images[:, 3:]))
    assert not make_map(measured, tmp_path / "map.tif", predictor).notes
    with rasterio.open(measured) as dataset:
        truth = brightness_classes(dataset.read([4])[None].astype(np.float32))[0].argmax(0)
    np.testing.assert_array_equal(ids(tmp_path / "map.tif"), truth)
    with pytest.raises(DataError, match="--alpha-band"):
        make_map(measured, tmp_path / "other.tif", predictor, alpha_band=True)
    single = write(tmp_path / "one.tif", noise(40, 40, 1))
    with pytest.raises(DataError, match="--alpha-band"):
        make_map(single, tmp_path / "other.tif", pointwise(bands=1), alpha_band=True)


def test_alpha_band_is_noted_and_can_be_disabled(tmp_path: Path) -> None:
    pixels = noise(100, 100, 4)
    pixels[3] = 255
    pixels[3, :60], pixels[3, 60:63] = 0, 90  # hidden, and a soft edge
    source = write(tmp_path / "scene.tif", pixels)
    result = make_map(source, tmp_path / "map.tif")
    assert len(result.notes) == 1
    assert "--no-alpha-band" in result.notes[0]
    assert ((ids(tmp_path / "map.tif") == 255) == (pixels[3] == 0)).all()
    assert not make_map(source, tmp_path / "alpha.tif", alpha_band=True).notes
    make_map(source, tmp_path / "denied.tif", alpha_band=False, bands="1,2,3")
    assert (ids(tmp_path / "denied.tif") != 255).all()


def test_an_undeclared_last_band_is_alpha_with_the_option(tmp_path: Path) -> None:
    pixels = noise(70, 70, 4).astype(np.uint16)
    pixels[3, :30] = 0
    source = write(tmp_path / "scene.tif", pixels, photometric="MINISBLACK", alpha="NO")
    with pytest.raises(DataError, match="--bands"):
        make_map(source, tmp_path / "map.tif", max_value=255)
    make_map(source, tmp_path / "map.tif", max_value=255, alpha_band=True)
    np.testing.assert_array_equal(ids(tmp_path / "map.tif") == 255, pixels[3] == 0)


@pytest.mark.parametrize("how", ["opacity", "opacity and nodata", "opacity and mask", "mask", "nodata"])
def test_the_network_sees_what_the_reader_of_training_gives(tmp_path: Path, how: str) -> None:
    pixels = np.maximum(noise(64, 64, 4), 1)
    pixels[3] = 255
    pixels[3, :30] = 0
    pixels[:3, 40:45] = 0
    more = {"nodata": 0} if "nodata" in how else {}
    source = write(tmp_path / "scene.tif", pixels if "opacity" in how else pixels[:3], **more)
    if "mask" in how:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source, "r+") as dataset:
            dataset.write_mask(np.arange(64)[:, None] + np.zeros(64) < 50)
    image, hidden = read_image(source, bands=3), nodata_mask(source, bands=3)
    assert hidden is not None
    np.testing.assert_array_equal(shown(source, tmp_path / "map.tif")[0], image.transpose(2, 0, 1))
    np.testing.assert_array_equal(ids(tmp_path / "map.tif") == 255, hidden)


def test_at_another_resolution_what_is_transparent_has_no_weight(tmp_path: Path) -> None:
    pixels = np.full((4, 120, 120), 200, np.uint8)
    pixels[:3, :50] = 100
    pixels[3] = 255
    pixels[3, :50] = 0
    source = write(tmp_path / "scene.tif", pixels)
    seen = shown(source, tmp_path / "map.tif", resolution=1.2)[..., :30, :30]  # four pixels in one; the rest mirrors
    assert set(np.unique(seen)) == {0, 200}  # those half transparent are as bright as what was measured
    np.testing.assert_array_equal(seen[0, 0, :, 0], np.where(np.arange(30) < 12, 0, 200))

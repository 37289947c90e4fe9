"""Value ranges and scales of a raster's header."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from overfly.core.errors import DataError
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import MapResult, map_raster
from rasters import brightness_classes, ids, pointwise, write


def make_map(source: Path, out: Path, predictor: Any, **settings: Any) -> MapResult:
    return map_raster(predictor, str(source), out, MapSettings(window=64, **settings), network="none")


@pytest.mark.parametrize(("dtype", "step"), [("uint16", 1e-4), ("int16", 1e-3), ("uint8", 0.004)])
def test_integers_need_a_scale_for_a_network_of_fractions(tmp_path: Path, dtype: str, step: float) -> None:
    pixels = np.random.default_rng(0).choice(np.array([20, 60, 120], np.uint8), (90, 150))[None].repeat(3, 0)
    truth = brightness_classes(pixels[None].astype(np.float32))[0].argmax(0)
    source, out = write(tmp_path / "scene.tif", pixels.astype(dtype)), tmp_path / "map.tif"
    predictor = replace(pointwise(max_value=1.0), run=lambda images: brightness_classes(images * np.float32(1 / step)))
    with pytest.raises(DataError, match=rf"{dtype}.* --max-value (10000|255)"):
        make_map(source, out, predictor)
    with rasterio.open(source, "r+") as dataset:
        dataset.scales, dataset.offsets = (step,) * 3, (0, 0, 0.1)
    with pytest.raises(DataError, match="--max-value"):
        make_map(source, out, predictor)
    with rasterio.open(source, "r+") as dataset:
        dataset.offsets = (0, 0, 0)
    assert f"{step:g}" in make_map(source, out, predictor).notes[0]
    np.testing.assert_array_equal(ids(out), truth)
    assert not make_map(source, tmp_path / "scaled.tif", predictor, max_value=1 / step).notes
    np.testing.assert_array_equal(ids(tmp_path / "scaled.tif"), truth)

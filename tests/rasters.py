"""Small rasters, and predictors whose answers are known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.errors import NotGeoreferencedWarning

from overfly.core.classes import Classes
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor

CLASSES = Classes(names=("dark", "middle", "bright"), colors=((10, 20, 30), (120, 130, 140), (250, 240, 230)))
GEOREFERENCE: dict[str, Any] = {"crs": "EPSG:32640", "transform": Affine(0.3, 0, 300_000.15, 0, -0.3, 2_700_000.45)}


def metadata(window: int = 64, bands: int = 3, **changes: Any) -> ModelMetadata:
    """Facts of a network of three classes."""
    return ModelMetadata(
        architecture="none", classes=CLASSES, bands=bands, mean=(0.0,) * bands, std=(1.0,) * bands, window=window,
        **changes,
    )  # fmt: skip


def brightness_classes(images: Floats) -> Floats:
    """Probabilities (B, 3, H, W) that each pixel's own brightness alone decides: 0 to 85, to 170, to 255."""
    brightness = images.mean(1, keepdims=True) / 255
    scores = -60 * (brightness - np.array([1 / 6, 1 / 2, 5 / 6], np.float32).reshape(1, 3, 1, 1)) ** 2
    weights = np.exp(scores)
    result: Floats = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return result


def pointwise(window: int = 64, bands: int = 3, **changes: Any) -> Predictor:
    """A network that looks at single pixels."""
    return Predictor(metadata(window, bands, **changes), "torch", "cpu", brightness_classes)


def position_dependent(window: int = 64) -> Predictor:
    """A network that believes more in the last class the farther right and down a pixel lies in its window."""

    def run(images: Floats) -> Floats:
        count, _, high, wide = images.shape
        ramp = np.linspace(-0.5, 0.5, wide)[None] + np.linspace(-0.5, 0.5, high)[:, None]
        last: Floats = np.clip(0.5 + 0.4 * ramp, 0, 1).astype(np.float32) * np.ones((count, 1, 1), np.float32)
        last = np.float32(0.7) * last + np.float32(0.3 / 255) * images[:, 0]
        return np.stack([1 - last, np.zeros_like(last), last], axis=1)

    return Predictor(metadata(window), "torch", "cpu", run)


def noise(height: int, width: int, bands: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """An image (C, H, W) with equal bands."""
    image = np.random.default_rng(seed).integers(0, 256, (1, height, width), dtype=np.uint8)
    return np.repeat(image, bands, axis=0)


def write(path: Path, pixels: NDArray[Any], **changes: Any) -> Path:
    """A GeoTIFF (C, H, W), tiled and compressed."""
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": pixels.shape[0], "height": pixels.shape[1], "width": pixels.shape[2],
        "dtype": pixels.dtype, "tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate", **GEOREFERENCE,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # some are not, on purpose
        with rasterio.open(path, "w", **{**profile, **changes}) as dataset:
            dataset.write(pixels)
    return path


def ids(path: Path) -> NDArray[np.uint8]:
    """The only band of a map."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            assert dataset.count == 1
            result: NDArray[np.uint8] = dataset.read(1)
            return result

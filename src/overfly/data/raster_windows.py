"""Read windows of a raster, at its own or another resolution: the reader of training on rasters, and of maps."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfly.data.reading import Mask, check_declared, nodata_values, union

Range = tuple[int, int]
"""First index, and one past the last."""
CHUNK = 512
"""Side of the input pixels that are averaged at once, about."""


@dataclass(frozen=True)
class RasterBands:
    """Bands of a raster, and what tells their pixels without data.

    Attributes:
        source: path or address, as rasterio opens it.
        height, width: in pixels.
        bands: numbers of the bands to read, from 1, in the network's order.
        dtype: data type of the stored values.
        nodata: no-data value of each of these bands; None if there is none.
        masked: whether the file has a mask of valid pixels.
        alpha_band: number of the alpha band, which is 0 for no data; None if there is none.
    """

    source: str
    height: int
    width: int
    bands: tuple[int, ...]
    dtype: str
    nodata: tuple[float | None, ...]
    masked: bool
    alpha_band: int | None


def read_bands(
    dataset: Any, source: RasterBands, scale: tuple[float, float], rows: Range, columns: Range
) -> tuple[NDArray[Any], Mask | None]:
    """Read pixels (C, h, w) of the working grid, 0 for pixels without data, and the mask (h, w) of these pixels.

    ``scale`` is working pixels per input pixel (y, x). They are averaged where they shrink, else interpolated.
    """
    from rasterio.enums import Resampling
    from rasterio.windows import Window as Part

    if scale != (1.0, 1.0) and may_lack_data(source):
        return read_resampled(dataset, source, scale, rows, columns)
    (top, left), (y, x) = (rows[0], columns[0]), scale
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if scale == (1.0, 1.0):
        return read_part(dataset, source, window=Part(left, top, width, height))
    method = Resampling.average if max(scale) <= 1 else Resampling.bilinear
    part = Part(left / x, top / y, width / x, height / y)
    resampled: NDArray[Any] = dataset.read(
        list(source.bands), window=part, out_shape=(len(source.bands), height, width), resampling=method
    )
    return resampled, None


def read_part(dataset: Any, source: RasterBands, **part: Any) -> tuple[NDArray[Any], Mask | None]:
    """Read the pixels (C, h, w) of a part, 0 for pixels without data, and the mask (h, w) of these pixels.

    ``part`` is a window, or a shape that the raster is read at by nearest neighbor.
    """
    pixels: NDArray[Any] = dataset.read(list(source.bands), **part)
    masked, in_all = _masked(dataset, source, **part), None
    for index, (band, nodata) in enumerate(zip(pixels, source.nodata, strict=True)):
        nodata_mask = union(nodata_values(band, nodata), masked)
        if nodata_mask is not None:
            band[nodata_mask] = 0
            in_all = nodata_mask if index == 0 else None if in_all is None else in_all & nodata_mask
        check_declared(source.source, band)
    return pixels, in_all


def may_lack_data(source: RasterBands) -> bool:
    """Whether pixels of a raster may have no data."""
    by_value = any(value is not None for value in source.nodata) or np.dtype(source.dtype).kind != "u"
    return by_value or source.masked or source.alpha_band is not None


def _masked(dataset: Any, source: RasterBands, **part: Any) -> Mask | None:
    """Return which pixels of a part (h, w) the file's mask excludes or the alpha band hides; None without them."""
    masked = dataset.read_masks(source.bands[0], **part) == 0 if source.masked else None
    hidden = None if source.alpha_band is None else dataset.read(source.alpha_band, **part) == 0
    return union(masked, hidden)


def read_resampled(
    dataset: Any, source: RasterBands, scale: tuple[float, float], rows: Range, columns: Range
) -> tuple[NDArray[Any], Mask]:
    """Read a part of the working grid, averaging only valid pixels.

    Each pixel is the area-weighted mean of the valid pixels under it (along an enlarged axis: interpolated between its
    neighbors). GDAL would exclude the file's declared no data, but neither ``--nodata`` nor undeclared NaN. ``scale``
    is working pixels per input pixel (y, x). Returns pixels (C, h, w) of the raster's type, and the no-data mask (h,
    w). Pixels without data are 0.
    """
    shape = rows[1] - rows[0], columns[1] - columns[0]
    pixels, nodata_mask = np.empty((len(source.bands), *shape), source.dtype), np.empty(shape, np.bool_)
    steps = [max(1, int(CHUNK * factor)) for factor in scale]
    for top, left in itertools.product(range(*rows, steps[0]), range(*columns, steps[1])):
        part = (top, min(top + steps[0], rows[1])), (left, min(left + steps[1], columns[1]))
        place = tuple(
            slice(first - start[0], last - start[0]) for (first, last), start in zip(part, (rows, columns), strict=True)
        )
        pixels[:, *place], nodata_mask[place] = _average(dataset, source, scale, part)
    return pixels, nodata_mask


def _average(
    dataset: Any, source: RasterBands, scale: tuple[float, float], area: tuple[Range, Range]
) -> tuple[NDArray[Any], Mask]:
    """Compute the means of `read_resampled` of a chunk."""
    dtype = np.result_type(source.dtype, np.float32)
    axes = [_weights(*axis) for axis in zip(area, scale, (dataset.height, dataset.width), strict=True)]
    (vertical, y), (horizontal, x) = ((weights.astype(dtype), pixels) for weights, pixels in axes)
    masked, means, known = _masked(dataset, source, window=(y, x)), [], []
    for band, nodata in zip(dataset.read(list(source.bands), window=(y, x)), source.nodata, strict=True):
        nodata_mask = union(nodata_values(band, nodata), masked)
        values, valid = band.astype(dtype), np.ones(band.shape, dtype)
        if nodata_mask is not None:
            values[nodata_mask] = valid[nodata_mask] = 0
        check_declared(source.source, values)
        weights = vertical @ valid @ horizontal.T
        known.append(weights > 1e-5)
        sums = vertical @ values @ horizontal.T
        means.append(np.divide(sums, weights, out=np.zeros_like(sums), where=known[-1]))
    result = np.stack(means)
    if np.dtype(source.dtype).kind in "iu":
        result = np.clip(np.rint(result), np.iinfo(source.dtype).min, np.iinfo(source.dtype).max)
    return result.astype(source.dtype), ~np.any(known, axis=0)


def _weights(area: Range, scale: float, length: int) -> tuple[NDArray[Any], Range]:
    """Return the weights (working, input) of the input pixels that a range of working pixels needs, and their range.

    The weights of a working pixel sum to 1.
    """
    at = np.arange(*area)[:, None]
    if scale <= 1:
        low, high = min(math.floor(area[0] / scale), length - 1), min(math.ceil(area[1] / scale), length)
        pixels = np.arange(low, max(high, low + 1))
        overlap = np.minimum((at + 1) / scale, pixels + 1) - np.maximum(at / scale, pixels)
        weights = np.clip(overlap, 0, 1) * scale
    else:
        centers = np.clip((at + 0.5) / scale - 0.5, 0, length - 1)
        pixels = np.arange(int(centers.min()), min(int(centers.max()) + 2, length))
        weights = np.clip(1 - np.abs(centers - pixels), 0, 1)
    return weights, (int(pixels[0]), int(pixels[-1]) + 1)

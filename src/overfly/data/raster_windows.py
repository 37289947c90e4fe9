"""Read windows of a raster, at its own or another resolution: the reader of training on rasters, and of maps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfly.data.reading import Mask, check_declared, nodata_values, union

Range = tuple[int, int]
"""First index, and one past the last."""
CHUNK_ROWS, CHUNK_COLUMNS = 256, 512
"""Input pixels that are averaged at once."""
CHUNK_VALUES = 1 << 20
"""Working pixels that are averaged at once."""


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
        alpha_band: number of the alpha band, which is 0 where there is no data; None if there is none.
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
    neighbors). GDAL would exclude the file's declared no data, but neither ``--nodata`` nor undeclared NaN.
    ``scale`` is working pixels per input pixel (y, x).

    Returns:
        Pixels (C, h, w) of the raster's type, and the no-data mask (h, w). Pixels without data are 0.
    """
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    pixels = np.empty((len(source.bands), height, width), source.dtype)
    nodata_mask = np.empty((height, width), np.bool_)
    step = max(16, CHUNK_VALUES // (len(source.bands) * max(1, height)))
    for first in range(columns[0], columns[1], step):
        last = min(first + step, columns[1])
        part = np.s_[:, first - columns[0] : last - columns[0]]
        pixels[:, *part], nodata_mask[part] = _average(dataset, source, scale, (rows, (first, last)))
    return pixels, nodata_mask


def _average(
    dataset: Any, source: RasterBands, scale: tuple[float, float], area: tuple[Range, Range]
) -> tuple[NDArray[Any], Mask]:
    """Compute the means of `read_resampled` chunk by chunk, in constant memory."""
    from rasterio.windows import Window as Part

    dtype = np.result_type(source.dtype, np.float32)
    shape = (len(source.bands), *(last - first for first, last in area))
    sums, weights = np.zeros(shape, dtype), np.zeros(shape, dtype)
    lengths = (dataset.height, dataset.width)
    low, high = zip(*(_input_range(*axis) for axis in zip(area, scale, lengths, strict=True)), strict=True)
    for top, left in itertools.product(range(low[0], high[0], CHUNK_ROWS), range(low[1], high[1], CHUNK_COLUMNS)):
        ends = (min(top + CHUNK_ROWS, high[0]), min(left + CHUNK_COLUMNS, high[1]))
        window = Part(left, top, ends[1] - left, ends[0] - top)
        vertical, y = _weights(area[0], scale[0], (top, ends[0]), lengths[0])
        horizontal, x = _weights(area[1], scale[1], (left, ends[1]), lengths[1])
        vertical, horizontal = vertical.astype(dtype), horizontal.astype(dtype).T
        masked = _masked(dataset, source, window=window)
        for number, band in enumerate(dataset.read(list(source.bands), window=window)):
            nodata_mask = union(nodata_values(band, source.nodata[number]), masked)
            values, valid = band.astype(dtype), np.ones(band.shape, dtype)
            if nodata_mask is not None:
                values[nodata_mask] = valid[nodata_mask] = 0
            check_declared(source.source, values)
            sums[number, y, x] += vertical @ values @ horizontal
            weights[number, y, x] += vertical @ valid @ horizontal
    valid = weights > 1e-5
    means = np.divide(sums, weights, out=np.zeros_like(sums), where=valid)
    if np.dtype(source.dtype).kind in "iu":
        means = np.clip(np.rint(means), np.iinfo(source.dtype).min, np.iinfo(source.dtype).max)
    return means.astype(source.dtype), np.asarray(~valid.any(axis=0), dtype=np.bool_)


def _input_range(area: Range, scale: float, length: int) -> Range:
    """Return the range of input pixels from which a range of working pixels is computed."""
    if scale <= 1:
        low, high = math.floor(area[0] / scale), math.ceil(area[1] / scale)
    else:
        low, high = math.floor((area[0] + 0.5) / scale - 0.5), math.floor((area[1] - 0.5) / scale - 0.5) + 2
    low = min(max(low, 0), length - 1)
    return low, min(max(high, low + 1), length)


def _weights(area: Range, scale: float, part: Range, length: int) -> tuple[NDArray[Any], slice]:
    """Return the weights (working, input) of the input pixels of ``part``, and the slice of ``area`` that they fill.

    Over all input pixels the weights of a working pixel sum to 1.
    """
    begin = max(area[0], math.floor((part[0] - 1) * scale) - 1)
    end = min(area[1], math.ceil((part[1] + 1) * scale) + 1)
    at, pixels = np.arange(begin, max(end, begin))[:, None], np.arange(*part)[None]
    if scale <= 1:
        overlap = np.minimum((at + 1) / scale, pixels + 1) - np.maximum(at / scale, pixels)
        weights = np.clip(overlap, 0, 1) * scale
    else:
        weights = np.clip(1 - np.abs(np.clip((at + 0.5) / scale - 0.5, 0, length - 1) - pixels), 0, 1)
    return weights, slice(begin - area[0], begin - area[0] + len(at))

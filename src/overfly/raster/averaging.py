"""Pixels of a raster at another resolution, in which what was not measured has no weight."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfly.raster.alpha_band import Mask, covered, transparent
from overfly.raster.raster_source import RasterSource

ROWS, COLUMNS = 256, 512
"""Pixels of the raster that are read at once."""
AT_ONCE = 1 << 20
"""Values of the result that are summed up at once."""


def nodata_of_band(band: NDArray[Any], nodata: float | None) -> Mask | None:
    """Where values of a band (h, w) stand for nothing measured; None where none can."""
    floats = band.dtype.kind == "f"
    number = nodata is not None and not math.isnan(nodata)
    if not floats and not number:
        return None
    nodata_mask: Mask = ~np.isfinite(band) if floats else np.zeros(band.shape, np.bool_)
    if number:
        with np.errstate(over="ignore"):
            nodata_mask |= band == (band.dtype.type(nodata) if floats else nodata)
    return nodata_mask


def resampled(
    dataset: Any, scene: RasterSource, scale: tuple[float, float], rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[NDArray[Any], Mask]:
    """Read a part of the working grid from a raster in which pixels may not be measured.

    Each pixel is the mean of what was measured under it, by area (or between its neighbors along an axis that is
    enlarged). GDAL would leave out what the file declares, but neither ``--nodata`` nor NaN that it does not declare.

    Args:
        dataset: the raster, open.
        scene: what is read of it.
        scale: working pixels an input pixel (y, x).
        rows: first row of the working grid, and one behind the last.
        columns: likewise.

    Returns:
        Pixels (C, h, w) of the raster's type, and where nothing was measured in any band (h, w). There they are 0, or
        where all that is under them is transparent the mean of what is stored.
    """
    high, wide = rows[1] - rows[0], columns[1] - columns[0]
    pixels = np.empty((len(scene.bands), high, wide), scene.dtype)
    nodata_mask = np.empty((high, wide), np.bool_)
    step = max(16, AT_ONCE // (len(scene.bands) * max(1, high)))
    for first in range(columns[0], columns[1], step):
        last = min(first + step, columns[1])
        part = np.s_[:, first - columns[0] : last - columns[0]]
        pixels[:, *part], nodata_mask[part] = _part(dataset, scene, scale, (rows, (first, last)))
    return pixels, nodata_mask


def _part(
    dataset: Any, scene: RasterSource, scale: tuple[float, float], area: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[NDArray[Any], Mask]:
    """Sum up values and weights piece by piece, so that memory does not grow with the pixels under a part."""
    from rasterio.windows import Window

    exact = np.result_type(scene.dtype, np.float32)
    shape = (len(scene.bands), *(last - first for first, last in area))
    sums, weights = np.zeros(shape, exact), np.zeros(shape, exact)
    spare = None if scene.alpha_band is None else (np.zeros(shape, exact), np.zeros(shape, exact))
    lengths = (dataset.height, dataset.width)
    low, high = zip(*(_under(*its) for its in zip(area, scale, lengths, strict=True)), strict=True)
    for top, left in itertools.product(range(low[0], high[0], ROWS), range(low[1], high[1], COLUMNS)):
        ends = (min(top + ROWS, high[0]), min(left + COLUMNS, high[1]))
        window = Window(left, top, ends[1] - left, ends[0] - top)
        down, y = _weights(area[0], scale[0], (top, ends[0]), lengths[0])
        across, x = _weights(area[1], scale[1], (left, ends[1]), lengths[1])
        down, across = down.astype(exact), across.astype(exact).T
        hidden = covered(dataset, scene.bands[0], scene.masked, window)
        clear = transparent(dataset, scene.alpha_band, window)
        for number, band in enumerate(dataset.read(list(scene.bands), window=window)):
            nodata_mask = nodata_of_band(band, scene.nodata)
            nodata_mask = hidden if nodata_mask is None else nodata_mask if hidden is None else nodata_mask | hidden
            values = band.astype(exact)
            measured = np.ones(band.shape, exact)
            if nodata_mask is not None:
                values[nodata_mask] = 0
                measured[nodata_mask] = 0
            if clear is not None and spare is not None:
                spare[0][number, y, x] += down @ (values * clear) @ across
                spare[1][number, y, x] += down @ (measured * clear) @ across
                values[clear] = 0
                measured[clear] = 0
            sums[number, y, x] += down @ values @ across
            weights[number, y, x] += down @ measured @ across
    return _mean(sums, weights, np.dtype(scene.dtype), spare)


def _mean(
    sums: NDArray[Any], weights: NDArray[Any], dtype: np.dtype[Any], spare: tuple[NDArray[Any], NDArray[Any]] | None
) -> tuple[NDArray[Any], Mask]:
    """Means (C, h, w) of the raster's type, and where no weight is in any band (h, w).

    Where no weight is, they are those of the spare sums and weights, or 0.
    """
    measured = weights > 1e-5
    means = np.zeros_like(sums)
    for above, below in (spare, (sums, weights)) if spare is not None else ((sums, weights),):
        np.divide(above, below, out=means, where=below > 1e-5)
    if dtype.kind in "iu":
        means = np.clip(np.rint(means), np.iinfo(dtype).min, np.iinfo(dtype).max)
    hidden: Mask = np.asarray(~measured.any(axis=0), dtype=np.bool_)
    return means.astype(dtype), hidden


def _under(area: tuple[int, int], scale: float, length: int) -> tuple[int, int]:
    """First input pixel that a range of working pixels is made of, and one behind the last."""
    if scale <= 1:
        low, high = math.floor(area[0] / scale), math.ceil(area[1] / scale)
    else:
        low, high = math.floor((area[0] + 0.5) / scale - 0.5), math.floor((area[1] - 0.5) / scale - 0.5) + 2
    low = min(max(low, 0), length - 1)
    return low, min(max(high, low + 1), length)


def _weights(area: tuple[int, int], scale: float, part: tuple[int, int], length: int) -> tuple[NDArray[Any], slice]:
    """What each input pixel of ``part`` gives to each working pixel (working, input), and which those are in ``area``.

    Over all input pixels the weights of a working pixel sum up to 1.
    """
    begin = max(area[0], math.floor((part[0] - 1) * scale) - 1)
    end = min(area[1], math.ceil((part[1] + 1) * scale) + 1)
    at, pixels = np.arange(begin, max(end, begin))[:, None], np.arange(*part)[None]
    if scale <= 1:
        shared = np.minimum((at + 1) / scale, pixels + 1) - np.maximum(at / scale, pixels)
        found = np.clip(shared, 0, 1) * scale
    else:
        found = np.clip(1 - np.abs(np.clip((at + 0.5) / scale - 0.5, 0, length - 1) - pixels), 0, 1)
    return found, slice(begin - area[0], begin - area[0] + len(at))

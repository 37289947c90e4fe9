"""Read a raster window by window from top to bottom; each pixel is decoded once, and no data is excluded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from overfly.data.headers import open_raster
from overfly.data.reading import Mask, check_declared, nodata_values, union
from overfly.exporting.predictor import Floats
from overfly.ops.windows import Window, cut_window
from overfly.raster.raster_source import RasterSource
from overfly.raster.tiling import ColumnStrip, TilingPlan

Range = tuple[int, int]
"""First index, and one past the last."""
CHUNK_ROWS, CHUNK_COLUMNS = 256, 512
"""Input pixels that are averaged at once."""
CHUNK_VALUES = 1 << 20
"""Working pixels that are averaged at once."""


class WindowBatch(NamedTuple):
    """Windows of one column strip: images (B, C, size, size), float32, and their places on the working grid."""

    strip: int
    images: Floats
    windows: tuple[Window, ...]


class FinishedRows(NamedTuple):
    """The end of a row of windows.

    Attributes:
        strip: index of the column strip.
        row: index of the row of windows.
        first: first map row that can be written now.
        last: one past the last.
        nodata_mask: no-data mask of these rows in the strip's columns; None if all pixels are valid.
    """

    strip: int
    row: int
    first: int
    last: int
    nodata_mask: Mask | None


class _Rows(NamedTuple):
    """Rows of the working grid in memory: first row, pixels (C, rows, columns), no-data mask (rows, columns)."""

    top: int
    pixels: NDArray[Any]
    nodata_mask: Mask | None


class _Reader(NamedTuple):
    """An open rasterio dataset with its reading options, window plan and windows per batch."""

    dataset: Any
    source: RasterSource
    plan: TilingPlan
    batch: int


def read_windows(
    source: RasterSource, plan: TilingPlan, batch: int, start: int = 0
) -> Iterator[WindowBatch | FinishedRows]:
    """Read a raster window by window; every pixel is decoded once per column strip.

    Windows without any valid pixel are skipped. In the others, pixels without data are 0, as in training.

    Args:
        source: the raster.
        plan: the windows.
        batch: windows per batch, all in one row of windows.
        start: number of finished steps; their windows that overlap unfinished rows are read again.

    Yields:
        Batches, and `FinishedRows` after each unfinished row of windows.
    """
    with open_raster(source.source) as dataset:
        reader = _Reader(dataset, source, plan, batch)
        for index in range(len(plan.strips)):
            done = min(max(start - index * len(plan.tops), 0), len(plan.tops))
            if done < len(plan.tops):
                yield from _read_strip(reader, index, done)


def _read_strip(reader: _Reader, index: int, done: int) -> Iterator[WindowBatch | FinishedRows]:
    plan, strip = reader.plan, reader.plan.strips[index]
    rows: _Rows | None = None
    for row in range(plan.resume_row(done), len(plan.tops)):
        rows = _next_rows(reader, strip, row, rows)
        yield from _batches(reader, index, rows)
        if row < done:
            continue
        first, last = plan.finished_rows(row - 1), plan.finished_rows(row)
        if plan.resampled:
            nodata_mask = _input_nodata_mask(reader, (first, last), (strip.first, strip.last))
        elif rows.nodata_mask is None:
            nodata_mask = None
        else:
            columns = slice(strip.first - strip.left, strip.last - strip.left)
            nodata_mask = rows.nodata_mask[first - rows.top : last - rows.top, columns].copy()
        yield FinishedRows(index, row, first, last, nodata_mask)


def _next_rows(reader: _Reader, strip: ColumnStrip, row: int, rows: _Rows | None) -> _Rows:
    """Read the pixels of a row of windows that are not in memory."""
    plan = reader.plan
    top, columns = plan.tops[row], (strip.left, strip.right)
    bottom = min(top + plan.size, plan.working_size[0])
    if rows is None or rows.top + rows.pixels.shape[1] <= top:
        return _Rows(top, *_read(reader, (top, bottom), columns))
    pixels, nodata_mask = _read(reader, (rows.top + rows.pixels.shape[1], bottom), columns)
    above = slice(top - rows.top, None)
    masked = rows.nodata_mask is not None and nodata_mask is not None
    return _Rows(
        top,
        np.concatenate([rows.pixels[:, above], pixels], axis=1),
        np.concatenate([rows.nodata_mask[above], nodata_mask]) if masked else None,  # type: ignore[index]
    )


def _batches(reader: _Reader, index: int, rows: _Rows) -> Iterator[WindowBatch]:
    """Yield the windows of one row that have a valid pixel."""
    strip, size, width = reader.plan.strips[index], reader.plan.size, reader.plan.working_size[1]
    height, windows = rows.pixels.shape[1], []
    for left in strip.lefts:
        window = Window(rows.top, left, height, min(size, width - left))
        columns = slice(left - strip.left, left - strip.left + window.width)
        if rows.nodata_mask is None or not rows.nodata_mask[:, columns].all():
            windows.append(window)
    for begin in range(0, len(windows), reader.batch):
        chosen = tuple(windows[begin : begin + reader.batch])
        images = np.empty((len(chosen), len(rows.pixels), size, size), np.float32)
        for image, window in zip(images, chosen, strict=True):
            column = window.left - strip.left
            patch = torch.from_numpy(rows.pixels[..., column : column + window.width].astype(np.float32))
            image[:] = cut_window(patch, Window(0, 0, window.height, window.width), size).numpy()
        if reader.source.gain != 1:
            images *= np.float32(reader.source.gain)
        yield WindowBatch(index, images, chosen)


def _read(reader: _Reader, rows: Range, columns: Range) -> tuple[NDArray[Any], Mask | None]:
    """Read pixels (C, h, w) of the working grid, and their no-data mask (h, w)."""
    from rasterio.enums import Resampling
    from rasterio.windows import Window as Part

    dataset, source, plan, _ = reader
    if plan.resampled and _may_lack_data(source):
        return read_resampled(dataset, source, plan.scale, rows, columns)
    (top, left), (y, x) = (rows[0], columns[0]), plan.scale
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if plan.resampled:
        method = Resampling.average if max(plan.scale) <= 1 else Resampling.bilinear
        part = Part(left / x, top / y, width / x, height / y)
        resampled: NDArray[Any] = dataset.read(
            list(source.bands), window=part, out_shape=(len(source.bands), height, width), resampling=method
        )
        return resampled, None
    part = Part(left, top, width, height)
    return _read_part(dataset, source, part)


def _read_part(dataset: Any, source: RasterSource, part: Any) -> tuple[NDArray[Any], Mask | None]:
    """Read the pixels (C, h, w) of a window, 0 for pixels without data, and the mask (h, w) of these pixels."""
    pixels: NDArray[Any] = dataset.read(list(source.bands), window=part)
    masked, in_all = _masked(dataset, source, part), None
    for index, (band, nodata) in enumerate(zip(pixels, source.nodata, strict=True)):
        nodata_mask = union(nodata_values(band, nodata), masked)
        if nodata_mask is not None:
            band[nodata_mask] = 0
            in_all = nodata_mask if index == 0 else None if in_all is None else in_all & nodata_mask
        check_declared(source.source, band)
    return pixels, in_all


def _input_nodata_mask(reader: _Reader, rows: Range, columns: Range) -> Mask | None:
    """Return the no-data mask of rows of the input grid."""
    from rasterio.windows import Window as Part

    if not _may_lack_data(reader.source) or rows[0] >= rows[1]:
        return None
    part = Part(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0])
    return _read_part(reader.dataset, reader.source, part)[1]


def _may_lack_data(source: RasterSource) -> bool:
    by_value = any(value is not None for value in source.nodata) or np.dtype(source.dtype).kind != "u"
    return by_value or source.masked or source.alpha_band is not None


def _masked(dataset: Any, source: RasterSource, window: Any) -> Mask | None:
    """Return which pixels of a window (h, w) the file's mask excludes or the alpha band hides; None without them."""
    masked = dataset.read_masks(source.bands[0], window=window) == 0 if source.masked else None
    hidden = None if source.alpha_band is None else dataset.read(source.alpha_band, window=window) == 0
    return union(masked, hidden)


def read_resampled(
    dataset: Any, source: RasterSource, scale: tuple[float, float], rows: Range, columns: Range
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
    dataset: Any, source: RasterSource, scale: tuple[float, float], area: tuple[Range, Range]
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
        masked = _masked(dataset, source, window)
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

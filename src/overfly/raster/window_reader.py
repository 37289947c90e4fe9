"""Read a raster window by window from top to bottom; each pixel is decoded once, and no data is excluded."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from overfly.data.headers import open_raster
from overfly.data.raster_grid import may_lack_data, read_bands
from overfly.data.reading import Mask
from overfly.exporting.predictor import Floats
from overfly.ops.windows import Window, cut_window
from overfly.raster.raster_source import RasterSource
from overfly.raster.tiling import ColumnStrip, TilingPlan


class WindowBatch(NamedTuple):
    """Windows of one column strip: images (B, C, size, size), float32, and their places on the working grid."""

    strip: int
    images: Floats
    windows: tuple[Window, ...]


class FinishedRows(NamedTuple):
    """The end of a row of windows of a column strip, by index: map rows ``first`` to below ``last`` can be written.

    ``nodata_mask`` is that of these rows in the strip's columns; None if all pixels are valid.
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

    Windows without any valid pixel are skipped. In the others, pixels without data are 0, as in training. The ``batch``
    windows of a batch are all in one row of windows. After ``start`` finished steps, those of their windows that
    overlap unfinished rows are read again. Yields batches, and `FinishedRows` after each unfinished row of windows.
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
            with_mask = may_lack_data(reader.source) and first < last
            part = (reader.dataset, reader.source, (1.0, 1.0), (first, last), (strip.first, strip.last))
            nodata_mask = read_bands(*part)[1] if with_mask else None
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
    first = top if rows is None else max(top, rows.top + rows.pixels.shape[1])
    new = _Rows(top, *read_bands(reader.dataset, reader.source, plan.scale, (first, bottom), columns))
    if rows is None or first == top:
        return new
    above, nodata_mask = slice(top - rows.top, None), None
    if rows.nodata_mask is not None and new.nodata_mask is not None:
        nodata_mask = np.concatenate([rows.nodata_mask[above], new.nodata_mask])
    return _Rows(top, np.concatenate([rows.pixels[:, above], new.pixels], axis=1), nodata_mask)


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

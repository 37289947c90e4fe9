"""Plan and read the windows of a raster of any size, and blend overlapping windows into rows of probabilities.

Two grids: the *input grid* is the raster's own, and the map's. The *working grid* is what the network reads: the input
grid, or the input grid resampled by a scale. Windows lie on the working grid.

A *column strip* is a range of the map's columns whose probabilities fit into memory at a window's height; most rasters
are one strip. Each strip is processed by rows of windows from the top; after a row, all pixels above the next row's top
are complete. Each pixel of a strip is decoded once, and pixels without data are excluded.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from overfly.data.headers import open_raster
from overfly.data.raster_grid import read_bands
from overfly.data.reading import Mask, may_lack_data
from overfly.exporting.predictor import Floats
from overfly.ops.windows import Window, blend_weights, cut_window, window_starts
from overfly.raster.raster_source import RasterSource

MEMORY = 400 * 2**20
"""Bytes that the probabilities of one strip's row of windows may take."""


class ColumnStrip(NamedTuple):
    """A range of columns.

    Attributes:
        first, last: first map column of the strip, and one past the last.
        left, right: first column of the working grid that its windows cover, and one past the last.
        lefts: first working column of each of its windows.
    """

    first: int
    last: int
    left: int
    right: int
    lefts: tuple[int, ...]


@dataclass(frozen=True)
class TilingPlan:
    """Windows of a raster, in order.

    Attributes:
        height, width: of the input grid.
        scale: working pixels per input pixel (y, x).
        size: side of a window in working pixels.
        tops: first working row of each row of windows.
        strips: ranges of columns, from the left.
    """

    height: int
    width: int
    scale: tuple[float, float]
    size: int
    tops: tuple[int, ...]
    strips: tuple[ColumnStrip, ...]

    @property
    def resampled(self) -> bool:
        """Whether the working grid differs from the input grid."""
        return self.scale != (1.0, 1.0)

    @property
    def working_size(self) -> tuple[int, int]:
        """Rows and columns of the working grid."""
        return scaled(self.height, self.scale[0]), scaled(self.width, self.scale[1])

    @property
    def steps(self) -> int:
        """Rows of windows of all strips; a stopped job resumes after the last complete one."""
        return len(self.strips) * len(self.tops)

    @property
    def windows(self) -> int:
        """Windows of all strips."""
        return len(self.tops) * sum(len(strip.lefts) for strip in self.strips)

    def finished_rows(self, row: int) -> int:
        """Number of map rows that can be written after a row of windows; 0 before the first (-1)."""
        if row < 0:
            return 0
        complete = self.tops[row + 1] if row + 1 < len(self.tops) else self.working_size[0]
        if not self.resampled or complete == self.working_size[0]:
            return min(complete, self.height) if not self.resampled else self.height
        # the last map row y whose lower neighbor, floor((y + 0.5) s - 0.5) + 1, lies above `complete`
        finished = int((complete - 0.5) / self.scale[0] - 0.5) + 1
        while finished > 0 and neighbor(finished - 1, self.scale[0]) + 1 > complete - 1:
            finished -= 1
        return min(finished, self.height)

    def resume_row(self, row: int) -> int:
        """First row of windows to compute again to resume at ``row`` with the result of an uninterrupted run."""
        top = self.first_needed_row(self.finished_rows(row - 1))
        return next(index for index, first in enumerate(self.tops) if first + self.size > top)

    def first_needed_row(self, finished: int) -> int:
        """First working row that is needed after ``finished`` map rows are written."""
        return max(0, neighbor(finished, self.scale[0])) if self.resampled else finished


def scaled(length: int, scale: float) -> int:
    """Return the number of pixels of an axis of the working grid."""
    return max(1, round(length * scale))


def neighbor(position: int, scale: float) -> int:
    """Return the upper or left working pixel next to a map pixel's center; -1 before the first."""
    return math.floor((position + 0.5) * scale - 0.5)


def plan_windows(
    height: int, width: int, *, classes: int, size: int, overlap: float, scale: tuple[float, float] = (1.0, 1.0),
    memory: int = MEMORY,
) -> TilingPlan:  # fmt: skip
    """Plan the windows of a raster.

    ``size`` is the side of a window in working pixels, ``overlap`` the share of it that the next one covers again, 0 to
    below 1. ``scale``, working pixels per input pixel (y, x), is adjusted slightly so that both grids end with the
    raster. ``memory`` bounds the bytes of the probabilities of a strip's row of windows.
    """
    rows, columns = scaled(height, scale[0]), scaled(width, scale[1])
    scale = (rows / height, columns / width)
    tops = window_starts(rows, size, overlap)
    lefts = window_starts(columns, size, overlap)
    widest = max(memory // (4 * classes * size) - 2 * size, size)
    number = math.ceil(columns / widest)
    borders = [round(index * width / number) for index in range(number + 1)]
    strips = []
    for first, last in itertools.pairwise(borders):
        low, high = first, last
        if scale != (1.0, 1.0):
            low, high = max(0, neighbor(first, scale[1])), min(columns, neighbor(last - 1, scale[1]) + 2)
        within = tuple(left for left in lefts if left < high and left + size > low)
        strips.append(ColumnStrip(first, last, within[0], min(within[-1] + size, columns), within))
    return TilingPlan(height, width, scale, size, tuple(tops), tuple(strips))


@dataclass
class Blend:
    """Weighted sums of overlapping windows in the unfinished rows of a column strip.

    Attributes:
        top: working row of the first row of ``sums``.
        sums: weighted sums of the probabilities (K, rows, columns of the strip's windows); their sum over the classes
            is the sum of the weights.
        weights: weight of each pixel of a window (size, size).
    """

    plan: TilingPlan
    strip: ColumnStrip
    top: int
    sums: Floats
    weights: Floats
    scratch: Floats = field(repr=False)

    @classmethod
    def start(cls, plan: TilingPlan, strip: ColumnStrip, classes: int, finished: int = 0) -> Self:
        """Create an empty blend of a strip of which ``finished`` map rows are written."""
        size = plan.size
        rows = size + (2 if plan.resampled else 0)  # the last map row is interpolated from two more
        sums = np.zeros((classes, rows, strip.right - strip.left), np.float32)
        weights, scratch = blend_weights(size).numpy(), np.empty((size, size), np.float32)
        return cls(plan, strip, plan.first_needed_row(finished), sums, weights, scratch)

    def add(self, probabilities: Floats, window: Window) -> None:
        """Add the weighted probabilities (K, size, size) of one window; rows above ``top`` are skipped."""
        skip = max(0, self.top - window.top)
        rows = slice(window.top + skip - self.top, window.top + window.height - self.top)
        columns = slice(window.left - self.strip.left, window.left - self.strip.left + window.width)
        inside = (slice(skip, window.height), slice(0, window.width))
        part = self.scratch[inside]
        for total, scores in zip(self.sums, probabilities, strict=True):
            np.multiply(scores[inside], self.weights[inside], out=part)
            total[rows, columns] += part

    def read(self, first: int, last: int) -> Floats:
        """Return the weighted sums (K, rows, columns) of the map rows ``first`` to ``last``, in the strip's columns.

        On a resampled working grid they are weighted means, interpolated bilinearly (corners not aligned).
        """
        plan, strip = self.plan, self.strip
        if not plan.resampled:
            return self.sums[:, first - self.top : last - self.top, strip.first - strip.left : strip.last - strip.left]
        up, down, vertical = _neighbors(first, last, plan.scale[0], plan.working_size[0])
        left, right, horizontal = _neighbors(strip.first, strip.last, plan.scale[1], plan.working_size[1])
        begin, end = int(up.min()), int(down.max()) + 1
        sums = self.sums[:, begin - self.top : end - self.top]
        means = sums / np.maximum(sums.sum(0), np.finfo(np.float32).tiny)
        lines = means[:, up - begin] * (1 - vertical)[:, None] + means[:, down - begin] * vertical[:, None]
        left, right = left - strip.left, right - strip.left
        result: Floats = lines[..., left] * (1 - horizontal) + lines[..., right] * horizontal
        return result

    def drop(self, finished: int) -> None:
        """Discard the rows that are not needed after ``finished`` map rows are written."""
        count = self.plan.first_needed_row(finished) - self.top
        if count <= 0:
            return
        rest = self.sums.shape[1] - count
        if rest > 0:
            self.sums[:, :rest] = self.sums[:, count:]
        self.sums[:, max(rest, 0) :] = 0
        self.top += count


def _neighbors(first: int, last: int, scale: float, length: int) -> tuple[np.ndarray, np.ndarray, Floats]:
    """Return the two working pixels around each map pixel, and the weight of the second."""
    positions = (np.arange(first, last) + 0.5) * scale - 0.5
    before = np.array([neighbor(position, scale) for position in range(first, last)])
    share = (positions - before).astype(np.float32)
    return np.clip(before, 0, length - 1), np.clip(before + 1, 0, length - 1), share


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

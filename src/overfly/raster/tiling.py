"""Plan the windows of a raster of any size, and blend overlapping windows into rows of probabilities.

Two grids: the *input grid* is the raster's own, and the map's. The *working grid* is what the network reads: the input
grid, or the input grid resampled by a scale. Windows lie on the working grid.

A *column strip* is a range of the map's columns whose probabilities fit into memory at a window's height; most rasters
are one strip. Each strip is processed by rows of windows from the top; after a row, all pixels above the next row's top
are complete.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np

from overfly.exporting.predictor import Floats
from overfly.ops.windows import Window, blend_weights, window_starts

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

    def complete_rows(self, row: int) -> int:
        """Number of working rows that are complete after a row of windows."""
        return self.tops[row + 1] if row + 1 < len(self.tops) else self.working_size[0]

    def finished_rows(self, row: int) -> int:
        """Number of map rows that can be written after a row of windows; 0 before the first (-1)."""
        if row < 0:
            return 0
        complete = self.complete_rows(row)
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

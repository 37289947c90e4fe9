"""How a raster that fits no memory is gone through: slabs, rows of windows, and which pixels each row completes.

Two grids are at work. The *input grid* is the raster's own, and the output's. The *working grid* is what the network
sees: the same where nothing is resampled, else the input grid times a scale. Windows lie on the working grid.

A *slab* is a range of columns of the output whose probabilities fit the memory at a window's height; most rasters are
one slab. Each slab is gone through by rows of windows, from above; once a row is done, all pixels above the next row's
top are complete.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from overfly.ops.windows import starts

MEMORY = 400 * 2**20
"""Bytes that the probabilities of one slab's row of windows may take."""


class ColumnStrip(NamedTuple):
    """A range of columns.

    Attributes:
        first: first column of the output that it makes.
        last: one behind the last.
        left: first column of the working grid that its windows cover.
        right: one behind the last.
        lefts: first working column of each of its windows.
    """

    first: int
    last: int
    left: int
    right: int
    lefts: tuple[int, ...]


@dataclass(frozen=True)
class TilingPlan:
    """Windows of a raster, and how they follow each other.

    Attributes:
        height: rows of the input grid.
        width: columns of the input grid.
        scale: working pixels an input pixel, along rows and columns (y, x).
        size: side of a window in working pixels.
        tops: first working row of each row of windows.
        slabs: ranges of columns, from the left.
    """

    height: int
    width: int
    scale: tuple[float, float]
    size: int
    tops: tuple[int, ...]
    slabs: tuple[ColumnStrip, ...]

    @property
    def resampled(self) -> bool:
        """Whether the working grid is another than the input's."""
        return self.scale != (1.0, 1.0)

    @property
    def working(self) -> tuple[int, int]:
        """Rows and columns of the working grid."""
        return scaled(self.height, self.scale[0]), scaled(self.width, self.scale[1])

    @property
    def steps(self) -> int:
        """Rows of windows of all slabs; each is a step that a job can go on from."""
        return len(self.slabs) * len(self.tops)

    @property
    def windows(self) -> int:
        """Windows of all slabs."""
        return len(self.tops) * sum(len(slab.lefts) for slab in self.slabs)

    def complete(self, row: int) -> int:
        """Working rows that are complete once a row of windows is done."""
        return self.tops[row + 1] if row + 1 < len(self.tops) else self.working[0]

    def made(self, row: int) -> int:
        """Rows of the output that can be written once a row of windows is done; 0 before the first (-1)."""
        if row < 0:
            return 0
        whole = self.complete(row)
        if not self.resampled or whole == self.working[0]:
            return min(whole, self.height) if not self.resampled else self.height
        # the last output row y whose lower neighbor, floor((y + 0.5) s - 0.5) + 1, lies above `whole`
        made = int((whole - 0.5) / self.scale[0] - 0.5) + 1
        while made > 0 and needed(made - 1, self.scale[0]) + 1 > whole - 1:
            made -= 1
        return min(made, self.height)

    def first_for(self, row: int) -> int:
        """First row of windows that must be computed (again), so that what follows ``row`` - 1 comes out as it was."""
        keep = self.above(self.made(row - 1))
        return next(index for index, top in enumerate(self.tops) if top + self.size > keep)

    def above(self, made: int) -> int:
        """First working row that is still asked for when ``made`` rows of the output are written."""
        return max(0, needed(made, self.scale[0])) if self.resampled else made


def scaled(length: int, scale: float) -> int:
    """Pixels of an axis of the working grid."""
    return max(1, round(length * scale))


def needed(position: int, scale: float) -> int:
    """Upper or left one of the two working pixels that an output pixel lies between; -1 before the first."""
    return math.floor((position + 0.5) * scale - 0.5)


def plan_windows(
    height: int,
    width: int,
    *,
    classes: int,
    size: int,
    overlap: float,
    scale: tuple[float, float] = (1.0, 1.0),
    memory: int = MEMORY,
) -> TilingPlan:
    """Plan the windows of a raster.

    Args:
        height: rows of the raster.
        width: columns of the raster.
        classes: K.
        size: side of a window in working pixels.
        overlap: share of a window that the next one covers again, 0 to below 1.
        scale: working pixels an input pixel (y, x); it is changed so little that both grids end where the raster ends.
        memory: bytes that the probabilities of a slab's row of windows may take.
    """
    rows, columns = scaled(height, scale[0]), scaled(width, scale[1])
    scale = (rows / height, columns / width)
    tops = starts(rows, size, overlap)
    lefts = starts(columns, size, overlap)
    widest = max(memory // (4 * classes * size) - 2 * size, size)
    number = math.ceil(columns / widest)
    borders = [round(index * width / number) for index in range(number + 1)]
    slabs = []
    for first, last in itertools.pairwise(borders):
        low, high = first, last
        if scale != (1.0, 1.0):
            low, high = max(0, needed(first, scale[1])), min(columns, needed(last - 1, scale[1]) + 2)
        its = tuple(left for left in lefts if left < high and left + size > low)
        slabs.append(ColumnStrip(first, last, its[0], min(its[-1] + size, columns), its))
    return TilingPlan(height, width, scale, size, tuple(tops), tuple(slabs))

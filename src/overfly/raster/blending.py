"""Overlapping windows become rows of probabilities, with no more of a raster in memory than a window is high."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from overfly.exporting.predictor import Floats
from overfly.ops.windows import Window, blend_weights
from overfly.raster.tiling import ColumnStrip, TilingPlan, needed


@dataclass
class Blend:
    """Rows of one slab that windows still add to.

    Attributes:
        plan: the windows.
        slab: the columns.
        top: working row that the first row held is.
        sums: weighted sums of the probabilities (K, rows, columns of the slab's windows); a row's sum over the classes
            is the sum of the weights.
    """

    plan: TilingPlan
    slab: ColumnStrip
    top: int
    sums: Floats
    weights: Floats
    scratch: Floats = field(repr=False)


def blend(plan: TilingPlan, slab: ColumnStrip, classes: int, made: int = 0) -> Blend:
    """A blend to which nothing was added yet.

    Args:
        plan: the windows.
        slab: the columns.
        classes: K.
        made: rows of the output that are written already.
    """
    size = plan.size
    rows = size + (2 if plan.resampled else 0)  # what lies between two output rows of the last row is kept
    return Blend(
        plan,
        slab,
        plan.above(made),
        np.zeros((classes, rows, slab.right - slab.left), np.float32),
        blend_weights(size).numpy(),
        np.empty((size, size), np.float32),
    )


def add(held: Blend, probabilities: Floats, window: Window) -> None:
    """Add one window's probabilities (K, size, size); rows above those held are left out."""
    skip = max(0, held.top - window.top)
    rows = slice(window.top + skip - held.top, window.top + window.height - held.top)
    columns = slice(window.left - held.slab.left, window.left - held.slab.left + window.width)
    inside = (slice(skip, window.height), slice(0, window.width))
    part = held.scratch[inside]
    for total, scores in zip(held.sums, probabilities, strict=True):
        np.multiply(scores[inside], held.weights[inside], out=part)
        total[rows, columns] += part


def take(held: Blend, first: int, last: int) -> Floats:
    """Weighted sums (K, rows, columns) of complete rows of the output, in the slab's own columns.

    Where the working grid is another than the input's, they are weighted means, interpolated (bilinear, as with corners
    not aligned).

    Args:
        held: a blend whose windows of these rows are all added.
        first: first row of the output.
        last: one behind the last.
    """
    plan, slab = held.plan, held.slab
    if not plan.resampled:
        return held.sums[:, first - held.top : last - held.top, slab.first - slab.left : slab.last - slab.left]
    up, down, vertical = _between(first, last, plan.scale[0], plan.working[0])
    left, right, sideways = _between(slab.first, slab.last, plan.scale[1], plan.working[1])
    begin, end = int(up.min()), int(down.max()) + 1
    sums = held.sums[:, begin - held.top : end - held.top]
    means = sums / np.maximum(sums.sum(0), np.finfo(np.float32).tiny)
    lines = means[:, up - begin] * (1 - vertical)[:, None] + means[:, down - begin] * vertical[:, None]
    left, right = left - slab.left, right - slab.left
    found: Floats = lines[..., left] * (1 - sideways) + lines[..., right] * sideways
    return found


def drop(held: Blend, made: int) -> None:
    """Forget the rows that are not asked for once ``made`` rows of the output are written."""
    count = held.plan.above(made) - held.top
    if count <= 0:
        return
    kept = held.sums.shape[1] - count
    if kept > 0:
        held.sums[:, :kept] = held.sums[:, count:]
    held.sums[:, max(kept, 0) :] = 0
    held.top += count


def _between(first: int, last: int, scale: float, length: int) -> tuple[np.ndarray, np.ndarray, Floats]:
    """The two working pixels that each output pixel lies between, and how near it is to the second."""
    positions = (np.arange(first, last) + 0.5) * scale - 0.5
    before = np.array([needed(position, scale) for position in range(first, last)])
    share = (positions - before).astype(np.float32)
    return np.clip(before, 0, length - 1), np.clip(before + 1, 0, length - 1), share

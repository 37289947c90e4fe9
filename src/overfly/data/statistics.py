"""Mean, standard deviation and range of each band of a domain's images, in one pass and constant memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from overfly.core.errors import DataError, RecipeError
from overfly.core.records import Array, Item
from overfly.core.spec import Count, NonNegative, Spec
from overfly.data import reading
from overfly.data.domain import Domain, Split, sample_evenly

Float64 = NDArray[np.float64]


class Statistics(Spec):
    """Statistics of each band over all pixels with data, in the images' own range."""

    mean: tuple[float, ...]
    """Mean of each band."""
    std: tuple[NonNegative, ...]
    """Standard deviation of each band, of the population."""
    minimum: tuple[float, ...]
    """Smallest value of each band."""
    maximum: tuple[float, ...]
    """Largest value of each band."""
    pixels: Count
    """Pixels counted; those declared as no data are left out."""
    images: Count
    """Images read."""

    def __str__(self) -> str:
        """Lines to put into a recipe, under its domain."""
        rows = {"mean": self.mean, "std": self.std}
        lines = [f"{name}: [{', '.join(f'{value:.6g}' for value in values)}]" for name, values in rows.items()]
        lowest, highest = (", ".join(f"{value:g}" for value in values) for values in (self.minimum, self.maximum))
        return "\n".join([*lines, f"# {self.images} images; smallest {lowest}; largest {highest}"])

    def __rich__(self) -> str:
        """The same in a terminal."""
        return str(self)


class _Sums(NamedTuple):
    """Count, mean and sum of squared deviations; merges without loss (Chan, Golub, LeVeque, 1979)."""

    number: int
    mean: Float64
    squares: Float64
    low: Float64
    high: Float64

    def merged(self, other: _Sums) -> _Sums:
        if not self.number or not other.number:
            return self if self.number else other
        number = self.number + other.number
        apart = other.mean - self.mean
        return _Sums(
            number,
            self.mean + apart * (other.number / number),
            self.squares + other.squares + apart**2 * (self.number * other.number / number),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


def statistics(domain: Domain, split: Split, limit: int | None = None) -> Statistics:
    """Figures of the images of a split; labels are not opened.

    Args:
        domain: whose images.
        split: which of its splits.
        limit: number of images, 1 or more, spread evenly over the split; None takes all.

    Raises:
        RecipeError: the limit is below 1.
        DataError: an image cannot be read, or no pixel has data.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit must be at least 1, got {limit}")
    items = sample_evenly(domain.items(split), limit)
    total = _merged(_measured(domain, item) for item in items)
    if total is None or not total.number:
        raise DataError(f"no pixel of the split {split} has data; check the no-data value of its images")
    return Statistics(
        mean=tuple(total.mean.tolist()),
        std=tuple(np.sqrt(total.squares / total.number).tolist()),
        minimum=tuple(total.low.tolist()),
        maximum=tuple(total.high.tolist()),
        pixels=total.number,
        images=len(items),
    )


def _merged(parts: Iterable[_Sums]) -> _Sums | None:
    total: _Sums | None = None
    for part in parts:
        total = part if total is None else total.merged(part)
    return total


def _measured(domain: Domain, item: Item) -> _Sums:
    image = domain.read_image(item)
    nodata_mask = reading.nodata_mask(item.image, bands=domain.bands)
    pixels = image.reshape(-1, image.shape[-1]) if nodata_mask is None else image[~nodata_mask]
    if not len(pixels):
        nothing = np.zeros(image.shape[-1])
        return _Sums(0, nothing, nothing, nothing, nothing)
    columns = [_column(pixels[:, band]) for band in range(pixels.shape[1])]
    mean, squares = (np.array(figures) for figures in zip(*columns, strict=True))
    low, high = pixels.min(axis=0).astype(np.float64), pixels.max(axis=0).astype(np.float64)
    return _Sums(len(pixels), mean, squares, low, high)


def _column(values: Array) -> tuple[float, float]:
    """Mean and sum of squared deviations of the values (N,) of a band; integers are counted, which is faster."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values)
        levels = np.arange(len(counts), dtype=np.float64)
        mean = float(counts @ levels) / len(values)
        return mean, float(counts @ np.square(levels - mean))
    exact = values.astype(np.float64)
    mean = float(exact.mean())
    return mean, float(np.square(exact - mean).sum())

"""Read windows of rasters, at their own or another resolution; divide rasters into blocks, and the blocks into splits.

The one reader of training on rasters, and of maps.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.windows import Window as Part

from overfly.core.errors import DataError
from overfly.core.records import Array
from overfly.data import reading
from overfly.data.domain import SPLITS, Split
from overfly.data.headers import ground_distance, keep_raster, open_raster, read_raster_header
from overfly.data.reading import Mask, RasterBands, may_lack_data, raster_bands, read_part
from overfly.ops.windows import Window

if TYPE_CHECKING:
    from overfly.data.raster_labels import VectorFile

Range = tuple[int, int]
"""First index, and one past the last."""
CHUNK = 512
"""Side of the input pixels that are averaged at once, about."""
Bounds = tuple[float, float, float, float]
Assignment = NDArray[np.int8]
"""Number of the split of each block (rows, columns), in the order of `SPLITS`; -1: none."""
CELLS = 8
"""A block is searched for data in this many rows and columns of cells."""


def read_bands(
    dataset: Any, source: RasterBands, scale: tuple[float, float], rows: Range, columns: Range
) -> tuple[NDArray[Any], Mask | None]:
    """Read pixels (C, h, w) of the working grid, 0 for pixels without data, and the mask (h, w) of these pixels.

    ``scale`` is working pixels per input pixel (y, x). They are averaged where they shrink, else interpolated.
    """
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
    masked, means, known = reading.masked_pixels(dataset, source, window=(y, x)), [], []
    for band, nodata in zip(dataset.read(list(source.bands), window=(y, x)), source.nodata, strict=True):
        nodata_mask = reading.union(reading.nodata_values(band, nodata), masked)
        values, valid = band.astype(dtype), np.ones(band.shape, dtype)
        if nodata_mask is not None:
            values[nodata_mask] = valid[nodata_mask] = 0
        reading.check_declared(source.source, values)
        weights = vertical @ valid @ horizontal.T
        known.append(weights > 1e-5)
        sums = vertical @ values @ horizontal.T
        means.append(np.divide(sums, weights, out=np.zeros_like(sums), where=known[-1]))
    result = np.stack(means)
    if np.dtype(source.dtype).kind in "iu":
        result = np.clip(np.rint(result), np.iinfo(source.dtype).min, np.iinfo(source.dtype).max)
    return result.astype(source.dtype), ~np.any(known, axis=0)


def _weights(area: Range, scale: float, length: int) -> tuple[NDArray[Any], Range]:
    """Return weights (working, input), of sum 1, of the input pixels of a range of working pixels, and their range."""
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


@dataclass(frozen=True)
class Grid:
    """The pixels of a raster, resampled to the resolution of its domain, and their division into blocks.

    Attributes:
        source: file or address.
        stamp: size and time of the file.
        height, width: in pixels after resampling.
        scale: pixels per stored pixel (y, x).
        gsd: length of a pixel on the ground in meters; None if unknown.
        crs: coordinate reference system as WKT; empty if unknown.
        transform: from pixel after resampling to coordinate, in GDAL's order; None if unknown.
        rows, columns: first pixel of each row and column of blocks, and one past the last.
    """

    source: str
    stamp: tuple[int, int]
    height: int
    width: int
    scale: tuple[float, float]
    gsd: float | None
    crs: str
    transform: tuple[float, ...] | None
    rows: tuple[int, ...] = field(repr=False)
    columns: tuple[int, ...] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return len(self.rows) - 1, len(self.columns) - 1

    def geotransform(self, window: Window | None = None) -> tuple[float, ...]:
        """Transform of a window, or of all, in GDAL's order; coordinates are in pixels if there is none."""
        x, xx, xy, y, yx, yy = self.transform or (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        top, left = window[:2] if window else (0, 0)
        return x + left * xx + top * xy, xx, xy, y + left * yx + top * yy, yx, yy

    def bounds(self, window: Window | None = None) -> Bounds:
        """Smallest x, smallest y, largest x and largest y of a window, or of all."""
        x, xx, xy, y, yx, yy = self.geotransform(window)
        height, width = window[2:] if window else (self.height, self.width)
        corners = np.array([(0, 0), (width, 0), (0, height), (width, height)])
        xs, ys = x + corners @ (xx, xy), y + corners @ (yx, yy)
        return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())

    def block(self, row: int, column: int) -> Window:
        """The pixels of a block."""
        top, left = self.rows[row], self.columns[column]
        return Window(top, left, self.rows[row + 1] - top, self.columns[column + 1] - left)

    def read(
        self, window: Window | None, bands: int, nodata: float | None, shape: tuple[int, int] | None = None
    ) -> tuple[Array, Mask | None]:
        """Read the image (H, W, C) of a window, and its pixels without data (H, W), 0 in the image.

        Without a window, the whole raster is read at ``shape`` by nearest neighbor, from overviews where there are any.
        """
        source = raster_bands(self.source, bands, nodata)
        with keep_raster(self.source) as dataset:
            if window is None:
                pixels, missing = read_part(dataset, source, out_shape=shape)
            else:
                pixels, missing = read_bands(dataset, source, self.scale, *window.ranges)
        return np.ascontiguousarray(np.moveaxis(pixels, 0, -1), read_raster_header(self.source).dtype), missing

    def usable_blocks(self, bands: int, nodata: float | None, area: "VectorFile | None") -> Mask:
        """Blocks (rows, columns) that have data in the area."""
        rows, columns = self.shape
        usable = np.ones((rows * CELLS, columns * CELLS), np.bool_)
        if may_lack_data(raster_bands(self.source, bands, nodata)):
            missing = self.read(None, bands, nodata, usable.shape)[1]
            usable &= True if missing is None else ~missing
        if area is not None:
            usable &= area.mask(self, Window(0, 0, self.height, self.width), usable.shape)
        return np.asarray(usable.reshape(rows, CELLS, columns, CELLS).any(axis=(1, 3)))


@lru_cache(maxsize=4096)
def open_grid(source: str, stamp: tuple[int, int], block: int, resolution: float | None) -> Grid:
    """Read the header of a raster of this `file_stamp`, and divide it into equal blocks of about ``block`` pixels.

    It is resampled on reading to pixels of ``resolution`` meters. Raises `DataError` if the file cannot be read, or the
    resolution is given and its own is unknown.
    """
    header = read_raster_header(source)
    with open_raster(source) as dataset:
        ground = ground_distance(dataset)
    height, width = header.height, header.width
    if resolution is not None:
        if ground is None:
            raise DataError(f"{source} has no coordinate reference system; assign one, or remove resolution")
        height, width = (max(1, round(n * m / resolution)) for n, m in zip((height, width), ground, strict=True))
    y, x = height / header.height, width / header.width
    factors = (1.0, x, y, 1.0, x, y)
    transform = header.transform and tuple(n / factor for n, factor in zip(header.transform, factors, strict=True))
    gsd = resolution or (None if ground is None else float(np.sqrt(ground[0] * ground[1])))
    rows, columns = (
        tuple(np.linspace(0, n, max(1, round(n / block)) + 1).round().astype(int).tolist()) for n in (height, width)
    )
    return Grid(source, stamp, height, width, (y, x), gsd, header.crs, transform, rows, columns)


def assign_splits(usable: Sequence[Mask], shares: Mapping[Split, float], seed: int) -> list[Assignment]:
    """Assign the usable blocks of each raster to splits at random; raise `DataError` if a split gets none."""
    counts = [int(blocks.sum()) for blocks in usable]
    ends = np.round(np.cumsum([*shares.values()]) * sum(counts)).astype(int)
    sizes = np.diff(ends, prepend=0)
    if not sizes.all():
        raise DataError(f"{sum(counts)} block{'s' * (sum(counts) != 1)} cannot be divided into {len(shares)} splits")
    numbers = np.full(sum(counts), -1, np.int8)
    order = np.random.default_rng(seed).permutation(sum(counts))[: ends[-1]]
    numbers[order] = np.repeat([SPLITS.index(name) for name in shares], sizes)
    result = [np.full(blocks.shape, -1, np.int8) for blocks in usable]
    for assigned, blocks, part in zip(result, usable, np.split(numbers, np.cumsum(counts)[:-1]), strict=True):
        assigned[blocks] = part
    return result


def split_pixels(
    grid: Grid, assigned: Assignment, number: int, places: tuple[NDArray[np.int64], NDArray[np.int64]], gap: int
) -> Mask:
    """Which pixels of some rows and columns, ``places``, belong to a split (rows, columns).

    They lie in its blocks, farther than ``gap`` pixels from blocks of later splits: training keeps away from
    validation, and both from test.
    """
    axes = []
    for edges, pixels in zip((grid.rows, grid.columns), places, strict=True):
        near = [np.searchsorted(edges, pixels + shift, "right") - 1 for shift in (0, -gap, gap)]
        blocks = np.stack(near).clip(0, len(edges) - 2)
        starts = np.r_[0, np.flatnonzero((blocks[:, 1:] != blocks[:, :-1]).any(axis=0)) + 1]
        axes.append((blocks[:, starts], np.diff(starts, append=len(pixels))))
    (vertical, heights), (horizontal, widths) = axes
    own = assigned[np.ix_(vertical[0], horizontal[0])] == number
    for first in vertical:
        for second in horizontal:
            own &= assigned[np.ix_(first, second)] <= number
    result: Mask = own.repeat(heights, axis=0).repeat(widths, axis=1)
    return result

"""Open a raster and decide how it is read: bands, value range, no data, alpha band."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from overfly.core.errors import DataError
from overfly.data.check import MAX_FRACTION
from overfly.data.headers import band_nodata, ground_distance, has_mask, is_gray, open_raster, read_palette
from overfly.data.reading import RasterBands
from overfly.exporting.predictor import ModelMetadata

SAME_SCALE = 0.02
"""Relative difference of ground resolution below which rasters are not resampled."""
ALPHA_SAMPLES, ALPHA_SIDE = 5, 64
"""A marked alpha band is sampled on a grid of 5 × 5 squares of this side, in pixels."""
ALPHA_MODE_SHARE = 0.5
"""Smallest share of the mode among the values above 0 of an alpha band."""


@dataclass(frozen=True)
class RasterSource(RasterBands):
    """A raster and its reading options.

    ``gain`` is the factor from stored values to those of the training images, ``gsd`` the ground sample distance (y, x)
    in meters, None if unknown; a raster may be ``georeferenced`` without one.
    """

    gain: float
    gsd: tuple[float, float] | None
    georeferenced: bool


def inspect_raster(
    source: str, metadata: ModelMetadata, *, bands: str | None, nodata: float | None, max_value: float | None,
    alpha_band: bool | None = None,
) -> RasterSource:  # fmt: skip
    """Read the header of a raster, a path or an address, and check that it fits a network.

    ``bands`` are numbers separated by commas (None: all, if their number equals the network's), ``max_value`` is the
    value of the brightest pixel (None: the network's). The last band is an alpha band with ``alpha_band`` True; with
    False no band is; None: as declared by the file, as is ``nodata``. Raises `DataError`: the raster does not exist, is
    damaged, or does not fit the network.
    """
    with open_raster(source) as dataset:
        if not dataset.count or not dataset.height * dataset.width:
            raise DataError(f"{source} has no raster bands of its own; give one of its subdatasets, or export it again")
        alpha = _find_alpha_band(source, dataset, alpha_band)
        chosen = _bands(source, dataset, metadata, bands, alpha)
        dtype = str(dataset.dtypes[chosen[0] - 1])
        colors = [dataset.colorinterp[band - 1].name for band in chosen]
        if "palette" in colors and not is_gray(read_palette(dataset)):
            raise DataError(f"{source} stores palette indices instead of intensities; save it as plain bands first")
        declared = {(float(dataset.scales[band - 1]), float(dataset.offsets[band - 1])) for band in chosen}
        scale, offset = min(declared)
        scaled = len(declared) == 1 and 0 < scale < 1 and not offset
        gain = input_gain(source, dtype, metadata, max_value, scale=scale if scaled else None)
        _check_complete(source, dataset)
        return RasterSource(
            source, dataset.height, dataset.width, chosen, dtype,
            nodata=tuple(band_nodata(dataset)[band - 1] if nodata is None else nodata for band in chosen),
            masked=has_mask(dataset),
            alpha_band=_unread_alpha_band(source, dataset, chosen, alpha, alpha_band),
            gain=gain, gsd=ground_distance(dataset),
            georeferenced=bool(dataset.crs or dataset.gcps[0] or not dataset.transform.is_identity),
        )  # fmt: skip


def resampling_factors(source: RasterSource, resolution: float | None) -> tuple[float, float]:
    """Return the resampling factors (y, x) to pixels of ``resolution`` meters; (1, 1) if None."""
    if resolution is None:
        return 1.0, 1.0
    if source.gsd is None:
        raise DataError(
            f"{source.source} has no coordinate reference system, so its ground sample distance is unknown; leave out "
            "--resolution and --match-gsd, or assign one"
        )
    y, x = (length / resolution for length in source.gsd)
    return (1.0, 1.0) if abs(y - 1) < SAME_SCALE and abs(x - 1) < SAME_SCALE else (y, x)


def input_gain(
    source: object, dtype: str, metadata: ModelMetadata, max_value: float | None, *, scale: float | None = None
) -> float:
    """Return the factor from a raster's values to the value range of the network's training images.

    ``dtype`` is that of the stored values, ``max_value`` the value of the brightest pixel (None: the network's), and
    ``scale`` the file's own from integers to fractions, if it declares one. ``source`` is the name of the raster in
    messages. Raises `DataError`: the values are complex, or have another range and neither ``max_value`` nor ``scale``
    is given.
    """
    if "complex" in dtype:
        raise DataError(f"{source} stores complex numbers; save it as plain bands first")
    if max_value is not None:
        return metadata.max_value / max_value
    integers, fractions = np.dtype(dtype).kind in "iu", metadata.max_value < MAX_FRACTION
    if integers and fractions and scale is not None:
        return scale
    if (dtype == "uint8") != (metadata.max_value == 255) or (integers and fractions):
        example = "255" if dtype == "uint8" else "10000" if integers else "1"
        raise DataError(
            f"{source} holds {dtype}, and the network was trained on values up to {metadata.max_value:g}; give the "
            f"value of its brightest pixel, such as --max-value {example}, and it is scaled"
        )
    return 1.0


def _find_alpha_band(source: str, dataset: Any, option: bool | None) -> int | None:
    """Number of the alpha band, from 1: the last if ``option`` is True, the marked one if None; None without one."""
    if option is False:
        return None
    if option:
        if dataset.count == 1:
            raise DataError(f"{source} has one band, which cannot be an alpha band; leave out --alpha-band")
        return int(dataset.count)
    marked = (number for number, color in enumerate(dataset.colorinterp, 1) if color.name == "alpha")
    return next(marked, None) if dataset.count > 1 else None


def _unread_alpha_band(
    source: str, dataset: Any, chosen: tuple[int, ...], alpha: int | None, option: bool | None
) -> int | None:
    """Return the alpha band unless the network reads it as an input band; check that a marked band is an alpha band."""
    if alpha is None or (alpha in chosen and not option):
        return None
    if alpha in chosen:
        raise DataError(
            f"--alpha-band makes band {alpha} of {source} an alpha band, but it is one of the {len(chosen)} bands that "
            "the network reads; leave out --alpha-band, or give other bands with --bands"
        )
    if not option and _varies(dataset, alpha):
        raise DataError(
            f"{source} marks its band {alpha} as alpha, but its values vary as measurements do; give --no-alpha-band "
            f"--bands {','.join(map(str, chosen))} if it is a measurement, or --alpha-band if 0 means no data"
        )
    return alpha


def _varies(dataset: Any, number: int) -> bool:
    """Return whether a band has no frequent value above 0, unlike an alpha band, which is mostly opaque."""
    height, width = min(ALPHA_SIDE, dataset.height), min(ALPHA_SIDE, dataset.width)
    grids = ([int(at) for at in np.linspace(0, max(0, side - ALPHA_SIDE), ALPHA_SAMPLES)] for side in dataset.shape)
    tops, lefts = (sorted(set(grid)) for grid in grids)
    windows = [((top, top + height), (left, left + width)) for top in tops for left in lefts]
    values = np.concatenate([dataset.read(number, window=window).ravel() for window in windows])
    _, counts = np.unique(values[values > 0], return_counts=True)
    return bool(counts.size and counts.max() < ALPHA_MODE_SHARE * counts.sum())


def _bands(source: str, dataset: Any, metadata: ModelMetadata, bands: str | None, alpha: int | None) -> tuple[int, ...]:
    """Return the numbers of the bands to read; ``alpha`` is the alpha band."""
    count = dataset.count - (alpha == dataset.count)
    if bands is None:
        if metadata.bands in (count, dataset.count):
            return tuple(range(1, metadata.bands + 1))
        example = ",".join(str(min(number, count)) for number in range(1, metadata.bands + 1))
        raise DataError(
            f"{source} has {count} band{'s' * (count != 1)}, the network reads {metadata.bands}; name them in the "
            f"order of the training images, such as --bands {example}"
        )
    try:
        chosen = tuple(int(number) for number in bands.split(","))
    except ValueError:
        raise DataError(f"--bands must be band numbers such as 4,3,2, got {bands}") from None
    if len(chosen) != metadata.bands:
        raise DataError(f"--bands {bands} names {len(chosen)} bands, the network reads {metadata.bands}; name as many")
    if min(chosen) < 1 or max(chosen) > dataset.count:
        raise DataError(f"--bands {bands}: {source} has the bands 1 to {dataset.count}; choose from these")
    return chosen


def _check_complete(source: str, dataset: Any) -> None:
    """Check that a TIFF file contains the last blocks that its header lists."""
    path = Path(source)
    if dataset.driver != "GTiff" or dataset.name != source or not path.is_file():
        return
    length = path.stat().st_size
    for band in {1, dataset.count}:
        height, width = dataset.block_shapes[band - 1]
        row = (dataset.height - 1) // height
        for column in range((dataset.width - 1) // width + 1):
            begin = dataset.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=band)
            size = dataset.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=band)
            if begin and size and int(begin) + int(size) > length:
                raise DataError(
                    f"{source} is truncated: its header lists {(int(begin) + int(size)) / 1e6:.1f} MB or more, and the "
                    f"file has {length / 1e6:.1f}; copy or download it again"
                )

"""A raster as the network's input: what its header says, and whether it fits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from overfly.core.errors import DataError, MissingExtraError
from overfly.exporting.predictor import ModelMetadata
from overfly.raster.alpha_band import check_alpha_band, find_alpha_band
from overfly.raster.georeference import Georeference, georeference, ground_size

CACHE = 96 * 2**20
"""Bytes of decoded blocks that GDAL may keep; by default it takes a share of the machine's memory."""
FRACTIONS = 16.0
"""Brightest pixel below which a network was trained on fractions, such as reflectances of 0 to 1."""
SAME = 0.02
"""Difference of ground resolution, as a share, that is not worth a resampling."""


@dataclass(frozen=True)
class RasterSource:
    """A raster, and how it is read.

    Attributes:
        source: path or address, as rasterio opens it.
        height: rows.
        width: columns.
        bands: numbers of the bands that are read, from 1, in the network's order.
        dtype: type that it is stored in.
        nodata: value that stands for "nothing was measured here"; None where there is none.
        masked: whether a mask of the whole picture says where nothing was measured.
        opacity: number of the band that is 0 where nothing was measured; None where there is none.
        gain: what its values are multiplied by, to be in the range that the network was trained on.
        ground: meters on the ground that a pixel is high and wide; None if unknown.
        place: where it lies.
    """

    source: str
    height: int
    width: int
    bands: tuple[int, ...]
    dtype: str
    nodata: float | None
    masked: bool
    alpha_band: int | None
    gain: float
    ground_size: tuple[float, float] | None
    place: Georeference


@contextmanager
def open_raster(source: str) -> Iterator[Any]:
    """Open a raster; its blocks are kept in little memory.

    Raises:
        MissingExtraError: rasterio is not installed.
        DataError: there is no such raster, or it is damaged, seen on opening or while it is read within.
    """
    try:
        import rasterio
        from rasterio._err import CPLE_BaseError
        from rasterio.errors import RasterioError
    except ImportError:
        raise MissingExtraError("rasterio", "geo", "a map of a raster") from None
    if "://" not in source and not source.startswith("/vsi"):
        _check_file(Path(source))
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE, GDAL_DISABLE_READDIR_ON_OPEN="FALSE"):
            warnings.simplefilter("ignore")
            with rasterio.open(source) as dataset:
                yield dataset
    except (RasterioError, CPLE_BaseError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".").removeprefix(f"{source}: ")
        raise DataError(f"{source} cannot be read as a raster ({reason}); copy, download or export it again") from error


def inspect_raster(
    source: str,
    metadata: ModelMetadata,
    *,
    bands: str | None,
    nodata: float | None,
    max_value: float | None,
    alpha_band: bool | None = None,
) -> RasterSource:
    """What a raster's header says, and that the network can read it.

    Args:
        source: path or address.
        metadata: what the network reads.
        bands: numbers of bands separated by commas; None takes all, where they are as many as the network's.
        nodata: value that stands for "nothing was measured here"; None takes what the file says.
        max_value: value of the brightest pixel; None where it is the network's.
        alpha_band: whether the last band is opacity; None takes what the file says.

    Raises:
        DataError: it is missing, damaged, or does not fit; the sentence says which option helps.
    """
    with open_raster(source) as dataset:
        if not dataset.count or not dataset.height * dataset.width:
            raise DataError(f"{source} holds no raster bands of its own; name the raster inside, or export it anew")
        clear = find_alpha_band(source, dataset, alpha_band)
        chosen = _bands(source, dataset, metadata, bands, clear)
        dtype = str(dataset.dtypes[chosen[0] - 1])
        if "palette" in (dataset.colorinterp[band - 1].name for band in chosen):
            raise DataError(f"{source} holds a palette, whose numbers are no brightness; save it as plain bands first")
        gain = input_gain(source, dtype, metadata, max_value, scale=_scale(dataset, chosen))
        _check_whole(source, dataset)
        clear = _opacity(source, dataset, chosen, clear, alpha_band)
        declared = dataset.nodatavals[chosen[0] - 1]
        flags = {flag.name for band in chosen for flag in dataset.mask_flag_enums[band - 1]}
        return RasterSource(
            source,
            dataset.height,
            dataset.width,
            chosen,
            dtype,
            nodata=declared if nodata is None else nodata,
            masked="per_dataset" in flags and "alpha" not in flags,
            alpha_band=clear,
            gain=gain,
            ground_size=ground_size(dataset),
            place=georeference(dataset),
        )


def scale_of(scene: RasterSource, resolution: float | None) -> tuple[float, float]:
    """Working pixels an input pixel (y, x), so that a working pixel is ``resolution`` meters; (1, 1) without one.

    Raises:
        DataError: the raster does not say how long its pixels are.
    """
    if resolution is None:
        return 1.0, 1.0
    if scene.ground_size is None:
        raise DataError(
            f"{scene.source} does not say how long its pixels are on the ground; leave out --resolution "
            "and --match-gsd, or give it a coordinate system"
        )
    y, x = (length / resolution for length in scene.ground_size)
    return (1.0, 1.0) if abs(y - 1) < SAME and abs(x - 1) < SAME else (y, x)


def _bands(source: str, dataset: Any, metadata: ModelMetadata, bands: str | None, clear: int | None) -> tuple[int, ...]:
    """Numbers of the bands to read, where band ``clear`` is opacity."""
    present = dataset.count - (clear == dataset.count)
    if bands is None:
        if metadata.bands in (present, dataset.count):
            return tuple(range(1, metadata.bands + 1))
        example = ",".join(str(min(number, present)) for number in range(1, metadata.bands + 1))
        raise DataError(
            f"{source} has {present} band{'s' * (present != 1)}, the network reads {metadata.bands}; say which they "
            f"are, in the order of the training images, such as --bands {example}"
        )
    try:
        chosen = tuple(int(number) for number in bands.split(","))
    except ValueError:
        raise DataError(f"--bands {bands} are no numbers of bands; write them as --bands 4,3,2") from None
    if len(chosen) != metadata.bands:
        raise DataError(f"--bands {bands} are {len(chosen)}, the network reads {metadata.bands}; name as many")
    if min(chosen) < 1 or max(chosen) > dataset.count:
        raise DataError(f"--bands {bands}: {source} has the bands 1 to {dataset.count}; name some of these")
    return chosen


def _opacity(source: str, dataset: Any, chosen: tuple[int, ...], clear: int | None, asked: bool | None) -> int | None:
    """The band of opacity, where the network does not read it as one of its own."""
    if clear is None or (clear in chosen and not asked):
        return None
    if clear in chosen:
        raise DataError(
            f"--alpha-band says that band {clear} of {source} is opacity, and it is one of the {len(chosen)} that the "
            "network reads; leave --alpha-band out, or name other bands by --bands"
        )
    if not asked:
        check_alpha_band(source, dataset, clear, ",".join(map(str, chosen)))
    return clear


def _scale(dataset: Any, bands: tuple[int, ...]) -> float | None:
    """What a raster says that its values are to be multiplied by; None where it says nothing, or more than that."""
    scales = {float(dataset.scales[band - 1]) for band in bands}
    scale = scales.pop()
    plain = not scales and not any(dataset.offsets[band - 1] for band in bands)
    return scale if plain and 0 < scale < 1 else None


def input_gain(
    source: object,
    dtype: str,
    metadata: ModelMetadata,
    max_value: float | None,
    *,
    scale: float | None = None,
    option: str = "--max-value ",
) -> float:
    """What brings a raster's values into the range that the network was trained on.

    Args:
        source: what the raster is called in a message.
        dtype: type that it is stored in.
        metadata: what the network reads.
        max_value: value of the brightest pixel; None where it is the network's.
        scale: what the raster itself says that makes fractions of its whole numbers; None where it says nothing.
        option: how a user gives the value of the brightest pixel, up to the number.

    Raises:
        DataError: the type cannot hold brightness, or is of another range and neither ``max_value`` nor the file helps.
    """
    if "complex" in dtype:
        raise DataError(f"{source} holds complex numbers; save it as plain bands first")
    if max_value is not None:
        return metadata.max_value / max_value
    whole, fractions = np.dtype(dtype).kind in "iu", metadata.max_value < FRACTIONS
    if whole and fractions and scale is not None:
        return scale
    if (dtype == "uint8") != (metadata.max_value == 255) or (whole and fractions):
        example = "255" if dtype == "uint8" else "10000" if whole else "1"
        raise DataError(
            f"{source} holds {dtype}, and the network was trained on values up to {metadata.max_value:g}; say the "
            f"value of its "
            f"brightest pixel, such as {option}{example}, and it is scaled"
        )
    return 1.0


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"{path} is no file; name a raster, a folder of them or a glob")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} may not be read; change its rights")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; copy, download or export it again")


def _check_whole(source: str, dataset: Any) -> None:
    """See that the blocks that a TIFF's header lists last are in the file: an hour later would be late to say so."""
    path = Path(source)
    if dataset.driver != "GTiff" or not path.is_file():
        return
    length = path.stat().st_size
    for band in {1, dataset.count}:
        high, wide = dataset.block_shapes[band - 1]
        row = (dataset.height - 1) // high
        for column in range((dataset.width - 1) // wide + 1):
            begin = dataset.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=band)
            size = dataset.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=band)
            if begin and size and int(begin) + int(size) > length:
                raise DataError(
                    f"{source} is truncated: its header speaks of {(int(begin) + int(size)) / 1e6:.1f} MB or more, and "
                    f"{length / 1e6:.1f} are there; copy or download it again"
                )

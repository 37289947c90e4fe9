"""Which band of a raster is opacity, and where it says that nothing was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfly.core.errors import DataError

PLACES, SIDE = 5, 64
"""A band is looked at in so many places along each axis, in squares of so many pixels."""
COMMONEST = 0.5
"""Share of the pixels above 0 that have one value, at least, where a band is opacity."""
Mask = NDArray[np.bool_]


def find_alpha_band(source: str, dataset: Any, asked: bool | None) -> int | None:
    """Number of the band that is opacity, from 1; None where there is none.

    Args:
        source: what the raster is called in a message.
        dataset: the raster, open.
        asked: True where the user says that the last band is opacity, False where none is, None to take what the file
            says. Writers that are told nothing mark the fourth of four bands of 8 bits as opacity, whatever it is.

    Raises:
        DataError: the last band is said to be opacity, and is the only one.
    """
    if asked is False:
        return None
    if asked:
        if dataset.count == 1:
            raise DataError(f"--alpha-band: {source} has one band, which cannot be opacity; leave --alpha-band out")
        return int(dataset.count)
    marked = (number for number, color in enumerate(dataset.colorinterp, 1) if color.name == "alpha")
    return next(marked, None) if dataset.count > 1 else None


def check_alpha_band(source: str, dataset: Any, number: int, bands: str) -> None:
    """See that a band that a file marks as opacity looks like it.

    Args:
        source: what the raster is called in a message.
        dataset: the raster, open.
        number: of the band.
        bands: which are left without it, such as "1,2,3".

    Raises:
        DataError: it varies as measurements do.
    """
    if not _varies(dataset, number):
        return
    raise DataError(
        f"{source} marks its band {number} as opacity, and that varies as measurements do; say --no-alpha-band --bands "
        f"{bands} if it was measured, or --alpha-band if where it is 0 nothing was"
    )


def transparent(dataset: Any, number: int | None, window: Any) -> Mask | None:
    """Where a window (h, w) of an open raster is fully transparent; None where no band is opacity."""
    if number is None:
        return None
    clear: Mask = dataset.read(number, window=window) == 0
    return clear


def covered(dataset: Any, number: int, masked: bool, window: Any) -> Mask | None:
    """Where a mask of the whole picture says that nothing was measured (h, w); None where there is none.

    Args:
        dataset: the raster, open.
        number: of a band that is read.
        masked: whether there is such a mask.
        window: of the raster.
    """
    if not masked:
        return None
    hidden: Mask = dataset.read_masks(number, window=window) == 0
    return hidden


def either(one: Mask | None, other: Mask | None) -> Mask | None:
    """Where one of two masks is set; None where there is neither."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def _varies(dataset: Any, number: int) -> bool:
    """Whether none of a band's values above 0 is common: opacity is nearly everywhere all or nothing."""
    from rasterio.windows import Window

    tops, lefts = ({int(at) for at in np.linspace(0, max(0, length - SIDE), PLACES)} for length in dataset.shape)
    parts = [
        dataset.read(number, window=Window(left, top, min(SIDE, dataset.width), min(SIDE, dataset.height))).ravel()
        for top in sorted(tops)
        for left in sorted(lefts)
    ]
    seen = np.concatenate(parts)
    _, counts = np.unique(seen[seen > 0], return_counts=True)
    return bool(counts.size and counts.max() < COMMONEST * counts.sum())

"""What is written of probabilities: class ids, percentages, uncertainty; 255 where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from overfly.core.records import IGNORE, UInt8
from overfly.exporting.predictor import Floats
from overfly.raster.window_reader import Mask

Kind = Literal["classes", "probabilities", "uncertainty"]

CHUNK = 1 << 16
"""Pixels that are worked on at once, so that they stay in a processor's cache."""


@dataclass(frozen=True)
class Product:
    """One file of a job.

    Attributes:
        kind: what its bands say.
        bands: how many.
        make: weighted sums of probabilities (K, h, w), and where nothing was measured (h, w), to bands (bands, h, w).
    """

    kind: Kind
    bands: int
    make: Callable[[Floats, Mask | None], UInt8]


def products(classes: int, *, probabilities: bool, uncertainty: bool) -> list[Product]:
    """What a job writes: the classes always, more on request.

    Args:
        classes: K.
        probabilities: a band a class, in percent.
        uncertainty: a band of entropy, in percent of the largest that K classes can have.
    """
    made = [Product("classes", 1, _ids)]
    if probabilities:
        made.append(Product("probabilities", classes, _percentages))
    if uncertainty:
        made.append(Product("uncertainty", 1, _entropy))
    return made


def make(product: Product, sums: Floats, nodata_mask: Mask | None) -> UInt8:
    """Bands (bands, h, w) of weighted sums of probabilities (K, h, w), 255 where nothing was measured (h, w)."""
    _, high, wide = sums.shape
    found = np.empty((product.bands, high, wide), np.uint8)
    rows = max(1, CHUNK // max(1, wide))
    for begin in range(0, high, rows):
        part = slice(begin, min(begin + rows, high))
        found[:, part] = product.make(sums[:, part], None if nodata_mask is None else nodata_mask[part])
    return found


def _ids(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    """The likeliest class; the first of several that are alike."""
    best = sums[0].copy()
    ids = np.zeros(best.shape, np.uint8)
    for number in range(1, len(sums)):
        np.copyto(ids, np.uint8(number), where=sums[number] > best)
        np.maximum(best, sums[number], out=best)
    ids[best <= 0] = IGNORE  # no window saw it
    if nodata_mask is not None:
        ids[nodata_mask] = IGNORE
    return ids[None]


def _means(sums: Floats) -> tuple[Floats, Mask]:
    total = sums.sum(0)
    unseen: Mask = total <= 0
    means: Floats = (sums / np.where(unseen, np.float32(1), total)).astype(np.float32, copy=False)
    return means, unseen


def _percentages(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    means, unseen = _means(sums)
    found: UInt8 = np.rint(100 * means).astype(np.uint8)
    found[:, unseen if nodata_mask is None else nodata_mask | unseen] = IGNORE
    return found


def _entropy(sums: Floats, nodata_mask: Mask | None) -> UInt8:
    means, unseen = _means(sums)
    surprise = -(means * np.log(np.maximum(means, 1e-12))).sum(0) / np.log(max(2, len(means)))
    found: UInt8 = np.rint(100 * np.clip(surprise, 0, 1)).astype(np.uint8)
    found[unseen if nodata_mask is None else nodata_mask | unseen] = IGNORE
    return found[None]

"""A raster's windows from top to bottom, every pixel decoded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from overfly.exporting.predictor import Floats
from overfly.ops.windows import Window, cut
from overfly.raster.alpha_band import Mask, covered, either, transparent
from overfly.raster.averaging import nodata_of_band, resampled
from overfly.raster.raster_source import RasterSource, open_raster
from overfly.raster.tiling import ColumnStrip, TilingPlan


class WindowBatch(NamedTuple):
    """Windows for the network.

    Attributes:
        slab: number of the slab.
        images: (B, C, size, size), float32.
        places: where each lies on the working grid.
    """

    slab: int
    images: Floats
    places: tuple[Window, ...]


class FinishedRows(NamedTuple):
    """The end of a row of windows.

    Attributes:
        slab: number of the slab.
        row: its number in the slab.
        first: first row of the output that can be written now.
        last: one behind the last.
        nodata_mask: where nothing was measured in these rows, in the slab's columns; None where all pixels count.
    """

    slab: int
    row: int
    first: int
    last: int
    nodata_mask: Mask | None


class Held(NamedTuple):
    """Rows of the working grid that are in memory.

    Attributes:
        top: the first of them.
        pixels: (C, rows, columns of the slab's windows), as stored.
        nodata_mask: where nothing was measured; None where all pixels count.
    """

    top: int
    pixels: NDArray[Any]
    nodata_mask: Mask | None


class Reading(NamedTuple):
    """A raster that is being read.

    Attributes:
        dataset: as rasterio opened it.
        scene: what is read of it.
        plan: the order of the windows.
        batch: windows given at once.
    """

    dataset: Any
    scene: RasterSource
    plan: TilingPlan
    batch: int


def read_windows(
    scene: RasterSource, plan: TilingPlan, batch: int, start: int = 0
) -> Iterator[WindowBatch | FinishedRows]:
    """Read a raster window by window; every pixel is decoded once a slab.

    Windows in which nothing was measured are left out. Of others the network is shown what the readers of training and
    scoring show it: 0 where there is no data or a mask, and the stored values where a pixel is transparent.

    Args:
        scene: the raster.
        plan: the order of the windows.
        batch: windows given at once, of one row of windows.
        start: steps of the plan that are done; windows of those that what follows needs come again.

    Yields:
        Batches, and a Row after each row of windows whose pixels are not done yet.
    """
    with open_raster(scene.source) as dataset:
        reading = Reading(dataset, scene, plan, batch)
        for number in range(len(plan.slabs)):
            done = min(max(start - number * len(plan.tops), 0), len(plan.tops))
            if done < len(plan.tops):
                yield from _slab(reading, number, done)


def _slab(reading: Reading, number: int, done: int) -> Iterator[WindowBatch | FinishedRows]:
    plan, slab = reading.plan, reading.plan.slabs[number]
    held: Held | None = None
    for row in range(plan.first_for(done), len(plan.tops)):
        held = _further(reading, slab, row, held)
        yield from _batches(reading, number, held)
        if row < done:
            continue
        first, last = plan.made(row - 1), plan.made(row)
        if plan.resampled:
            nodata_mask = _blank_rows(reading, (first, last), (slab.first, slab.last))
        elif held.nodata_mask is None:
            nodata_mask = None
        else:
            columns = slice(slab.first - slab.left, slab.last - slab.left)
            nodata_mask = held.nodata_mask[first - held.top : last - held.top, columns].copy()
        yield FinishedRows(number, row, first, last, nodata_mask)


def _further(reading: Reading, slab: ColumnStrip, row: int, held: Held | None) -> Held:
    """The pixels of a row of windows: those that are held already, and those that are not."""
    plan = reading.plan
    top, bottom, columns = plan.tops[row], min(plan.tops[row] + plan.size, plan.working[0]), (slab.left, slab.right)
    if held is None or held.top + held.pixels.shape[1] <= top:
        return Held(top, *_read(reading, (top, bottom), columns))
    pixels, nodata_mask = _read(reading, (held.top + held.pixels.shape[1], bottom), columns)
    kept = slice(top - held.top, None)
    known = held.nodata_mask is not None and nodata_mask is not None
    return Held(
        top,
        np.concatenate([held.pixels[:, kept], pixels], axis=1),
        np.concatenate([held.nodata_mask[kept], nodata_mask]) if known else None,  # type: ignore[index]
    )


def _batches(reading: Reading, number: int, held: Held) -> Iterator[WindowBatch]:
    """The windows of one row, those in which nothing was measured left out."""
    slab, size, width = reading.plan.slabs[number], reading.plan.size, reading.plan.working[1]
    high, places = held.pixels.shape[1], []
    for left in slab.lefts:
        window = Window(held.top, left, high, min(size, width - left))
        columns = slice(left - slab.left, left - slab.left + window.width)
        if held.nodata_mask is None or not held.nodata_mask[:, columns].all():
            places.append(window)
    for begin in range(0, len(places), reading.batch):
        chosen = tuple(places[begin : begin + reading.batch])
        images = np.empty((len(chosen), len(held.pixels), size, size), np.float32)
        for image, window in zip(images, chosen, strict=True):
            column = window.left - slab.left
            patch = torch.from_numpy(held.pixels[..., column : column + window.width].astype(np.float32))
            image[:] = cut(patch, Window(0, 0, window.height, window.width), size).numpy()
        if reading.scene.gain != 1:
            images *= np.float32(reading.scene.gain)
        yield WindowBatch(number, images, chosen)


def _read(reading: Reading, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[NDArray[Any], Mask | None]:
    """Pixels (C, h, w) of the working grid as the network is to see them, and where nothing was measured."""
    from rasterio.enums import Resampling
    from rasterio.windows import Window as Part

    dataset, scene, plan, _ = reading
    if plan.resampled and _may_miss(scene):
        return resampled(dataset, scene, plan.scale, rows, columns)
    (up, left), (y, x) = (rows[0], columns[0]), plan.scale
    high, wide = rows[1] - rows[0], columns[1] - columns[0]
    if plan.resampled:
        finer = Resampling.average if max(plan.scale) <= 1 else Resampling.bilinear
        part = Part(left / x, up / y, wide / x, high / y)
        found: NDArray[Any] = dataset.read(
            list(scene.bands), window=part, out_shape=(len(scene.bands), high, wide), resampling=finer
        )
        return found, None
    part = Part(left, up, wide, high)
    pixels: NDArray[Any] = dataset.read(list(scene.bands), window=part)
    nodata_mask = _unmeasured(pixels, scene.nodata)
    hidden = covered(dataset, scene.bands[0], scene.masked, part)
    if hidden is not None:
        pixels[:, hidden] = 0
    # what is transparent is shown as it is stored, as `data.reading` shows it in training
    return pixels, either(either(nodata_mask, hidden), transparent(dataset, scene.alpha_band, part))


def _may_miss(scene: RasterSource) -> bool:
    """Whether some pixels may not have been measured."""
    hidden = scene.masked or scene.alpha_band is not None
    return hidden or scene.nodata is not None or np.dtype(scene.dtype).kind == "f"


def _blank_rows(reading: Reading, rows: tuple[int, int], columns: tuple[int, int]) -> Mask | None:
    """Where nothing was measured in rows of the input grid."""
    from rasterio.windows import Window as Part

    dataset, scene = reading.dataset, reading.scene
    if not _may_miss(scene) or rows[0] >= rows[1]:
        return None
    part = Part(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0])
    nodata_mask: Mask | None = None
    if scene.nodata is not None or np.dtype(scene.dtype).kind == "f":
        nodata_mask = _unmeasured(dataset.read(list(scene.bands), window=part), scene.nodata)
    hidden = covered(dataset, scene.bands[0], scene.masked, part)
    return either(either(nodata_mask, hidden), transparent(dataset, scene.alpha_band, part))


def _unmeasured(pixels: NDArray[Any], nodata: float | None) -> Mask | None:
    """Set values that were not measured to 0; where that is in every band, None where no value can be such."""
    everywhere: Mask | None = None
    for band in pixels:
        nodata_mask = nodata_of_band(band, nodata)
        if nodata_mask is not None:
            band[nodata_mask] = 0
            everywhere = nodata_mask if everywhere is None else everywhere & nodata_mask
    return everywhere

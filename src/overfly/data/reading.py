"""From a file to an array: PNG, JPEG, TIFF and GeoTIFF; 1 to N bands of 8 bits, 16 bits or float."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, LazyArray, UInt8
from overfly.data.headers import ImageHeader, open_pillow, open_raster, read_header

Mask = NDArray[np.bool_]


class LabelPixels(NamedTuple):
    """A label as its file stores it.

    Attributes:
        values: numbers (H, W), or colors (H, W, 3) uint8.
        palette: colors of the numbers (P, 3), where the file brings a table of them.
    """

    values: Array
    palette: UInt8 | None = None


def read_image(source: Path | LazyArray, *, bands: int | None) -> Array:
    """A picture (H, W, C) as uint8, uint16 or float32, in its own range; of a file, a new array that may be written to.

    Opacity is no band: of a picture with one band more than asked for, whose last is opacity, that one is left out.
    What the file declares as no data or masks, and what is not finite, comes back as 0; `nodata_mask` tells where.

    Args:
        source: file, or drawing.
        bands: number of bands C that is expected; None takes what there is.

    Raises:
        DataError: the file is missing, truncated, no picture, a palette picture, or has another number of bands.
        MissingExtraError: it takes rasterio to read it.
    """
    if not isinstance(source, Path):
        return _drawn(source, bands)
    found = read_header(source)
    kept = _kept_bands(source, found, bands)
    pixels = _pixels(source, found)[..., :kept]
    nodata_mask = _nodata_mask(pixels, found.nodata)
    dtype = pixels.dtype if pixels.dtype in (np.uint8, np.uint16) else np.dtype(np.float32)
    image: Array = np.array(pixels, dtype, order="C")
    if nodata_mask is not None:
        image[nodata_mask] = 0
    if found.masked:
        image[_hidden(source)] = 0
    return image


def nodata_mask(source: Path | LazyArray, *, bands: int | None) -> Mask | None:
    """Where nothing was measured, (H, W): no data in every band, masked, or fully transparent; None where all count.

    Only a file that may hold such pixels is decoded: one with opacity, a mask or a no-data value, or one of floats.

    Raises:
        DataError: as `read_image`.
        MissingExtraError: as `read_image`; a mask takes rasterio too.
    """
    if not isinstance(source, Path):
        return None
    found = read_header(source)
    kept = _kept_bands(source, found, bands)
    if found.bands == kept and found.nodata is None and found.dtype != "float32" and not found.masked:
        return None
    pixels = _pixels(source, found)
    nodata_mask = _nodata_mask(pixels[..., :kept], found.nodata)
    mask: Mask = np.zeros(pixels.shape[:2], np.bool_)
    if nodata_mask is not None:
        np.all(nodata_mask, axis=-1, out=mask)
    if kept < found.bands:
        mask |= pixels[..., -1] == 0
    if found.masked:
        mask |= _hidden(source)
    return mask if mask.any() else None


def read_label_pixels(source: Path | LazyArray) -> LabelPixels:
    """A label as it is stored: numbers (H, W), colors (H, W, 3), or numbers with a table of colors.

    Raises:
        DataError: the file is missing, truncated, no picture, a JPEG (whose compression blurs classes into each
            other), or of a number of bands that is neither a number nor a color a pixel.
    """
    if not isinstance(source, Path):
        return LabelPixels(source())
    found = read_header(source)
    if found.kind == "jpeg":
        raise DataError(f"{source} is a JPEG, whose compression blurs classes into each other; save the mask as PNG")
    color = found.bands - found.alpha
    if color not in (1, 3):
        raise DataError(
            f"{source} has {found.bands} bands, and a mask has one of class numbers or three of colors; export it anew"
        )
    if found.palette:
        return _palette_pixels(source, found)
    values = _pixels(source, found)[..., :color]
    if color == 3:
        if values.dtype != np.uint8:
            raise DataError(f"{source} has colors of {values.dtype}; save the mask with 8 bits a band")
        return LabelPixels(values)
    values = values[..., 0] // found.scale if found.scale > 1 else values[..., 0]
    if values.dtype.kind == "f" and not np.array_equal(values, np.trunc(values)):
        raise DataError(f"{source} holds numbers that are not whole, and class numbers are; export it as integers")
    return LabelPixels(values)


def read_index_label(item: Item, classes: int) -> UInt8:
    """The label (H, W) of an item that stores class ids 0 to ``classes`` - 1 and 255 for ignored pixels.

    Raises:
        DataError: there is none, or it is broken, of another size than the image, or holds other numbers.
    """
    values = read_label_pixels(label_of(item)).values
    if values.ndim != 2:
        raise DataError(f"{place(item.label)} holds colors, not class numbers; the domain 'folder' reads colors")
    check_size(item, values)
    wrong = values[((values < 0) | (values >= classes)) & (values != IGNORE)]
    if wrong.size:
        raise DataError(
            f"{place(item.label)} holds the number {wrong.flat[0]} ({wrong.size} pixels are out of range), and class "
            f"ids are 0 to {classes - 1} or {IGNORE} for ignored; correct the mask or say what its numbers mean"
        )
    return values.astype(np.uint8)


def label_of(item: Item) -> Path | LazyArray:
    """Where an item's label is.

    Raises:
        DataError: it has none.
    """
    if item.label is None:
        _no_label(item)
    return item.label


def check_size(item: Item, label: Array) -> None:
    """See that a label (H, W) is as large as its item's image.

    Raises:
        DataError: it is not.
    """
    if isinstance(item.image, Path):
        image = read_header(item.image)
        if label.shape[:2] != (image.height, image.width):
            raise DataError(
                f"{place(item.label)} is {label.shape[1]}×{label.shape[0]} pixels, its image {item.image} is "
                f"{image.width}×{image.height}; export both at one size"
            )


def place(source: Path | LazyArray | None) -> str:
    """A source as words for a message."""
    return str(source) if isinstance(source, Path) else "a synthetic picture"


def _no_label(item: Item) -> NoReturn:
    raise DataError(f"{place(item.image)} has no mask; leave it out, or name the masks in the domain's settings")


def _drawn(source: LazyArray, bands: int | None) -> Array:
    image = source()
    image = image[..., None] if image.ndim == 2 else image
    if bands is not None and image.shape[-1] != bands:
        raise DataError(
            f"a synthetic picture has bands: {image.shape[-1]}, expected: {bands}; correct the domain's bands"
        )
    return image


def _kept_bands(path: Path, found: ImageHeader, bands: int | None) -> int:
    """How many of a file's bands are the picture's own."""
    if found.palette:
        raise DataError(f"{path} is a palette picture, whose numbers are no brightness; save it as RGB or as gray")
    color = found.bands - found.alpha
    if bands is None or bands == color:
        return color
    if bands == found.bands:
        return bands
    raise DataError(
        f"{path} has {color} band{'s' * (color != 1)}, {bands} {'are' if bands != 1 else 'is'} expected; "
        f"set the domain's bands to {color} or convert the file"
    )


def _nodata_mask(pixels: Array, nodata: float | None) -> Mask | None:
    """Where single values (H, W, C) were not measured."""
    nodata_mask: Mask | None = None
    if pixels.dtype.kind == "f":
        nodata_mask = ~np.isfinite(pixels)
    if nodata is not None and not math.isnan(nodata):
        with np.errstate(over="ignore"):
            value = pixels.dtype.type(nodata) if pixels.dtype.kind == "f" else nodata
        declared: Mask = np.equal(pixels, value)
        nodata_mask = declared if nodata_mask is None else np.logical_or(nodata_mask, declared)
    return nodata_mask


def _hidden(path: Path) -> Mask:
    """Where a file's mask for all bands says that nothing was measured (H, W)."""
    with open_raster(path) as dataset:
        hidden: Mask = dataset.read_masks(1) == 0
        return hidden


def _pixels(path: Path, found: ImageHeader) -> Array:
    """All bands as stored (H, W, C)."""
    if found.engine == "rasterio":
        with open_raster(path) as dataset:
            stored: Array = np.moveaxis(dataset.read(), 0, -1)
            return stored
    with open_pillow(path) as image:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _palette_pixels(path: Path, found: ImageHeader) -> LabelPixels:
    if found.engine == "rasterio":
        with open_raster(path) as dataset:
            table = dataset.colormap(1)
            colors = [table.get(entry, (0, 0, 0))[:3] for entry in range(max(table) + 1)]
            return LabelPixels(dataset.read(1), np.array(colors, np.uint8))
    with open_pillow(path) as image:
        values = np.asarray(image)
        palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    return LabelPixels(values, palette)

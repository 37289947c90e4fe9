"""Read images and labels: PNG, JPEG, TIFF and GeoTIFF; 1 to N bands of 8 bits, 16 bits or float."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from overfly.core.classes import Color
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, LazyArray, UInt8
from overfly.data.headers import ImageHeader, open_pillow, open_raster, read_header

Mask = NDArray[np.bool_]
UNKNOWN = 254
"""Id of unknown values during decoding; a label set has at most 254 classes, ids 0 to 253."""
Packed = NDArray[np.int32]


class LabelPixels(NamedTuple):
    """A label as stored: numbers (H, W) or colors (H, W, 3), uint8; and the colors of a palette (P, 3), or None."""

    values: Array
    palette: UInt8 | None = None


def read_image(source: Path | LazyArray, *, bands: int | None) -> Array:
    """Read an image (H, W, C) as uint8, uint16 or float32, in the sensor's range; a new array if it is a file.

    An alpha band is left out unless ``bands`` includes it.
    Pixels without data, masked or not finite are 0; see `nodata_mask`.

    Args:
        source: file, or function that generates the image.
        bands: expected number of bands C; None accepts any.

    Raises:
        DataError: the file is missing, truncated, not an image, a palette image, or has another number of bands.
        MissingExtraError: the format needs rasterio.
    """
    if not isinstance(source, Path):
        return _generate(source, bands)
    header = read_header(source)
    count = _image_bands(source, header, bands)
    pixels = _pixels(source, header)[..., :count]
    nodata_mask = _nodata_mask(pixels, header.nodata)
    dtype = pixels.dtype if pixels.dtype in (np.uint8, np.uint16) else np.dtype(np.float32)
    image: Array = np.array(pixels, dtype, order="C")
    if nodata_mask is not None:
        image[nodata_mask] = 0
    if header.masked:
        image[_masked_pixels(source)] = 0
    return image


def nodata_mask(source: Path | LazyArray, *, bands: int | None) -> Mask | None:
    """Pixels without data (H, W): no-data values in every band, masked, or fully transparent; None: no such pixels.

    Decodes only files that may hold such pixels: with an alpha band, a mask, a no-data value, or floats.

    Raises:
        DataError: as `read_image`.
        MissingExtraError: as `read_image`; a mask needs rasterio too.
    """
    if not isinstance(source, Path):
        return None
    header = read_header(source)
    count = _image_bands(source, header, bands)
    if header.bands == count and header.nodata is None and header.dtype != "float32" and not header.masked:
        return None
    pixels = _pixels(source, header)
    nodata_mask = _nodata_mask(pixels[..., :count], header.nodata)
    mask: Mask = np.zeros(pixels.shape[:2], np.bool_)
    if nodata_mask is not None:
        np.all(nodata_mask, axis=-1, out=mask)
    if count < header.bands:
        mask |= pixels[..., -1] == 0
    if header.masked:
        mask |= _masked_pixels(source)
    return mask if mask.any() else None


def read_label_pixels(source: Path | LazyArray) -> LabelPixels:
    """Read a label as it is stored: numbers (H, W), colors (H, W, 3), or numbers with a palette.

    Raises:
        DataError: the file is missing, truncated, not an image, a JPEG (lossy), or has neither one nor three bands.
    """
    if not isinstance(source, Path):
        return LabelPixels(source())
    header = read_header(source)
    if header.kind == "jpeg":
        raise DataError(f"{source} is a JPEG, whose lossy compression changes class numbers; save the mask as PNG")
    color = header.bands - header.alpha
    if color not in (1, 3):
        raise DataError(
            f"{source} must have one band of class numbers or three of colors, got {header.bands}; export it again"
        )
    if header.palette:
        return _palette_pixels(source, header)
    values = _pixels(source, header)[..., :color]
    if color == 3:
        if values.dtype != np.uint8:
            raise DataError(f"{source} has colors of type {values.dtype}; save the mask with 8 bits per band")
        return LabelPixels(values)
    values = values[..., 0] // header.scale if header.scale > 1 else values[..., 0]
    if values.dtype.kind == "f" and not np.array_equal(values, np.trunc(values)):
        raise DataError(f"{source} has fractional values; export the class numbers as integers")
    return LabelPixels(values)


def read_index_label(item: Item, classes: int) -> UInt8:
    """Read the label (H, W) of an item that stores class ids 0 to ``classes`` - 1 and 255 for ignored pixels.

    Raises:
        DataError: there is no label, or it is damaged, of another size than the image, or contains other numbers.
    """
    values = read_label_pixels(label_source(item)).values
    if values.ndim != 2:
        raise DataError(f"{source_name(item.label)} holds colors, not class numbers; the domain 'folder' reads colors")
    check_size(item, values)
    wrong = values[((values < 0) | (values >= classes)) & (values != IGNORE)]
    if wrong.size:
        raise DataError(
            f"{source_name(item.label)} must hold class ids 0 to {classes - 1} or {IGNORE} for ignored, got "
            f"{wrong.flat[0]} ({wrong.size} pixels); correct the mask"
        )
    return values.astype(np.uint8)


def label_source(item: Item) -> Path | LazyArray:
    """Return the source of an item's label; raise `DataError` if the item has no label."""
    if item.label is None:
        raise DataError(f"{source_name(item.image)} has no mask; remove it, or set the domain's masks")
    return item.label


def check_size(item: Item, label: Array) -> None:
    """Raise `DataError` unless a label (H, W) has the size of its item's image."""
    if isinstance(item.image, Path):
        image = read_header(item.image)
        if label.shape[:2] != (image.height, image.width):
            raise DataError(
                f"{source_name(item.label)} is {label.shape[1]}×{label.shape[0]} pixels, its image {item.image} is "
                f"{image.width}×{image.height}; export both at the same size"
            )


def source_name(source: Path | LazyArray | None) -> str:
    """Path of a source, for messages."""
    return str(source) if isinstance(source, Path) else "a synthetic image"


def _generate(source: LazyArray, bands: int | None) -> Array:
    image = source()
    image = image[..., None] if image.ndim == 2 else image
    if bands is not None and image.shape[-1] != bands:
        raise DataError(
            f"the synthetic image has {image.shape[-1]} bands, expected {bands}; correct the domain's bands"
        )
    return image


def _image_bands(path: Path, header: ImageHeader, bands: int | None) -> int:
    """Number of bands to return, with or without the alpha band."""
    if header.palette:
        raise DataError(f"{path} is a palette image; save it as RGB or gray")
    color = header.bands - header.alpha
    if bands is None or bands == color:
        return color
    if bands == header.bands:
        return bands
    raise DataError(
        f"{path} has {color} band{'s' * (color != 1)}, {bands} {'are' if bands != 1 else 'is'} expected; "
        f"set the domain's bands to {color} or convert the file"
    )


def _nodata_mask(pixels: Array, nodata: float | None) -> Mask | None:
    """Values (H, W, C) without data."""
    nodata_mask: Mask | None = None
    if pixels.dtype.kind == "f":
        nodata_mask = ~np.isfinite(pixels)
    if nodata is not None and not math.isnan(nodata):
        with np.errstate(over="ignore"):
            value = pixels.dtype.type(nodata) if pixels.dtype.kind == "f" else nodata
        declared: Mask = np.equal(pixels, value)
        nodata_mask = declared if nodata_mask is None else np.logical_or(nodata_mask, declared)
    return nodata_mask


def _masked_pixels(path: Path) -> Mask:
    """Pixels that the file's validity mask excludes (H, W)."""
    with open_raster(path) as dataset:
        mask: Mask = dataset.read_masks(1) == 0
        return mask


def _pixels(path: Path, header: ImageHeader) -> Array:
    """All bands as stored (H, W, C)."""
    if header.engine == "rasterio":
        with open_raster(path) as dataset:
            stored: Array = np.moveaxis(dataset.read(), 0, -1)
            return stored
    with open_pillow(path) as image:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _palette_pixels(path: Path, header: ImageHeader) -> LabelPixels:
    if header.engine == "rasterio":
        with open_raster(path) as dataset:
            table = dataset.colormap(1)
            colors = [table.get(entry, (0, 0, 0))[:3] for entry in range(max(table) + 1)]
            return LabelPixels(dataset.read(1), np.array(colors, np.uint8))
    with open_pillow(path) as image:
        values = np.asarray(image)
        palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    return LabelPixels(values, palette)


def pack(colors: UInt8) -> Packed:
    """Pack colors (..., 3) into numbers (...): red·65536 + green·256 + blue."""
    packed: Packed = colors[..., 0].astype(np.int32)
    packed <<= 8
    packed |= colors[..., 1]
    packed <<= 8
    packed |= colors[..., 2]
    return packed


def unpack(packed: int) -> Color:
    """The color (red, green, blue) of one packed number."""
    return packed >> 16 & 255, packed >> 8 & 255, packed & 255


def from_colors(colors: UInt8, class_ids: Mapping[Color, int]) -> UInt8:
    """Class ids (H, W) of colors (H, W, 3); `UNKNOWN` for colors without a class."""
    packed = pack(colors)
    if packed.size > 100_000:
        return _color_table(tuple(sorted(class_ids.items())))[packed]
    keys = pack(np.array(sorted(class_ids), np.uint8).reshape(-1, 3))
    values = np.array([class_ids[color] for color in sorted(class_ids)], np.uint8)
    if not keys.size:
        return np.full(packed.shape, UNKNOWN, np.uint8)
    index = np.searchsorted(keys, packed).clip(max=len(keys) - 1)
    ids: UInt8 = np.where(keys[index] == packed, values[index], np.uint8(UNKNOWN))
    return ids


def from_numbers(numbers: Array, class_ids: Mapping[int, int]) -> UInt8:
    """Class ids (H, W) of whole numbers (H, W) of any type; `UNKNOWN` for numbers without a class."""
    highest = max(max(class_ids, default=0), 255)
    table = np.full(highest + 2, UNKNOWN, np.uint8)
    for number, value in class_ids.items():
        table[number] = value
    if numbers.dtype == np.uint8:
        ids: UInt8 = table[numbers]
    else:
        inside = np.where((numbers >= 0) & (numbers <= highest), numbers, highest + 1)
        ids = table[inside.astype(np.int64)]
    return ids


def from_palette(numbers: Array, palette: UInt8, class_ids: Mapping[Color, int]) -> UInt8:
    """Class ids (H, W) of numbers (H, W) with palette colors (P, 3); `UNKNOWN` for colors without a class."""
    ids = from_colors(palette, class_ids)
    return from_numbers(numbers, {number: int(value) for number, value in enumerate(ids)})


def unknown_colors(colors: UInt8, label: UInt8, palette: UInt8 | None = None) -> str:
    """List the most frequent unknown colors: ``1,2,3 (40 pixels) and 7 more``.

    Args:
        colors: (H, W, 3), or numbers (H, W) of a palette.
        label: result of `from_colors` or `from_palette` (H, W).
        palette: (P, 3), for numbers.
    """
    unknown = colors[label == UNKNOWN]
    if palette is None:
        values, counts = np.unique(pack(unknown), return_counts=True)
        names = [",".join(map(str, unpack(int(value)))) for value in values]
    else:
        values, counts = np.unique(unknown, return_counts=True)
        names = [",".join(map(str, palette[value])) if value < len(palette) else f"entry {value}" for value in values]
    return _most_frequent(names, counts)


def unknown_numbers(numbers: Array, label: UInt8) -> str:
    """List the most frequent unknown numbers: ``9 (40 pixels) and 7 more``."""
    values, counts = np.unique(numbers[label == UNKNOWN], return_counts=True)
    return _most_frequent([f"{value:g}" for value in values], counts)


@lru_cache(maxsize=4)
def _color_table(class_ids: tuple[tuple[Color, int], ...]) -> UInt8:
    """Class id of each of the 2²⁴ colors (16 MB); five times faster than a search per pixel."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    for (red, green, blue), value in class_ids:
        table[red << 16 | green << 8 | blue] = value
    return table


def _most_frequent(names: list[str], counts: NDArray[np.int64]) -> str:
    order = np.argsort(-counts, kind="stable")
    listed = ", ".join(f"{names[index]} ({counts[index]} pixels)" for index in order[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")

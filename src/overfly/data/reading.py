"""Read images and masks: the one reader of training, scoring, maps, server and streams.

The same rules hold everywhere:

* Format: PNG, JPEG, TIFF, GeoTIFF, JPEG 2000, BMP or WebP by the first bytes; a VRT only if the file is named ``.vrt``.
* Values: as stored, so gray of 2 bits is 0 to 3. Complex numbers are rejected. Blocks of a sparse TIFF that were never
  written are the declared no data, else 0.
* Orientation: an image is turned as its tag (TIFF, EXIF) says, unless it is georeferenced: then its grid counts.
* Color: CMYK, YCbCr and CIELAB are converted to RGB. A palette of grays is gray; other palettes are for masks only.
* Alpha: a band marked as alpha is left out unless ``bands`` includes it, and marks pixels without data by 0. In masks
  it is not read.
* No data: declared values, values that are not finite, and pixels excluded by a mask, alpha or a transparent color.
  It is 0 in images, and ignored in labels.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio import CRS

from overfly.core.classes import Color
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, LazyArray, UInt8
from overfly.data.headers import ImageHeader, open_raster, read_header, read_palette, read_raster_header

Mask = NDArray[np.bool_]
UNDECLARED = (-999, -9999, -32767, -32768, -99999, -999999, -(2**31))
"""Values that stand for no data in many files, whether they declare it or not."""
UNDECLARED_MAGNITUDE = 1e20
"""Magnitude from which a value stands for no data."""
UNKNOWN = 254
"""Id of unknown values during decoding; a label set has at most 254 classes, ids 0 to 253."""
Packed = NDArray[np.int32]
Code = int | Color
"""A number or a color of a mask."""
MAX_SHIFT = 0.5
"""Largest shift, in pixels, at which the grids of an image and its label count as one."""
GRAYS: UInt8 = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
"""Palette of the grays 0, 1, 2 …"""


class LabelPixels(NamedTuple):
    """Numbers (H, W) or colors (H, W, 3), colors of a palette (P, 3), declared no data, ignored pixels (H, W)."""

    values: Array
    palette: UInt8 | None = None
    nodata: float | None = None
    masked: Mask | None = None


def read_image(source: Path | LazyArray, *, bands: int | None, nodata: float | None = None) -> Array:
    """Read an image (H, W, C) as uint8, uint16 or float32, in the sensor's range; a new array if it is a file.

    An alpha band is left out unless ``bands``, the expected number of bands C (None: any), includes it. Pixels without
    data, masked or not finite are 0; see `nodata_mask`. ``nodata`` is their value where the file declares none. Raises
    `DataError`: the file is missing, truncated, not an image, a palette image, or has another number of bands, or
    values that stand for no data and are not declared.
    """
    if not isinstance(source, Path):
        image = source()
        image = image[..., None] if image.ndim == 2 else image
        if bands not in (None, image.shape[-1]):
            message = f"the synthetic image has {image.shape[-1]} bands, expected {bands}"
            raise DataError(f"{message}; correct the domain's bands")
        return image
    header, described = read_header(source), raster_bands(source, bands, nodata)
    with open_raster(source) as dataset:
        return np.array(np.moveaxis(read_part(dataset, described)[0], 0, -1), header.dtype, order="C")


def nodata_mask(source: Path | LazyArray, *, bands: int | None, nodata: float | None = None) -> Mask | None:
    """Pixels without data (H, W): no-data values in every band, masked, or fully transparent; None: no such pixels.

    Decodes only files that may hold such pixels: with an alpha band, a mask, a no-data value, or floats. Raises
    `DataError`: as `read_image`.
    """
    if not isinstance(source, Path) or not may_lack_data(described := raster_bands(source, bands, nodata)):
        return None
    with open_raster(source) as dataset:
        missing = read_part(dataset, described)[1]
    return missing if missing is not None and missing.any() else None


@dataclass(frozen=True)
class RasterBands:
    """Bands of a raster, and what tells their pixels without data.

    Attributes:
        source: path or address, as rasterio opens it.
        height, width: in pixels.
        bands: numbers of the bands to read, from 1, in the network's order.
        dtype: data type of the stored values.
        nodata: no-data value of each of these bands; None if there is none.
        masked: whether the file has a mask of valid pixels.
        alpha_band: number of the alpha band, which is 0 for no data; None if there is none.
    """

    source: str
    height: int
    width: int
    bands: tuple[int, ...]
    dtype: str
    nodata: tuple[float | None, ...]
    masked: bool
    alpha_band: int | None


def raster_bands(source: Path | str, bands: int | None, nodata: float | None) -> RasterBands:
    """Describe the first ``bands`` bands of a raster, None: all; ``nodata`` counts where the file declares none."""
    header = read_raster_header(source)
    count = image_bands(source, header, bands)
    return RasterBands(
        str(source), header.height, header.width, tuple(range(1, count + 1)), header.stored,
        nodata=tuple(nodata if value is None else value for value in header.nodata[:count]), masked=header.masked,
        alpha_band=header.bands if count < header.bands else None,
    )  # fmt: skip


def read_part(dataset: Any, source: RasterBands, **part: Any) -> tuple[NDArray[Any], Mask | None]:
    """Read the pixels (C, h, w) of a part, 0 for pixels without data, and the mask (h, w) of these pixels.

    ``part`` is a window, or a shape that the raster is read at by nearest neighbor.
    """
    pixels: NDArray[Any] = dataset.read(list(source.bands), **part)
    masked, in_all = masked_pixels(dataset, source, **part), None
    for index, (band, nodata) in enumerate(zip(pixels, source.nodata, strict=True)):
        nodata_mask = union(nodata_values(band, nodata), masked)
        if nodata_mask is not None:
            band[nodata_mask] = 0
            in_all = nodata_mask if index == 0 else None if in_all is None else in_all & nodata_mask
        check_declared(source.source, band)
    return pixels, in_all


def may_lack_data(source: RasterBands) -> bool:
    """Whether pixels of a raster may have no data."""
    by_value = any(value is not None for value in source.nodata) or np.dtype(source.dtype).kind != "u"
    return by_value or source.masked or source.alpha_band is not None


def masked_pixels(dataset: Any, source: RasterBands, **part: Any) -> Mask | None:
    """Return which pixels of a part (h, w) the file's mask excludes or the alpha band hides; None without them."""
    masked = dataset.read_masks(source.bands[0], **part) == 0 if source.masked else None
    hidden = None if source.alpha_band is None else dataset.read(source.alpha_band, **part) == 0
    return union(masked, hidden)


def union(first: Mask | None, second: Mask | None) -> Mask | None:
    """Pixels of either mask; None: none."""
    return first if second is None else second if first is None else first | second


def read_label_pixels(path: Path, band: int | None = None) -> LabelPixels:
    """Read a label as it is stored: numbers (H, W), colors (H, W, 3), or numbers with a palette.

    ``band``, from 1, is the one that holds the numbers where there are several. Raises `DataError`: the file is
    missing, truncated, not an image, lossy, or has neither one nor three bands.
    """
    header = read_header(path)
    with open_raster(path) as dataset:
        return decode_label(path, header, dataset, band)


def decode_label(
    path: Path | str, header: ImageHeader, dataset: Any, band: int | None = None, **part: Any
) -> LabelPixels:
    """Read a label, or a part of it, from an open dataset, as `read_label_pixels`."""
    if header.lossy:
        raise DataError(
            f"{path} has the lossy compression of {header.kind.upper()}, which changes class numbers; save it as PNG"
        )
    color = header.bands - header.alpha
    if color < band if band else color not in (1, 3):
        expected = f"{band} or more bands" if band else "one band of numbers or three of colors"
        raise DataError(f"{path} must have {expected}, got {header.bands}; export it again")
    color = 1 if band else color
    values = np.moveaxis(dataset.read([band] if band else list(range(1, color + 1)), **part), 0, -1)
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    palette = (
        read_palette(dataset) if dataset.colorinterp[0].name == "palette" else GRAYS[::255] if bits == "1" else None
    )
    masked: Mask | None = dataset.read_masks(1, **part) == 0 if header.masked and header.kind != "png" else None
    if color == 3:
        if values.dtype != np.uint8:
            raise DataError(f"{path} has colors of type {values.dtype}; save the mask with 8 bits per band")
    else:
        values = values[..., 0]
        if values.dtype.kind == "f":
            if not np.array_equal(values, np.trunc(values), equal_nan=True):
                raise DataError(f"{path} has fractional values; export the class numbers as integers")
            masked = union(masked, ~np.isfinite(values))
    nodata = None if header.kind == "png" else header.nodata[0]  # PNG: a transparent color, as alpha
    return LabelPixels(values, palette, nodata, masked)


def check_declared(source: Path | str, pixels: Array) -> None:
    """Raise `DataError` if pixels hold a value that stands for no data in many files, and is not declared as such."""
    if pixels.dtype.kind == "u" or not pixels.size:
        return
    for value in (float(pixels.min()), float(pixels.max())):
        if value in UNDECLARED or abs(value) >= UNDECLARED_MAGNITUDE:
            raise DataError(
                f"{source} holds {value:.9g} in {np.mean(pixels == value):.1%} of its values and does not declare it "
                f"as no data; declare it in the file, or set the domain's nodata: {value:.9g} (predict: --nodata)"
            )


def read_item_label(item: Item, band: int | None = None) -> LabelPixels:
    """Read the label of an item as `read_label_pixels` does, on the grid of its image.

    Raises `DataError`: it is missing or damaged, or its size or grid does not fit the image.
    """
    if item.label is None:
        raise DataError(f"{source_name(item.image)} has no mask; remove it, or set the domain's masks")
    if not isinstance(item.label, Path):
        return LabelPixels(item.label())
    pixels = read_label_pixels(item.label, band)
    if not isinstance(item.image, Path):
        return pixels
    rows, columns = _label_part(item.label, item.image)
    masked = None if pixels.masked is None else pixels.masked[rows, columns]
    return pixels._replace(values=pixels.values[rows, columns], masked=masked)


def read_index_label(item: Item, classes: int) -> UInt8:
    """Read the label (H, W) of an item that stores class ids 0 to ``classes`` - 1 and 255 for ignored pixels.

    Raises `DataError`: as `read_item_label`, or it contains other numbers.
    """
    pixels = read_item_label(item)
    if pixels.values.ndim != 2:
        raise DataError(f"{source_name(item.label)} holds colors, not class numbers; the domain 'folder' reads colors")
    numbers = {number: number for number in (*range(classes), IGNORE)}
    label = from_numbers(pixels.values, numbers | ({} if pixels.nodata is None else {int(pixels.nodata): IGNORE}))
    if pixels.masked is not None:
        label[pixels.masked] = IGNORE
    if (label == UNKNOWN).any():
        raise DataError(
            f"{source_name(item.label)} must hold class ids 0 to {classes - 1} or {IGNORE} for ignored, got "
            f"{list_codes(unknown_codes(pixels.values, label))}; correct the mask"
        )
    return label


def item_header(item: Item) -> ImageHeader | None:
    """Header of an item's image; None if it is generated."""
    return read_header(item.image) if isinstance(item.image, Path) else getattr(item.image, "header", None)


def source_name(source: Path | LazyArray | None) -> str:
    """Path of a source, for messages."""
    return getattr(source, "name", "a synthetic image") if callable(source) else str(source)


def _label_part(label_path: Path, image_path: Path) -> tuple[slice, slice]:
    """Rows and columns of a label that lie under its image; flipped where one grid runs the other way."""
    label, image = read_header(label_path), read_header(image_path)
    if label.transform is None or image.transform is None:
        if (label.height, label.width) == (image.height, image.width):
            return slice(None), slice(None)
        turned = f" after it is turned by its orientation tag {image.orientation}" if image.orientation != 1 else ""
        raise DataError(
            f"{label_path} is {label.width}×{label.height} pixels, its image {image_path} is {image.width}×"
            f"{image.height}{turned}; export both at the same size"
        )
    places = (label.transform, image.transform)
    own, grid = (np.array([[x, skew, left], [tilt, y, top], [0, 0, 1]]) for left, x, skew, top, tilt, y in places)
    corners = np.linalg.inv(own) @ grid @ [[0, image.width, image.width], [0, image.height, 0], [1, 1, 1]]
    (left, right, x), (top, bottom, y) = corners[:2].round().astype(int).tolist()
    fits = (abs(right - left), abs(bottom - top), x, y) == (image.width, image.height, right, top)
    fits &= abs(corners[:2] - corners[:2].round()).max() <= MAX_SHIFT
    fits &= min(left, right, top, bottom) >= 0 and max(left, right) <= label.width and max(top, bottom) <= label.height
    same = not (label.crs and image.crs) or CRS.from_wkt(label.crs) == CRS.from_wkt(image.crs)
    if not (fits and same):
        raise DataError(
            f"{label_path} lies elsewhere than its image {image_path} (grid {places[0]}, the image's {places[1]}"
            f"{'' if same else ', in other coordinate systems'}); export the mask on the image's grid, or remove the "
            "wrong georeference"
        )
    columns = slice(left, right) if left < right else slice(left - 1, right - 1 if right else None, -1)
    rows = slice(top, bottom) if top < bottom else slice(top - 1, bottom - 1 if bottom else None, -1)
    return rows, columns


def image_bands(path: Path | str, header: ImageHeader, bands: int | None) -> int:
    """Number of bands to return, with or without the alpha band."""
    if header.palette:
        raise DataError(f"{path} is a palette image; save it as RGB or gray")
    if header.stored.startswith("complex"):
        raise DataError(f"{path} stores complex numbers; save it as plain bands first")
    color = header.bands - header.alpha
    if bands is None or bands == color:
        return color
    if bands == header.bands:
        return bands
    raise DataError(
        f"{path} has {color} band{'s' * (color != 1)}, {bands} {'are' if bands != 1 else 'is'} expected; "
        f"set the domain's bands to {color} or convert the file"
    )


def nodata_values(values: Array, *nodata: float | None) -> Mask | None:
    """Where values of a band (H, W) are not finite or one of some no-data values; None if none can be."""
    is_float = values.dtype.kind == "f"
    missing: Mask | None = ~np.isfinite(values) if is_float else None
    for value in nodata:
        if value is not None and not math.isnan(value):
            with np.errstate(over="ignore"):
                equal = values == (values.dtype.type(value) if is_float else value)
            missing = equal if missing is None else missing | equal
    return missing


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
    return _look_up(pack(colors), {int(pack(np.array(color))): value for color, value in class_ids.items()})


def from_numbers(numbers: Array, class_ids: Mapping[int, int]) -> UInt8:
    """Class ids (H, W) of whole numbers (H, W) of any type; `UNKNOWN` for numbers without a class."""
    if numbers.dtype == np.uint8:
        return _look_up(np.arange(256), class_ids)[numbers]
    return _look_up(numbers, class_ids)


def _look_up(values: Array, class_ids: Mapping[int, int]) -> UInt8:
    ids: UInt8 = np.full(values.shape, UNKNOWN, np.uint8)
    for value, class_id in class_ids.items():
        ids += (values == value).view(np.uint8) * np.uint8((class_id - UNKNOWN) % 256)  # faster than a masked copy
    return ids


def from_palette(numbers: Array, palette: UInt8, class_ids: Mapping[Color, int]) -> UInt8:
    """Class ids (H, W) of numbers (H, W) with palette colors (P, 3); `UNKNOWN` for colors without a class."""
    ids = from_colors(palette, class_ids)
    return from_numbers(numbers, {number: int(value) for number, value in enumerate(ids)})


def unknown_codes(values: Array, label: UInt8, palette: UInt8 | None = None) -> Counter[Code]:
    """Count the pixels of each number (H, W) or color (H, W, 3) that is `UNKNOWN` in a label; ``palette`` (P, 3)."""
    unknown = values[label == UNKNOWN]
    numbers, counts = np.unique(pack(unknown) if values.ndim == 3 else unknown, return_counts=True)
    codes: Counter[Code] = Counter()
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        if palette is not None and number < len(palette):
            codes[tuple(palette[number].tolist())] += count
        else:
            codes[unpack(number) if values.ndim == 3 else int(number)] += count
    return codes


def list_codes(codes: Counter[Code]) -> str:
    """List the most frequent numbers or colors: ``1,2,3 (40 pixels) and 7 more``."""
    listed = (f"{','.join(map(str, np.atleast_1d(code)))} ({count} pixels)" for code, count in codes.most_common(3))
    return ", ".join(listed) + (f" and {len(codes) - 3} more" if len(codes) > 3 else "")

"""Planes of bytes become Cloud Optimized GeoTIFFs with classes' names and colors, in constant memory."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement

import numpy as np

from overfly.core.classes import Classes
from overfly.core.records import IGNORE, UInt8
from overfly.raster.georeference import Georeference, describe
from overfly.raster.products import Product
from overfly.raster.raster_source import CACHE
from overfly.raster.resume_store import Manifest, Store, UnwrittenError

TAG = "OVERFLY_JOB"
"""Metadata key that says what a finished map is made of."""
BLOCK = 512
"""Side of a file's blocks."""
AT_ONCE = 1 << 23
"""Bytes of a written file that are compared at once."""


def write_cog(store: Store, product: Product, classes: Classes, place: Georeference, job: Manifest) -> Path:
    """Make a product's file in the store's folder.

    Tiled in blocks of 512, compressed without loss (deflate), with overviews: of the classes by the mode, of the others
    by the mean.

    Returns:
        The file; a sidecar ``.aux.xml`` beside it holds the names and the attribute table, as GDAL keeps them.

    Raises:
        UnwrittenError: it cannot be written, or not whole, as on a full disk. Nothing of it is left; the planes are.
    """
    import rasterio
    import rasterio.shutil
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    header, made = store.folder / f"{product.kind}.vrt", store.folder / f"{product.kind}.tif"
    try:
        _header(store, product, classes, place, job).write(header, encoding="utf-8")
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE):
            warnings.simplefilter("ignore")
            rasterio.shutil.copy(
                str(header), str(made), driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=BLOCK, NUM_THREADS="ALL_CPUS",
                OVERVIEW_RESAMPLING="MODE" if product.kind == "classes" else "AVERAGE", BIGTIFF="IF_SAFER",
            )  # fmt: skip
            reason = _flaw(store, product, made, job)
    except (RasterioError, CPLE_BaseError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason:
        room = shutil.disk_usage(store.folder).free
        for part in store.folder.glob(f"{made.name}*"):
            if part.is_file():
                part.unlink()
        raise UnwrittenError(
            f"{made.name} could not be written whole into {store.folder} ({reason}; {room / 1e6:.1f} MB were free); "
            "free space there and give the same command again: it goes on where it was"
        )
    return made


def _flaw(store: Store, product: Product, made: Path, job: Manifest) -> str:
    """What is wrong with a written file; empty where it holds the planes and all its overviews.

    GDAL tells nobody of what it could not write when it closes a file, so that the file itself is asked: every block
    is decoded once.
    """
    import rasterio

    sidecar = Path(f"{made}.aux.xml")
    if sidecar.exists() and not sidecar.read_bytes().rstrip().endswith(b"</PAMDataset>"):
        return f"{sidecar.name} breaks off"
    with rasterio.open(made, NUM_THREADS="ALL_CPUS") as written:
        if written.tags().get(TAG) != json.dumps(job):
            return "its metadata are not what they should be"
        if (written.count, written.height, written.width) != (product.bands, store.height, store.width):
            return "its size is not what it should be"
        levels = len(written.overviews(1))
    if not levels and max(store.height, store.width) > BLOCK:
        return "its overviews are missing"
    return next(filter(None, (_level_flaw(store, product, made, level) for level in (None, *range(levels)))), "")


def _level_flaw(store: Store, product: Product, made: Path, level: int | None) -> str:
    """What is wrong with the map itself (None), or with one of its overviews."""
    import rasterio
    from rasterio.windows import Window

    options: dict[str, Any] = {"NUM_THREADS": "ALL_CPUS"} | ({} if level is None else {"overview_level": level})
    wide = BLOCK * max(1, AT_ONCE // (product.bands * BLOCK * BLOCK))
    with rasterio.open(made, **options) as written:
        for top, left in itertools.product(range(0, written.height, BLOCK), range(0, written.width, wide)):
            part = Window(left, top, min(wide, written.width - left), min(BLOCK, written.height - top))
            for column in range(left // BLOCK, -(-(left + part.width) // BLOCK)):
                # what was never written has no offset, and is read as "nothing was measured"
                if not written.get_tag_item(f"BLOCK_OFFSET_{column}_{top // BLOCK}", "TIFF", bidx=1):
                    return "blocks are missing"
            pixels = written.read(window=part)
            if level is None and not np.array_equal(pixels, _of_plane(store, product, part)):
                return "it does not hold what was computed"
    return ""


def _of_plane(store: Store, product: Product, part: Any) -> UInt8:
    """A window (bands, h, w) of a product's planes."""
    shape = (product.bands, store.height, store.width)
    planes = np.memmap(store.plane(product), np.uint8, "r", shape=shape)  # one a window: no page stays mapped
    found: UInt8 = planes[:, part.row_off : part.row_off + part.height, part.col_off : part.col_off + part.width]
    return found


def read_manifest(path: Path) -> Any:
    """What a finished map says that it is made of; None where it says nothing, or is no raster."""
    import rasterio
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path) as dataset:
                return json.loads(dataset.tags().get(TAG, "null"))
    except (RasterioError, CPLE_BaseError, OSError, ValueError):
        return None


def _header(
    store: Store, product: Product, classes: Classes, place: Georeference, job: Manifest
) -> ElementTree[Element[str]]:
    """A VRT: the planes, and all that the file says beside them."""
    root = Element("VRTDataset", {"rasterXSize": str(store.width), "rasterYSize": str(store.height)})
    describe(root, place)
    about = {TAG: json.dumps(job), "CLASS_NAMES": json.dumps(dict(enumerate(classes.names)))}
    about |= {"AREA_OR_POINT": "Point"} if place.point else {}
    _metadata(root, about)
    kind = {"dataType": "Byte", "subClass": "VRTRawRasterBand"}
    for number in range(1, product.bands + 1):
        band = SubElement(root, "VRTRasterBand", kind | {"band": str(number)})
        _band(band, product, classes, number - 1)
        # not by ENVI's header: GDAL takes no file of one byte for a raster
        SubElement(band, "SourceFilename", {"relativeToVRT": "1"}).text = store.plane(product).name
        SubElement(band, "ImageOffset").text = str((number - 1) * store.height * store.width)
        SubElement(band, "PixelOffset").text = "1"
        SubElement(band, "LineOffset").text = str(store.width)
    return ElementTree(root)


def _band(band: Element, product: Product, classes: Classes, number: int) -> None:
    """What one band says of itself. The order of the elements is that of GDAL's schema."""
    texts = {
        "classes": "class",
        "probabilities": f"{classes.names[number % len(classes)]}: probability",
        "uncertainty": "uncertainty: entropy, as a share of the largest",
    }
    SubElement(band, "Description").text = texts[product.kind]
    if product.kind == "classes":
        _metadata(band, {f"CLASS_{index}": name for index, name in enumerate(classes.names)})
    SubElement(band, "NoDataValue").text = str(IGNORE)
    if product.kind != "classes":
        SubElement(band, "UnitType").text = "%"
        SubElement(band, "ColorInterp").text = "Undefined" if product.bands > 1 else "Gray"
        return
    SubElement(band, "ColorInterp").text = "Palette"
    names = SubElement(band, "CategoryNames")
    table = SubElement(band, "ColorTable")
    for name, color in zip(classes.names, classes.colors, strict=True):
        SubElement(names, "Category").text = name
        _entry(table, (*color, 255))
    for _ in range(len(classes), 256):
        _entry(table, (0, 0, 0, 0))
    _attributes(band, classes)


def _attributes(band: Element, classes: Classes) -> None:
    """GDAL's raster attribute table: value, class, red, green, blue."""
    table = SubElement(band, "GDALRasterAttributeTable", {"tableType": "thematic"})
    columns: Sequence[tuple[str, int, int]] = (
        ("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8),
    )  # fmt: skip
    for index, (name, kind, usage) in enumerate(columns):
        field = SubElement(table, "FieldDefn", {"index": str(index)})
        SubElement(field, "Name").text = name
        SubElement(field, "Type").text = str(kind)
        SubElement(field, "Usage").text = str(usage)
    for index, (name, color) in enumerate(zip(classes.names, classes.colors, strict=True)):
        row = SubElement(table, "Row", {"index": str(index)})
        for value in (index, name, *color):
            SubElement(row, "F").text = str(value)


def _entry(table: Element, color: tuple[int, ...]) -> None:
    SubElement(table, "Entry", {f"c{place}": str(value) for place, value in enumerate(color, 1)})


def _metadata(parent: Element, values: dict[str, str]) -> None:
    listed = SubElement(parent, "Metadata")
    for key, value in values.items():
        SubElement(listed, "MDI", {"key": key}).text = value

"""Planes of bytes become Cloud Optimized GeoTIFFs with classes' names and colours, in constant memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement

from overfly.core.classes import Classes
from overfly.core.records import IGNORE
from overfly.deploy.georeference import Georeference, describe
from overfly.deploy.products import Product
from overfly.deploy.scene import CACHE
from overfly.deploy.store import Job, Store, UnwrittenError

TAG = "OVERFLY_JOB"
"""Metadata key that says what a finished map is made of."""


def write_cog(store: Store, product: Product, classes: Classes, place: Georeference, job: Job) -> Path:
    """Make a product's file in the store's folder.

    Tiled in blocks of 512, compressed without loss (deflate), with overviews: of the classes by the mode, of the others
    by the mean.

    Returns:
        The file; a sidecar ``.aux.xml`` beside it holds the names and the attribute table, as GDAL keeps them.

    Raises:
        UnwrittenError: it cannot be written.
    """
    import rasterio
    import rasterio.shutil
    from rasterio.errors import RasterioError

    header, made = store.folder / f"{product.kind}.vrt", store.folder / f"{product.kind}.tif"
    _header(store, product, classes, place, job).write(header, encoding="utf-8")
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE):
            warnings.simplefilter("ignore")
            rasterio.shutil.copy(
                str(header), str(made), driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=512, NUM_THREADS="ALL_CPUS",
                OVERVIEW_RESAMPLING="MODE" if product.kind == "classes" else "AVERAGE", BIGTIFF="IF_SAFER",
            )  # fmt: skip
    except (RasterioError, OSError) as error:
        raise UnwrittenError(
            f"{made.name} cannot be written into {store.folder} ({' '.join(str(error).split())}); make room there and "
            "give the same command again: it goes on here"
        ) from error
    return made


def job_of(path: Path) -> Any:
    """What a finished map says that it is made of; None where it says nothing, or is no raster."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path) as dataset:
                return json.loads(dataset.tags().get(TAG, "null"))
    except (RasterioError, OSError, ValueError):
        return None


def _header(
    store: Store, product: Product, classes: Classes, place: Georeference, job: Job
) -> ElementTree[Element[str]]:
    """A VRT: the planes, and all that the file says beside them."""
    root = Element("VRTDataset", {"rasterXSize": str(store.width), "rasterYSize": str(store.height)})
    describe(root, place)
    about = {TAG: json.dumps(job), "CLASS_NAMES": json.dumps(dict(enumerate(classes.names)))}
    about |= {"AREA_OR_POINT": "Point"} if place.point else {}
    _metadata(root, about)
    for number in range(1, product.bands + 1):
        band = SubElement(root, "VRTRasterBand", {"dataType": "Byte", "band": str(number)})
        _band(band, product, classes, number - 1)
        source = SubElement(band, "SimpleSource")
        SubElement(source, "SourceFilename", {"relativeToVRT": "1"}).text = store.plane(product).name
        SubElement(source, "SourceBand").text = str(number)
        sizes = {"RasterXSize": str(store.width), "RasterYSize": str(store.height), "DataType": "Byte"}
        SubElement(source, "SourceProperties", sizes | {"BlockXSize": str(store.width), "BlockYSize": "1"})
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
    for name, colour in zip(classes.names, classes.colours, strict=True):
        SubElement(names, "Category").text = name
        _entry(table, (*colour, 255))
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
    for index, (name, colour) in enumerate(zip(classes.names, classes.colours, strict=True)):
        row = SubElement(table, "Row", {"index": str(index)})
        for value in (index, name, *colour):
            SubElement(row, "F").text = str(value)


def _entry(table: Element, colour: tuple[int, ...]) -> None:
    SubElement(table, "Entry", {f"c{place}": str(value) for place, value in enumerate(colour, 1)})


def _metadata(parent: Element, values: dict[str, str]) -> None:
    listed = SubElement(parent, "Metadata")
    for key, value in values.items():
        SubElement(listed, "MDI", {"key": key}).text = value


__all__ = ["TAG", "job_of", "write_cog"]

"""Store uploaded images in temporary files, check their headers, and decode them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from overfly.core.errors import DataError
from overfly.core.records import Array
from overfly.data.headers import ImageHeader, open_raster, read_header
from overfly.data.reading import Mask, nodata_mask, read_image
from overfly.raster.raster_source import Georeference, georeference


class UploadedImage(NamedTuple):
    """A decoded image.

    Attributes:
        image: (H, W, C), in its own type and range.
        nodata_mask: True where there is no data (H, W); None where all pixels are valid.
        georeference: None for images without coordinates.
    """

    image: Array
    nodata_mask: Mask | None
    georeference: Georeference | None


@contextmanager
def stored_upload(file: BinaryIO) -> Iterator[Path]:
    """Store an upload in a temporary file within the context; errors say "the image" instead of its path."""
    with tempfile.TemporaryDirectory(prefix="overfly-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        try:
            yield path
        except DataError as error:
            raise DataError(str(error).replace(str(path), "the image")) from None


def check_size(path: Path, pixels: int) -> ImageHeader:
    """Read the header of an image; raise `DataError` if it is not an image or has more pixels."""
    header = read_header(path)
    if header.height * header.width > pixels:
        raise DataError(
            f"{path} has {header.height * header.width / 1e6:.1f} million pixels, more than the {pixels / 1e6:g} "
            "million that this server accepts; send a part of it, or use overfly predict"
        )
    return header


def check_header(path: Path, *, bands: int, pixels: int, network: str = "the network") -> ImageHeader:
    """Read the header of an image; raise `DataError` if it has too many pixels or other bands than the network."""
    header = check_size(path, pixels)
    if bands not in (header.bands, header.bands - header.alpha):
        raise DataError(f"{path} has {header.bands} bands and {network} reads {bands}; send an image with these bands")
    return header


def read_upload(path: Path, header: ImageHeader, bands: int) -> UploadedImage:
    """Decode an image after `check_header`."""
    coordinates: Georeference | None = None
    if header.kind in ("tiff", "jp2"):
        with open_raster(path) as dataset:
            place = georeference(dataset)
        coordinates = place if place.crs or place.transform is not None or place.gcps or place.rpcs else None
    return UploadedImage(read_image(path, bands=bands), nodata_mask(path, bands=bands), coordinates)

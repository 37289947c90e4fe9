"""From the bytes that somebody sent to an image: bounded, and never by the name that they gave it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from overfly.core.errors import DataError, MissingExtraError
from overfly.core.records import Array
from overfly.data.headers import ImageHeader, open_raster, read_header
from overfly.data.reading import Mask, nodata_mask, read_image
from overfly.raster.georeference import Georeference, georeference


class Picture(NamedTuple):
    """An image as it was sent.

    Attributes:
        image: (H, W, C), in its own type and range.
        nodata_mask: where nothing was measured (H, W); None where all pixels count.
        place: None for pictures without one.
    """

    image: Array
    nodata_mask: Mask | None
    place: Georeference | None


@contextmanager
def stored(file: BinaryIO) -> Iterator[Path]:
    """What was sent, as a file under a name of our own, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="overfly-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as own:
            shutil.copyfileobj(file, own)
        try:
            yield path
        except (DataError, MissingExtraError) as error:
            raise DataError(str(error).replace(str(path), "the image")) from None


def within(path: Path, pixels: int) -> ImageHeader:
    """What the header says of an image of so many pixels at most.

    Raises:
        DataError: it is no image, or too large.
    """
    found = read_header(path)
    if found.height * found.width > pixels:
        raise DataError(
            f"{path} has {found.height * found.width / 1e6:.1f} million pixels and this server takes {pixels / 1e6:g}; "
            "send a part of it, or use overfly predict for large rasters"
        )
    return found


def checked(path: Path, *, bands: int, pixels: int, network: str = "the network") -> ImageHeader:
    """What the header says, before anything is decoded.

    Args:
        path: the file.
        bands: that the network reads.
        pixels: that an image may have.
        network: what it is called.

    Raises:
        DataError: it is no image, too large, or of other bands.
    """
    found = within(path, pixels)
    if bands not in (found.bands, found.bands - found.alpha):
        raise DataError(f"{path} has {found.bands} bands and {network} reads {bands}; send an image with its bands")
    return found


def read(path: Path, found: ImageHeader, bands: int) -> Picture:
    """Decode a file whose header was seen.

    Raises:
        DataError: it is damaged.
    """
    image = read_image(path, bands=bands)
    return Picture(image, nodata_mask(path, bands=bands), _place(path) if found.kind in ("tiff", "jp2") else None)


def _place(path: Path) -> Georeference | None:
    """Coordinates; none where the file has none, or rasterio is not there to read them."""
    try:
        with open_raster(path) as dataset:
            found = georeference(dataset)
            placed = found.crs or found.transform is not None or found.points or found.rational
            return found if placed else None
    except MissingExtraError:
        return None


__all__ = ["Picture", "checked", "read", "stored", "within"]

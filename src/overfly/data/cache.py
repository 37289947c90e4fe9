"""Cache decoded and resized images on disk, so that each epoch does not decode them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from overfly.core.atomic_files import atomic_write
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Array, Item, LazyArray, UInt8
from overfly.data.domain import Domain
from overfly.data.headers import read_header

_LAYOUT = 1
"""Raised when entries are made differently: what was cached before is then made again."""


def open_image(
    domain: Domain, item: Item, resize: int | None = None, cache: Path | None = None
) -> tuple[Array, UInt8 | None]:
    """The image (H, W, C), in the sensor's type and range, and the label (H, W) of an item, or None without a label.

    Both may be written to: cache entries are mapped copy-on-write. Generated images are not cached. Several processes
    may share a cache folder.

    Args:
        domain: where the item is from.
        item: which image; its label is opened only if the item still has one.
        resize: side in pixels of the square that images are resized to; None leaves them as they are.
        cache: folder of decoded images; None keeps nothing.

    Raises:
        DataError: a file cannot be read, or the cache cannot be written.
    """

    def image() -> Array:
        read = domain.read_image(item)
        return read if resize is None else resize_image(read, resize)

    def label() -> UInt8:
        read = domain.read_label(item)
        return read if resize is None else resize_label(read, resize)

    if cache is None:
        return image(), None if item.label is None else label()
    loaded = _cached(cache, _key(domain, resize, "image", item.image), image)
    if item.label is None:
        return loaded, None
    return loaded, _cached(cache, _key(domain, resize, "label", item.label, item.image), label)


def nodata_label(domain: Domain, item: Item, resize: int | None = None, cache: Path | None = None) -> UInt8 | None:
    """Label of an item without a mask (H, W): `IGNORE` where the image has no data, else 0.

    Args:
        domain: where the item is from.
        item: which image.
        resize: as `open_image` takes it.
        cache: as `open_image` takes it.

    Returns:
        None if all pixels have data.

    Raises:
        DataError: the image cannot be read, or the cache cannot be written.
    """

    def made() -> UInt8:
        nodata_mask = domain.nodata_mask(item)
        if nodata_mask is None:
            return np.zeros((0, 0), np.uint8)
        label = np.where(nodata_mask, IGNORE, 0).astype(np.uint8)
        return label if resize is None else resize_label(label, resize)

    found = made() if cache is None else _cached(cache, _key(domain, resize, "nodata", item.image), made)
    return found if found.size else None


def resize_image(image: Array, side: int) -> Array:
    """An image (H, W, C) of any type as (side, side, C): bilinear, and averaged over the area where it shrinks."""
    if image.shape[:2] == (side, side):
        return image
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    bands = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image[..., band], np.float32)).resize(
                (side, side), Image.Resampling.BILINEAR
            )
        )
        for band in range(image.shape[2])
    ]
    resized = np.stack(bands, axis=-1)
    if image.dtype.kind == "f":
        return resized.astype(image.dtype)
    limits = np.iinfo(image.dtype)
    return resized.round().clip(limits.min, limits.max).astype(image.dtype)


def resize_label(label: UInt8, side: int) -> UInt8:
    """A label (H, W) as (side, side): the nearest pixel's class, so that no class appears that was not there."""
    if label.shape == (side, side):
        return label
    return np.array(Image.fromarray(label).resize((side, side), Image.Resampling.NEAREST))


def size(cache: Path) -> int:
    """Bytes that a cache folder takes on disk; 0 if it is not there."""
    total = 0
    for path in cache.glob("*/*.npy"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def estimate(domain: Domain, items: Sequence[Item], resize: int | None = None) -> int:
    """Bytes that the cache will take for these items, from the files' headers alone.

    Raises:
        DataError: a file cannot be read.
    """
    total = 0
    for item in items:
        if not isinstance(item.image, Path):
            continue
        found = read_header(item.image)
        pixels = found.height * found.width if resize is None else resize * resize
        labels = isinstance(item.label, Path)
        total += pixels * (domain.bands * np.dtype(found.dtype).itemsize + labels) + 128 * (1 + labels)
    return total


def _key(domain: Domain, resize: int | None, kind: str, *sources: Path | LazyArray) -> str | None:
    """Name of an entry: whatever the result hangs on, hashed. None where a source is no file."""
    stamps: list[object] = []
    for source in sources:
        if not isinstance(source, Path):
            return None
        try:
            state = source.stat()
        except OSError:
            return None
        stamps.append((str(source.resolve()), state.st_mtime_ns, state.st_size))
    parts = [_LAYOUT, kind, resize, type(domain).__qualname__, domain.model_dump(mode="json"), stamps]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _cached(cache: Path, key: str | None, make: Callable[[], Array]) -> Array:
    """The entry called ``key``; made, and kept, if it is not there or not whole."""
    if key is None:
        return make()
    path = cache / key[:2] / f"{key}.npy"
    found = _load(path)
    if found is None:
        _save(path, make())
        found = _load(path)
    if found is None:
        raise DataError(f"{path} was written and cannot be read back; check the disk, or train without a cache")
    return found


def _load(path: Path) -> Array | None:
    try:
        found: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError):
        return None
    return found


def _save(path: Path, made: Array) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part, part.open("wb") as file:
            np.save(file, made, allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"the cache {path.parent.parent} cannot be written ({error.strerror}); free space, or train without it"
        ) from None

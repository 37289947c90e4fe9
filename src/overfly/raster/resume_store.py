"""An unfinished map on disk: plain planes of bytes and how far they are, so that a killed job goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

from overfly.core.errors import DataError
from overfly.core.records import UInt8
from overfly.raster.products import Product

Manifest = Mapping[str, Any]
"""What a map is made of, as plain values: the raster, the network, the settings."""


class BusyError(DataError):
    """Another process makes the same map."""


class UnwrittenError(DataError):
    """A map that cannot be written now; what is done of it is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Store:
    """The folder of an unfinished map, beside the map.

    Attributes:
        folder: hidden, named after the map.
        height: rows.
        width: columns.
    """

    folder: Path
    height: int
    width: int

    def plane(self, product: Product) -> Path:
        """File of a product's bands, one behind the other, a byte a pixel."""
        return self.folder / f"{product.kind}.img"


def folder_of(out: Path) -> Path:
    """Where an unfinished map lies."""
    return out.with_name(f".{out.name}.unfinished")


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """The folder of an unfinished map, for this process alone.

    Raises:
        BusyError: another process makes the same map.
        DataError: the folder cannot be written.
    """
    folder = folder_of(out)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / "lock").open("w")
        except OSError as error:
            raise DataError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
        with file:
            _hold(file, out)
            if not _same(file, folder / "lock"):  # the one who held it has finished and taken it away
                continue
            yield folder
            return


def discard(folder: Path) -> None:
    """Take an unfinished map away."""
    shutil.rmtree(folder, ignore_errors=True)


def begun(out: Path, job: Manifest) -> bool:
    """Whether an unfinished map of this job lies there."""
    return alike(_job(folder_of(out)), job)


def clear(out: Path, job: Manifest) -> None:
    """Take away what a killed process left of a map that is whole now; what is another job's is left alone."""
    folder = folder_of(out)
    if folder.is_dir() and (not (folder / "job.json").exists() or begun(out, job)):
        with suppress(DataError), locked(out) as held:  # by nobody else
            discard(held)


def begin(store: Store, products: Sequence[Product], job: Manifest) -> tuple[int, bool]:
    """Make the planes ready, or find those of the same job.

    Returns:
        Steps that are done, and whether there was an unfinished map of another job, which is thrown away.

    Raises:
        DataError: the disk has no room for them.
    """
    done, other = _state(store, products, job)
    if done == 0:
        for product in products:
            with store.plane(product).open("wb") as file:
                file.truncate(product.bands * store.height * store.width)
    need = sum(product.bands for product in products) * store.height * store.width
    held = sum(getattr(store.plane(product).stat(), "st_blocks", 0) * 512 for product in products)
    free = shutil.disk_usage(store.folder).free
    if need - held > free:
        if not done:
            discard(store.folder)
        raise DataError(
            f"the map needs {need / 1e9:.1f} GB in {store.folder.parent} while it is made, and {free / 1e9:.1f} are "
            "free; make room, or choose another --out"
        )
    return done, other


def write(store: Store, product: Product, bands: UInt8, top: int, left: int) -> None:
    """Write bands (bands, h, w) at a place of their planes."""
    wide = bands.shape[2]
    with store.plane(product).open("r+b", buffering=0) as file:
        for number, band in enumerate(bands):
            at = (number * store.height + top) * store.width + left
            lines = [band] if wide == store.width else list(band)
            for row, line in enumerate(lines):
                _put(file, line.tobytes(), at + row * store.width)
        os.fsync(file.fileno())


def advance(store: Store, job: Manifest, done: int) -> None:
    """Note that steps are done; what was written of them lies on the disk already."""
    file, unfinished = store.folder / "job.json", store.folder / "job.json.new"
    unfinished.write_text(json.dumps({"job": job, "done": done}))
    unfinished.replace(file)


def alike(one: Any, other: Any) -> bool:
    """Whether plain values are the same as JSON: a list is a tuple there, and NaN is NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _hold(file: IO[str], out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has other locks; there two jobs of one map are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BusyError(f"another process is making {out}; wait for it, or choose another --out") from None


def _same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _put(file: FileIO, data: bytes, at: int) -> None:
    file.seek(at)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _job(folder: Path) -> Any:
    """What the unfinished map of a folder is made of; None where it does not say."""
    try:
        return json.loads((folder / "job.json").read_text())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state(store: Store, products: Sequence[Product], job: Manifest) -> tuple[int, bool]:
    try:
        held = json.loads((store.folder / "job.json").read_text())
        same, done = alike(held["job"], job), int(held["done"])
    except FileNotFoundError:
        return 0, False
    except (ValueError, KeyError, TypeError):
        return 0, True
    size = store.height * store.width
    present = all(
        store.plane(product).is_file() and store.plane(product).stat().st_size == product.bands * size
        for product in products
    )
    return (done, False) if same and present else (0, True)

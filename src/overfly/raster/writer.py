"""Write maps: an uncompressed GeoTIFF row by row, which can be resumed, then a Cloud Optimized GeoTIFF."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from filelock import FileLock, Timeout
from jinja2 import Environment
from rasterio import CRS
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile

from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, UInt8
from overfly.data.headers import CACHE, GDAL_ERRORS, open_raster
from overfly.ops.windows import Window
from overfly.raster.manifest import TAG, Manifest, Product, equal_json, is_unfinished, unfinished_folder
from overfly.raster.raster_source import RasterSource

CATEGORIES = Path(__file__).with_name("categories.aux.xml.jinja")
"""GDAL's sidecar with category names and raster attribute table, which rasterio cannot write."""
BLOCK = 512
"""Side of a file's blocks."""
CHECKED_BYTES = 1 << 23
"""Bytes of a written file that are compared at once."""


class BusyError(DataError):
    """Another process is writing the same map."""


class UnwrittenError(DataError):
    """A map could not be written; its finished rows are kept, and the same command resumes it."""


@dataclass(frozen=True)
class UnfinishedMap:
    """An unfinished map: uncompressed GeoTIFFs in a hidden folder, one a product, and the number of finished steps."""

    folder: Path
    source: RasterSource
    classes: Classes
    products: Sequence[Product]
    manifest: Manifest
    temporary: bool = False

    def path(self, product: Product) -> Path:
        """The unfinished file of a product."""
        return self.folder / f"{product.kind}_unfinished.tif"

    def begin(self) -> tuple[int, bool]:
        """Create or resume the files of this manifest; return the finished steps, and whether others were discarded."""
        done, discarded = self._state()
        if done:
            return done, False
        need = sum(len(product.bands) for product in self.products) * self.source.height * self.source.width
        free = shutil.disk_usage(self.folder).free
        if need > free:
            discard(self.folder)
            raise DataError(
                f"the map needs {need / 1e9:.1f} GB in {self.folder.parent} while it is made, and {free / 1e9:.1f} GB "
                "are free; free space there, or choose another --out"
            )
        for name in ("progress.json", "rows.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        for product in self.products:
            self.path(product).unlink(missing_ok=True)  # GDAL does not overwrite a file that it cannot read
            self._create(product)
        return 0, discarded

    def write(self, product: Product, bands: UInt8, top: int, left: int) -> None:
        """Write bands (bands, h, w) at a row and a column, and flush them to the disk."""
        with _open(self.path(product), "r+") as dataset:
            dataset.write(bands, window=Window(top, left, *bands.shape[1:]).ranges)
        self._flush(product)

    def advance(self, done: int, rows: tuple[int, int, int, int], sha256: str) -> None:
        """Record the number of finished steps, whose rows are on the disk, and the digest of the last one's window.

        ``rows`` is that window: its first row, the row after its last, its first column, the column after its last.
        """
        with (self.folder / "rows.jsonl").open("a") as log:
            log.write(json.dumps([*rows, sha256]) + "\n")
        file, new = self.folder / "progress.json", self.folder / "progress.json.new"
        new.write_text(json.dumps({"manifest": self.manifest, "done": done, "headers": self._headers()}))
        new.replace(file)

    def _headers(self) -> list[str]:
        """Digests of the files' bytes before their blocks, which hold georeference, names and colors."""
        digests = []
        for product in self.products:
            blocks = len(product.bands) * -(-self.source.height // BLOCK) * -(-self.source.width // BLOCK)
            with self.path(product).open("rb") as file:
                header = file.read(max(0, os.fstat(file.fileno()).st_size - blocks * BLOCK * BLOCK))
            digests.append(hashlib.sha256(header).hexdigest())
        return digests

    def intact_steps(self, done: int) -> int:
        """Number of the finished steps before the first whose rows differ from their digest."""
        lines = (self.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)[:done]
        with ExitStack() as stack:
            files = [stack.enter_context(_open(self.path(product))) for product in self.products]
            for step, line in enumerate(lines):
                try:
                    top, bottom, left, right, expected = json.loads(line)
                    inside = 0 <= top <= bottom <= self.source.height and 0 <= left < right <= self.source.width
                    digest = hashlib.sha256()
                    for file in files if inside and top < bottom else ():
                        digest.update(file.read(window=((top, bottom), (left, right))))
                except (ValueError, TypeError):
                    return step
                if not inside or digest.hexdigest() != expected:
                    return step
        return len(lines)

    def _state(self) -> tuple[int, bool]:
        try:
            progress = json.loads((self.folder / "progress.json").read_text())
            same = equal_json(progress["manifest"], self.manifest) and progress["headers"] == self._headers()
            done = self.intact_steps(progress["done"]) if same else 0
            rows = (self.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)[:done]
            (self.folder / "rows.jsonl").write_bytes(b"".join(rows))
        except FileNotFoundError:
            return 0, False
        except (ValueError, KeyError, TypeError):
            return 0, True
        return done, not same

    def _create(self, product: Product) -> None:
        """Create a file with all blocks allocated, so that an interrupted write damages no other block."""
        tags = {TAG: json.dumps(self.manifest), "CLASS_NAMES": json.dumps(dict(enumerate(self.classes.names)))}
        settings: dict[str, Any] = {"driver": "GTiff", "dtype": "uint8", "nodata": IGNORE, "bigtiff": "IF_SAFER"}
        settings |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "interleave": "band"}
        settings |= {"height": self.source.height, "width": self.source.width, "count": len(product.bands)}
        with open_raster(self.source.source) as source, _open(self.path(product), "w", **settings) as dataset:
            dataset.update_tags(**tags)
            copy_georeference(source, dataset)
            _describe(dataset, product, self.classes)
        self._flush(product)

    def _flush(self, product: Product) -> None:
        """Flush an unfinished file to the disk, so that a stopped job resumes."""
        if not self.temporary:
            with self.path(product).open("rb") as file:
                os.fsync(file.fileno())


def class_shares(map_: Path, classes: Classes) -> dict[str, float]:
    """Return the share of each class in the valid pixels of a file of class ids, 255 for no data."""
    counts = np.zeros(256, np.int64)
    with _open(map_) as dataset:
        for window in _windows(dataset):
            counts += np.bincount(dataset.read(1, window=window.ranges).ravel(), minlength=256)
    total = max(1, int(counts[:IGNORE].sum()))
    return {name: int(counts[index]) / total for index, name in enumerate(classes.names)}


def copy_georeference(source: Any, target: Any) -> None:
    """Copy the georeference of an open dataset of rasterio to a new one: coordinates, control points, RPC."""
    is_point = source.tags().get("AREA_OR_POINT") == "Point"
    if is_point:
        target.update_tags(AREA_OR_POINT="Point")
    points, crs = source.gcps
    if points:
        right, down = _control_point_offset() if is_point else (0.0, 0.0)
        moved = [GroundControlPoint(p.row - down, p.col - right, p.x, p.y, p.z or 0.0, p.id) for p in points]
        target.gcps = (moved, crs or CRS())
    if source.crs:
        target.crs = source.crs
    if not source.transform.is_identity:
        target.transform = source.transform
    target.update_tags(ns="RPC", **source.tags(ns="RPC"))


@cache
def _control_point_offset() -> tuple[float, float]:
    """Offset (columns, rows) by which GDAL 3.10 shifts control points at pixel centers as it writes and reads."""
    with MemoryFile() as memory, warnings.catch_warnings(action="ignore"):
        with memory.open(driver="GTiff", height=1, width=1, count=1, dtype="uint8") as file:
            file.update_tags(AREA_OR_POINT="Point")
            file.gcps = ([GroundControlPoint(8, 8, 0, 0, 0)] * 4, CRS.from_epsg(4326))
        with memory.open() as file:
            return file.gcps[0][0].col - 8, file.gcps[0][0].row - 8


def _describe(dataset: Any, product: Product, classes: Classes) -> None:
    """Set names, units and colors of the bands."""
    dataset.descriptions = product.bands
    if product.kind != "classes":
        dataset.units = ("%",) * len(product.bands)
        if len(product.bands) > 1:
            dataset.colorinterp = (ColorInterp.undefined,) * len(product.bands)
        return
    colors = dict.fromkeys(range(256), (0, 0, 0, 0))
    dataset.write_colormap(1, colors | {index: (*color, 255) for index, color in enumerate(classes.colors)})
    dataset.update_tags(1, **{f"CLASS_{index}": name for index, name in enumerate(classes.names)})


def write_cog(unfinished: UnfinishedMap, product: Product) -> Path:
    """Write and verify a product's Cloud Optimized GeoTIFF in the unfinished map's folder.

    Blocks of 512, compressed without loss (deflate), with overviews: of class ids by the mode, of others by the mean.
    A sidecar ``.aux.xml`` beside the class ids holds category names and the attribute table.
    """
    result = unfinished.folder / f"{product.kind}.tif"
    if product.kind == "classes":
        template = Environment(autoescape=True).from_string(CATEGORIES.read_text(encoding="utf-8"))
        sidecar = template.render(classes=unfinished.classes)
        Path(f"{unfinished.path(product)}.aux.xml").write_text(sidecar, encoding="utf-8")
    try:
        with warnings.catch_warnings(action="ignore"), rasterio.Env(GDAL_CACHEMAX=CACHE):
            rasterio.shutil.copy(
                str(unfinished.path(product)), str(result), driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=BLOCK,
                OVERVIEW_RESAMPLING="MODE" if product.kind == "classes" else "AVERAGE", BIGTIFF="IF_SAFER",
                NUM_THREADS="ALL_CPUS",
            )  # fmt: skip
            reason = _damage(unfinished, product, result)
    except (*GDAL_ERRORS, OSError) as caught:
        reason = " ".join(str(caught).split()) or type(caught).__name__
    if reason:
        error = incomplete_file(result, reason)
        for part in unfinished.folder.glob(f"{result.name}*"):
            if part.is_file():
                part.unlink()
        raise error
    return result


def incomplete_file(path: Path, reason: str) -> UnwrittenError:
    """Return the error of a file that could not be written whole, with the free space of its folder."""
    free = shutil.disk_usage(path.parent).free
    return UnwrittenError(
        f"{path.name} could not be written whole into {path.parent} ({reason}; {free / 1e6:.1f} MB were free); free "
        "space there and give the same command again: it resumes"
    )


def _damage(unfinished: UnfinishedMap, product: Product, path: Path) -> str:
    """Difference of a written file from the unfinished map; GDAL reports no write errors on closing."""
    sidecar = Path(f"{path}.aux.xml")
    if sidecar.exists() and not sidecar.read_bytes().rstrip().endswith(b"</PAMDataset>"):
        return f"{sidecar.name} is truncated"
    with _open(path, NUM_THREADS="ALL_CPUS") as written, _open(unfinished.path(product)) as original:
        manifest = json.dumps(unfinished.manifest)
        if (written.tags().get(TAG), written.count, written.shape) != (manifest, original.count, original.shape):
            return "its metadata or its size differ"
        levels = len(written.overviews(1))
        if not levels and max(written.shape) > BLOCK:
            return "its overviews are missing"
        for window in _windows(written):
            if not np.array_equal(written.read(window=window.ranges), original.read(window=window.ranges)):
                return "its pixels differ"
    for level in range(levels):
        with _open(path, OVERVIEW_LEVEL=level, NUM_THREADS="ALL_CPUS") as overview:
            for window in _windows(overview):
                columns = range(window.left // BLOCK, -(-(window.left + window.width) // BLOCK))
                row = window.top // BLOCK
                # a block that was never written has no offset, and reads as no data
                if not all(overview.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=1) for column in columns):
                    return "blocks of its overviews are missing"
                overview.read(window=window.ranges)
    return ""


@contextmanager
def _open(path: Path, mode: str = "r", **options: Any) -> Iterator[Any]:
    """Open a file with rasterio, with a small block cache and without warnings."""
    quiet, env = warnings.catch_warnings(action="ignore"), rasterio.Env(GDAL_CACHEMAX=CACHE)
    with quiet, env, rasterio.open(path, mode, **options) as dataset:
        yield dataset


def _windows(dataset: Any) -> Iterator[Window]:
    """Yield windows of whole blocks that cover a dataset, of at most `CHECKED_BYTES`."""
    width = max(1, CHECKED_BYTES // (BLOCK * BLOCK * dataset.count)) * BLOCK
    for top in range(0, dataset.height, BLOCK):
        for left in range(0, dataset.width, width):
            yield Window(top, left, min(BLOCK, dataset.height - top), min(width, dataset.width - left))


@contextmanager
def lock_unfinished(out: Path) -> Iterator[Path]:
    """Create and lock the folder of an unfinished map; raise `BusyError` if another process holds the lock."""
    folder = unfinished_folder(out)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BusyError(f"another process is writing {out}; wait for it, or choose another --out") from None
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    try:
        yield folder
    finally:
        lock.release()


def discard(folder: Path) -> None:
    """Delete an unfinished map."""
    shutil.rmtree(folder, ignore_errors=True)


def discard_stale(out: Path, manifest: Manifest) -> None:
    """Delete the unfinished map of the same manifest that a killed process left beside a finished map."""
    folder = unfinished_folder(out)
    if folder.is_dir() and (not (folder / "progress.json").exists() or is_unfinished(out, manifest)):
        with suppress(DataError), lock_unfinished(out) as locked:
            discard(locked)

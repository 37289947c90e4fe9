"""Maps of the page: made window by window in threads, and read from their files."""

import math
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cachetools import LRUCache
from fastapi import HTTPException

from overfly import __version__
from overfly.core.atomic_files import json_sha256
from overfly.core.classes import Classes
from overfly.core.download import cache_folder
from overfly.core.errors import DataError, OverflyError
from overfly.core.records import IGNORE
from overfly.data.headers import file_stamp, gdal_errors, open_raster
from overfly.exporting.predictor import Floats, Predictor
from overfly.raster.manifest import MapSettings, output_files
from overfly.raster.map_raster import map_raster
from overfly.raster.polygons import write_polygons
from overfly.raster.raster_source import RasterSource
from overfly.raster.writer import class_shares
from overfly.web.images import check_header, display_range, field_errors, inspect_image
from overfly.web.service import WORKERS, Limits, ServedNetwork

MAX_SCENE_MAPS = 64
"""Maps of scenes that are kept; the least recently used one is deleted."""
MAX_OVERVIEW = 2048
"""Longest side of the smallest overview from which an image is shown; without such a one it is copied first."""
PATIENCE = 1e6
"""Seconds for which a map waits for its network."""
PREDICTED = 0.95
"""Share of a map's progress at which its rows are predicted, and its files are written."""


@dataclass(eq=False)
class ServedMap:
    """A map of an image by one or two networks, in files of its folder.

    ``sources`` tell how each network reads the image, ``size`` is the map's share of `Limits.cache`, ``detail`` is the
    error of a failed one, ``shares`` are those of the classes by name, for each network, and ``shown`` is the image for
    display, with the values of black and white.
    """

    key: str
    name: str
    path: Path
    folder: Path
    networks: Sequence[ServedNetwork]
    sources: Sequence[RasterSource]
    settings: MapSettings
    size: float
    state: Literal["running", "finished", "failed"] = "running"
    detail: str = ""
    progress: float = 0.0
    shares: list[Mapping[str, float]] = field(default_factory=list)
    cancelled: bool = False
    shown: tuple[RasterSource, tuple[Any, Any]] | None = None
    future: "Future[None] | None" = None
    _begin: tuple[float, float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self) -> None:
        """Make the files; what is there of a stopped job is resumed."""
        state: Literal["finished", "failed"] = "failed"
        try:
            with field_errors(self.path, self.name):
                self._make()
            state = "finished"
        except (OverflyError, OSError) as error:
            self.detail = str(error).replace(str(self.folder), "the folder of maps")
        except CancelledError:
            self.detail = "the server was stopped; open the image again, and its map resumes"
        except BaseException:
            self.detail = "the server failed; its log has the reason"
            raise
        finally:
            self.state = state

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.sources[0]
        source = replace(first, source=str(self._displayed()), bands=first.bands[:3], nodata=first.nodata[:3])
        self.shown = source, display_range(source)
        for index, network in enumerate(self.networks):
            map_raster(
                self._predictor(network), str(self.path), self.file(index), self.settings, network=network.digest(),
                on_progress=partial(self._advance, index),
            )  # fmt: skip
            self.shares.append(class_shares(self.file(index), self.classes(index)))

    def _displayed(self) -> Path:
        """Return the image, or a copy with overviews where it has none or cannot be read by windows."""
        import rasterio
        from rasterio.shutil import copy

        with open_raster(self.path) as dataset:
            levels = (dataset.overviews(1) or [1]) if dataset.driver in ("GTiff", "JP2OpenJPEG") else [1]
            turned = "ORIENTATION" in dataset.tags(ns="OVERFLY")
            if max(dataset.shape) / max(levels) <= MAX_OVERVIEW and not turned:
                return self.path
            target = self.folder / "image.tif"
            if not target.exists():
                part = target.with_name("image.part.tif")
                with rasterio.Env(GDAL_CACHEMAX=96 * 2**20), gdal_errors(self.path):
                    copy(dataset, str(part), driver="COG", COMPRESS="DEFLATE", LEVEL=1, BIGTIFF="IF_SAFER",
                         OVERVIEW_RESAMPLING="AVERAGE", NUM_THREADS="ALL_CPUS")  # fmt: skip
                part.replace(target)
            return target

    def _predictor(self, network: ServedNetwork) -> Predictor:
        def run(images: Floats) -> Floats:
            if self.cancelled:
                raise CancelledError
            time.sleep(0.001)  # a waiting request has the network first
            return network.probabilities(images, time.monotonic() + PATIENCE)

        return replace(network.predictor(), run=run)

    def _advance(self, index: int, done: int, total: int) -> None:
        self.progress = (index + PREDICTED * done / max(1, total)) / len(self.networks)
        self._begin = self._begin or (time.monotonic(), self.progress)

    @property
    def seconds_left(self) -> float | None:
        """Remaining time, from the progress since the start; None before there is any."""
        start, before = self._begin or (0.0, 1.0)
        if self.state != "running" or self.progress <= before:
            return None
        return (time.monotonic() - start) * (1 - self.progress) / (self.progress - before)

    def classes(self, index: int) -> Classes:
        """Classes of a network."""
        return self.networks[index].predictor().metadata.classes

    def file(self, index: int, kind: str = "classes") -> Path:
        """File of a network's class ids, uncertainty or confidence."""
        return output_files(self.folder / f"{index}.tif", self.settings)[kind]

    def polygons(self, index: int) -> Path:
        """Return the GeoPackage of a network's map; it is written at the first call."""
        path = self.folder / f"{index}.gpkg"
        with self._lock:
            if not path.exists():
                part = write_polygons(self.file(index), path.with_name(f"{index}.part.gpkg"), self.classes(index))
                part.replace(path)
        return path

    def pixel(self, index: int, column: int, row: int) -> list[int | None]:
        """Read a network's class id of a pixel, its probability and uncertainty in percent; None without data."""
        from rasterio.windows import Window

        values = []
        for kind in ("classes", "confidence", "uncertainty"):
            with gdal_errors(self.name), open_raster(self.file(index, kind)) as dataset:
                value = int(dataset.read(1, window=Window(column, row, 1, 1))[0, 0])
            values.append(None if value == IGNORE else value)
        return values

    def coordinates(self, column: int, row: int) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """Return the coordinates (x, y) of a pixel's center, and its longitude and latitude; None if unknown."""
        from rasterio import CRS, Affine
        from rasterio.warp import transform

        place = self.sources[0].georeference
        if place.transform is None:
            return None, None
        x, y = Affine.from_gdal(*place.transform) @ (column + 0.5, row + 0.5)
        degrees: tuple[float, float] | None = None
        with suppress(Exception):  # rasterio has its own errors for a local system
            (longitude,), (latitude,) = transform(CRS.from_wkt(place.crs), "EPSG:4326", [x], [y])
            degrees = (longitude, latitude) if math.isfinite(longitude + latitude) else None
        return (x, y) if math.isfinite(x + y) else None, degrees


class _Maps(LRUCache[str, ServedMap]):
    """Maps by key; the files of an evicted one are deleted."""

    def popitem(self) -> tuple[str, ServedMap]:
        """Remove the least recently used map."""
        key, evicted = super().popitem()
        evicted.cancelled = True
        shutil.rmtree(evicted.folder, ignore_errors=True)
        return key, evicted


class MapStore:
    """The maps of a server, and the threads that make them. Maps of scenes stay in the cache folder."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        size = max(self._limits.cache, 3 * self._limits.pixels)  # the largest map, with two predictions, fits
        self._maps = _Maps(size, getsizeof=lambda stored: stored.size)
        self._uploads: tempfile.TemporaryDirectory[str] | None = None
        self._pools: dict[bool, ThreadPoolExecutor] = {}

    def get(self, key: str) -> ServedMap | None:
        """Return a map, or None if it was evicted."""
        with self._lock:
            return self._maps.get(key)

    def add_upload(self, file: BinaryIO, networks: Sequence[ServedNetwork], settings: MapSettings) -> ServedMap:
        """Store an upload, and begin its map; raise `DataError` if it does not fit a network."""
        with self._lock:
            self._uploads = self._uploads or tempfile.TemporaryDirectory(prefix="overfly-", ignore_cleanup_errors=True)
        key = secrets.token_urlsafe(12)
        folder = Path(self._uploads.name) / key
        folder.mkdir()
        path = folder / "upload"
        try:
            with path.open("wb") as copy:
                shutil.copyfileobj(file, copy)
            with field_errors(path):
                header = check_header(path, pixels=self._limits.pixels)
                size = header.height * header.width * (1 + len(networks))
                return self._add(ServedMap(
                    key, "the image", path, folder, networks, _inspect(path, networks, settings), settings, size
                ))  # fmt: skip
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def add_scene(self, path: Path, networks: Sequence[ServedNetwork], settings: MapSettings) -> ServedMap:
        """Begin, resume or find the map of a scene; raise `DataError` if the scene does not fit a network."""
        with field_errors(path, path.name):
            sources = _inspect(path, networks, settings)
            facts = [str(path.absolute()), file_stamp(path), [network.digest() for network in networks]]
            key = json_sha256([*facts, asdict(settings), __version__])[:16]
            folder, size = cache_folder() / "maps" / key, self._maps.maxsize / MAX_SCENE_MAPS
            return self._add(ServedMap(key, path.name, path, folder, networks, sources, settings, size))

    def _add(self, stored: ServedMap) -> ServedMap:
        with self._lock:
            existing = self._maps.get(stored.key)
            if existing is not None and existing.state != "failed":
                return existing
            if sum(other.state == "running" for other in self._maps.values()) >= self._limits.queue:
                raise HTTPException(429, "the server is busy; try again later", {"retry-after": "10"})
            self._maps.pop(stored.key, None)
            self._maps[stored.key] = stored
            source = stored.sources[0]
            large = source.height * source.width > self._limits.pixels  # a small one does not wait for them
            if large not in self._pools:
                self._pools[large] = ThreadPoolExecutor(1 if large else WORKERS, thread_name_prefix="maps")
            stored.future = self._pools[large].submit(stored.make)
        return stored

    def close(self) -> None:
        """Stop unfinished maps, which resume later if they are of scenes, and delete uploads and their maps."""
        with self._lock:
            for stored in self._maps.values():
                stored.cancelled = True
            for pool in self._pools.values():
                pool.shutdown(wait=True, cancel_futures=True)
            if self._uploads is not None:
                self._uploads.cleanup()
            self._open()


def _inspect(path: Path, networks: Sequence[ServedNetwork], settings: MapSettings) -> list[RasterSource]:
    """Check that an image fits each network; with several, errors name it."""
    sources = []
    for network in networks:
        try:
            sources.append(inspect_image(path, network.predictor().metadata, settings))
        except DataError as error:
            title = network.title if len(networks) > 1 else "the network"
            raise DataError(str(error).replace("the network", title)) from None
    return sources

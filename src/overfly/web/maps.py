"""Maps of the page: made window by window in threads, and read from their files."""

import math
import secrets
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import rasterio
import rasterio.shutil
import rasterio.warp
from cachetools import LRUCache
from fastapi import HTTPException

from overfly import __version__
from overfly.core.atomic_files import atomic_write, json_sha256
from overfly.core.classes import Classes
from overfly.core.download import cache_folder
from overfly.core.errors import DataError, OverflyError, printable
from overfly.core.prefetch import use_one_thread
from overfly.core.records import IGNORE
from overfly.data.headers import CACHE, file_stamp, open_raster
from overfly.evaluation.panels import ValueRange
from overfly.raster.manifest import MapSettings, output_files
from overfly.raster.map_raster import map_raster
from overfly.raster.polygons import write_polygons
from overfly.raster.raster_source import RasterSource
from overfly.raster.writer import class_shares
from overfly.web import service as api
from overfly.web.images import check_header, display_range, field_errors, inspect_image, max_zoom
from overfly.web.service import WORKERS, Limits, MapSummary, PixelSummary, ServedNetwork

MAX_SCENE_MAPS = 64
"""Maps of scenes that are kept; the least recently used one is deleted."""
MAX_OVERVIEW = 2048
"""Longest side of the smallest overview from which an image is shown; without such a one it is copied first."""
PREDICTED = 0.95
"""Share of a map's progress at which its rows are predicted, and its files are written."""
Place = tuple[float, float]


@dataclass(eq=False)
class ServedMap:
    """A map of an image by one or two networks, in files of its folder.

    ``sources`` tell how each network reads the image, ``size`` is the map's share of `Limits.cache`, and ``shown`` is
    the image for display, with the values of black and white.
    """

    summary: MapSummary
    path: Path
    folder: Path
    networks: Sequence[ServedNetwork]
    sources: Sequence[RasterSource]
    settings: MapSettings
    size: float
    stop: threading.Event = field(default_factory=threading.Event)
    shown: tuple[RasterSource, ValueRange | None] | None = None
    future: "Future[None] | None" = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self) -> None:
        """Make the files; what is there of a stopped job is resumed."""
        detail = "the server failed; its log has the reason"
        try:
            with field_errors(self.path, self.summary.name):
                self._make()
            detail = ""
        except (OverflyError, OSError) as error:
            detail = str(error).replace(str(self.folder), "the folder of maps")
        except CancelledError:
            detail = "the server was stopped; open the image again, and its map resumes"
        finally:
            self.summary.detail = detail
            self.summary.state = "failed" if detail else "finished"

    def _make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.sources[0]
        source = replace(first, source=str(self._displayed()), bands=first.bands[:3], nodata=first.nodata[:3])
        self.shown = source, display_range(source)
        predictions = []
        for index, network in enumerate(self.networks):
            map_raster(
                network.limited(stop=self.stop), str(self.path), self.file(index), self.settings,
                network=network.digest(), on_progress=partial(self._advance, index),
            )  # fmt: skip
            shares = class_shares(self.file(index), self.classes(index))
            predictions.append(api.summarize_prediction(network, shares))
        with open_raster(self.file(0)) as dataset:
            rows, columns = (np.linspace(0, side, 9) for side in dataset.shape)
            points = [(row, column) for row in rows for column in columns]
            self.summary.mercator = _transformed(dataset, points, "EPSG:3857")
        self.summary.predictions, self.summary.progress = predictions, 1.0

    def _displayed(self) -> Path:
        """Return the image, or a copy with overviews where it has none or cannot be read by windows."""
        with open_raster(self.path) as dataset:
            levels = (dataset.overviews(1) or [1]) if dataset.driver in ("GTiff", "JP2OpenJPEG") else [1]
            turned = "ORIENTATION" in dataset.tags(ns="OVERFLY")
            if max(dataset.shape) / max(levels) <= MAX_OVERVIEW and not turned:
                return self.path
            target = self.folder / "image.tif"
            if not target.exists():
                with atomic_write(target) as part, rasterio.Env(GDAL_CACHEMAX=CACHE):
                    rasterio.shutil.copy(
                        dataset, str(part), driver="COG", COMPRESS="DEFLATE", LEVEL=1, BIGTIFF="IF_SAFER",
                        OVERVIEW_RESAMPLING="AVERAGE", NUM_THREADS="ALL_CPUS",
                    )  # fmt: skip
            return target

    def _advance(self, index: int, done: int, total: int) -> None:
        self.summary.progress = (index + PREDICTED * done / max(1, total)) / len(self.networks)

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

    def pixel(self, column: int, row: int) -> PixelSummary:
        """Read the coordinates of a pixel of a finished map, and each network's prediction."""
        predictions = []
        for index, network in enumerate(self.networks):
            values: list[int | None] = []
            for kind in ("classes", "confidence", "uncertainty"):
                with open_raster(self.file(index, kind)) as dataset:
                    value = int(dataset.read(1, window=((row, row + 1), (column, column + 1)))[0, 0])
                values.append(None if value == IGNORE else value)
            name = None if values[0] is None else self.classes(index).names[values[0]]
            predictions.append(
                api.PixelPrediction(network=network.key, name=name, probability=values[1], uncertainty=values[2])
            )
        with open_raster(self.file(0)) as dataset:
            own, degrees = (_transformed(dataset, [(row + 0.5, column + 0.5)], crs) for crs in ("", "EPSG:4326"))
        return PixelSummary(coordinates=own and own[0], degrees=degrees and degrees[0], predictions=predictions)


def _transformed(dataset: rasterio.DatasetReader, points: list[Place], crs: str) -> list[Place] | None:
    """Return coordinates of pixel positions (row, column), in the dataset's system or in ``crs``; None if unknown."""
    if dataset.transform.is_identity:
        return None
    with suppress(Exception):  # rasterio has its own errors for a local system
        own = dataset.xy(*zip(*points, strict=True), offset="ul")
        places = rasterio.warp.transform(dataset.crs, crs, *own) if crs else own
        return list(zip(*places, strict=True)) if np.isfinite(places).all() else None  # JSON holds finite numbers
    return None


class _Maps(LRUCache[str, ServedMap]):
    """Maps by key; the files of an evicted one are deleted."""

    def popitem(self) -> tuple[str, ServedMap]:
        """Remove the least recently used map."""
        key, evicted = super().popitem()
        evicted.stop.set()
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
        self._uploads = tempfile.TemporaryDirectory(prefix="overfly-", ignore_cleanup_errors=True)
        self._pools = [ThreadPoolExecutor(count, "maps", use_one_thread) for count in (WORKERS, 1)]

    def get(self, key: str) -> ServedMap | None:
        """Return a map, or None if it was evicted."""
        with self._lock:
            return self._maps.get(key)

    def add_upload(self, file: BinaryIO, networks: Sequence[ServedNetwork], settings: MapSettings) -> ServedMap:
        """Store an upload, and begin its map; raise `DataError` if it does not fit a network."""
        folder = Path(self._uploads.name) / secrets.token_urlsafe(12)
        folder.mkdir()
        path = folder / "upload"
        try:
            with path.open("wb") as copy:
                shutil.copyfileobj(file, copy)
            with field_errors(path):
                header = check_header(path, pixels=self._limits.pixels)
                size = header.height * header.width * (1 + len(networks))
                return self._add(path, folder, networks, settings, name="the image", size=size)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def add_scene(self, path: Path, networks: Sequence[ServedNetwork], settings: MapSettings) -> ServedMap:
        """Begin, resume or find the map of a scene; raise `DataError` if the scene does not fit a network."""
        with field_errors(path, path.name):
            facts = [str(path.absolute()), file_stamp(path), [network.digest() for network in networks]]
            folder = cache_folder() / "maps" / json_sha256([*facts, asdict(settings), __version__])[:16]
            size = self._maps.maxsize / MAX_SCENE_MAPS
            return self._add(path, folder, networks, settings, name=path.name, size=size)

    def _add(
        self, path: Path, folder: Path, networks: Sequence[ServedNetwork], settings: MapSettings, *, name: str,
        size: float,
    ) -> ServedMap:  # fmt: skip
        """Begin a map, whose key is the name of its folder, unless it is there."""
        settings = replace(settings, uncertainty=True, confidence=True)
        sources = _inspect(path, networks, settings)
        first = sources[0]
        summary = MapSummary(
            key=folder.name, name=printable(name), width=first.width, height=first.height,
            max_zoom=max_zoom(first.height, first.width), georeferenced=first.georeferenced,
            meters_per_pixel=None if first.gsd is None else math.sqrt(first.gsd[0] * first.gsd[1]),
        )  # fmt: skip
        stored = ServedMap(summary, path, folder, networks, sources, settings, size)
        with self._lock:
            existing = self._maps.get(folder.name)
            if existing is not None and existing.summary.state != "failed":
                return existing
            if sum(other.summary.state == "running" for other in self._maps.values()) >= self._limits.queue:
                raise HTTPException(429, "the server is busy; try again later", {"retry-after": "10"})
            self._maps.pop(folder.name, None)
            self._maps[folder.name] = stored
            large = first.height * first.width > self._limits.pixels  # a small one does not wait for them
            stored.future = self._pools[large].submit(stored.make)
        return stored

    def close(self) -> None:
        """Stop unfinished maps, which resume later if they are of scenes, and delete uploads and their maps."""
        with self._lock:
            for stored in self._maps.values():
                stored.stop.set()
            for pool in self._pools:
                pool.shutdown(wait=True, cancel_futures=True)
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

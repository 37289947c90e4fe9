"""The networks of a server, and the maps that they predict from uploaded images."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from cachetools import LRUCache
from fastapi import HTTPException
from torch import Tensor

from overfly.core.classes import Classes
from overfly.core.errors import NotFiniteError, OverflyError
from overfly.core.records import UInt8
from overfly.core.spec import PositiveFloat, PositiveInt, Spec
from overfly.data.headers import gdal_errors
from overfly.evaluation.panels import to_rgb
from overfly.exporting.predictor import Floats, Predictor
from overfly.ops.windows import slide_inference
from overfly.raster.manifest import encode, list_products
from overfly.raster.raster_source import Georeference, input_gain
from overfly.training.run import Run
from overfly.web.images import UploadedImage, check_header, read_upload, stored_upload

T = TypeVar("T")
MIN_SIDE = 32
"""Side in pixels that smaller images are padded to."""
WINDOWS = 4
"""Windows of an image in one batch."""
GRACE = 10.0
"""Seconds in which the first line and headers of a request must arrive, and after which a body must not be slow."""
WORKERS = 2
"""Threads that process images: one decodes while another predicts. Their number bounds the memory."""


class RequestTimeoutError(OverflyError):
    """A request that exceeded the time limit of the server."""

    def __init__(self) -> None:
        super().__init__("the request exceeded the time limit; send a smaller image, or try again later")


class Limits(Spec):
    """Limits of a server. Requests that exceed a limit are refused with a status and a message."""

    upload: PositiveInt = 64_000_000
    """Bytes of a request body; 413 above it."""
    pixels: PositiveInt = 9_000_000
    """Pixels of an image, read from its header before it is decoded; 400 above it."""
    seconds: PositiveFloat = 60.0
    """Time to receive a body (then 408), and time to process it (then 503)."""
    rate: PositiveInt = 10_000
    """Bytes per second at which a body must arrive on average after its first `GRACE` seconds; 408 below it."""
    queue: PositiveInt = 16
    """Images that are processed or wait at the same time; 429 above it."""
    connections: PositiveInt = 256
    """Open connections, including those of the live page; 503 above it, and closed at once above four times as many."""
    connections_per_address: PositiveInt = 64
    """Open connections of one address; 429 above it, and closed at once above twice as many."""
    cache: PositiveInt = 60_000_000
    """Pixels of all maps in memory; the least recently used map is evicted first."""
    viewers: PositiveInt = 8
    """Viewers of the live stream at the same time; 429 above it."""


@dataclass(eq=False)
class ServedNetwork:
    """A network of a server, loaded at its first request: ``key`` in addresses, ``title`` and ``about`` on pages."""

    key: str
    title: str
    load: Callable[[], Predictor]
    run: Run | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: Predictor | None = None

    def predictor(self) -> Predictor:
        """Load the network once; raise `OverflyError` if it cannot be loaded."""
        if self.loaded is None:
            with self._lock:
                self.loaded = self.loaded or self.load()
        return self.loaded

    def probabilities(self, images: Floats, deadline: float) -> Floats:
        """Return class probabilities (N, K, H, W) of images (N, C, H, W), float32, one call at a time.

        After the time ``deadline`` of `time.monotonic` the network is not called. Raises `RequestTimeoutError`: the
        network was not free before the deadline.
        """
        predictor = self.predictor()
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise RequestTimeoutError
        try:
            if time.monotonic() > deadline:
                raise RequestTimeoutError
            return predictor(images)
        finally:
            self._lock.release()


@dataclass(frozen=True, eq=False)
class Prediction:
    """The map of one network.

    Attributes:
        title: title of the network.
        classes: names and colors.
        ids: class ids (H, W), 255 where the image has no data.
        uncertainty: entropy of each pixel's class probabilities (H, W), in percent of ln K; 255 without data.
        shares: share of each class in the valid pixels.
    """

    title: str
    classes: Classes
    ids: UInt8
    uncertainty: UInt8
    shares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class StoredMap:
    """An image (H, W, 3), for display, its predictions by network, and its georeference, if any, under a random key."""

    key: str
    image: UInt8
    georeference: Georeference | None
    predictions: Mapping[str, Prediction]

    @property
    def pixels(self) -> int:
        """Number of pixels of the image and its maps."""
        return int(self.image.shape[0] * self.image.shape[1]) * (1 + len(self.predictions))


class InferenceService:
    """The networks (by key), limits, scenes (images on the server's machine, by number) and stored maps of a server."""

    def __init__(self, networks: Sequence[ServedNetwork], limits: Limits, scenes: Sequence[Path] = ()) -> None:
        self.networks = {network.key: network for network in networks}
        self.limits = limits
        self.scenes = list(scenes)
        self._active = 0
        self._pool: ThreadPoolExecutor | None = None
        size = max(limits.cache, 3 * limits.pixels)  # the largest map, with two predictions, fits
        self._maps: LRUCache[str, StoredMap] = LRUCache(size, getsizeof=lambda stored: stored.pixels)
        self._lock = threading.Lock()

    async def run(self, task: Callable[[float], T]) -> T:
        """Run a task in a thread; its argument is its deadline as a time of `time.monotonic`.

        Raises:
            HTTPException: too many tasks run or wait (429).
            RequestTimeoutError: the task exceeded the time limit; its thread continues until it ends.
        """
        if self._active >= self.limits.queue:
            raise HTTPException(429, "the server is busy; try again in a few seconds", {"retry-after": "2"})
        self._pool = self._pool or ThreadPoolExecutor(WORKERS, thread_name_prefix="requests")
        deadline = time.monotonic() + self.limits.seconds
        future = asyncio.get_running_loop().run_in_executor(self._pool, task, deadline)
        self._active += 1
        future.add_done_callback(self._finish)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self.limits.seconds)
        except TimeoutError:
            raise RequestTimeoutError from None

    def _finish(self, future: asyncio.Future[Any]) -> None:
        self._active -= 1
        if not future.cancelled():
            future.exception()  # after a timeout, no request retrieves it

    def predict_upload(
        self, file: BinaryIO, networks: Sequence[ServedNetwork], deadline: float, max_value: float | None = None
    ) -> tuple[UploadedImage, dict[str, Prediction]]:
        """Predict an uploaded PNG, JPEG or TIFF; see `predict_file`."""
        with stored_upload(file) as path:
            return self.predict_file(path, networks, deadline, max_value)

    def predict_file(
        self, path: Path, networks: Sequence[ServedNetwork], deadline: float, max_value: float | None = None
    ) -> tuple[UploadedImage, dict[str, Prediction]]:
        """Predict a file with several networks; return the image with the bands of the first network, and predictions.

        ``deadline`` is a time of `time.monotonic`; ``max_value`` is that of full brightness, None: as in training.
        """
        models = [network.predictor().metadata for network in networks]
        several = len({model.bands for model in models}) > 1
        for network, model in zip(networks, models, strict=True):
            title = network.title if several else "the network"
            header = check_header(path, bands=model.bands, pixels=self.limits.pixels, network=title)
        dtype = header.stored or header.dtype
        gains = [input_gain(path, dtype, model, max_value, option="max_value=") for model in models]
        with gdal_errors(path):
            images = {bands: read_upload(path, header, bands) for bands in {model.bands for model in models}}
        predictions = {
            network.key: predict_image(network, images[model.bands], deadline, gain)
            for network, model, gain in zip(networks, models, gains, strict=True)
        }
        return images[models[0].bands], predictions

    def store(self, image: UploadedImage, predictions: Mapping[str, Prediction]) -> StoredMap:
        """Store maps in memory; the least recently used maps are evicted."""
        stored = StoredMap(secrets.token_urlsafe(12), to_rgb(image.image), image.georeference, predictions)
        with self._lock:
            self._maps[stored.key] = stored
        return stored

    def stored_map(self, key: str) -> StoredMap | None:
        """Return a stored map, or None if it was evicted."""
        with self._lock:
            return self._maps.get(key)

    def close(self) -> None:
        """Unload all networks and end the threads; a later request loads and starts them again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for network in self.networks.values():
            network.loaded = None


def predict_image(network: ServedNetwork, image: UploadedImage, deadline: float, gain: float = 1.0) -> Prediction:
    """Predict an image of any size, in overlapping windows if it is larger than the network's window.

    ``deadline`` is a time of `time.monotonic`; ``gain`` is the factor from the image's values to those of training.
    Raises `NotFiniteError`: the network's probabilities are not finite, and `RequestTimeoutError`: the deadline has
    passed.
    """
    metadata = network.predictor().metadata
    values = np.ascontiguousarray(image.image.transpose(2, 0, 1), dtype=np.float32)
    if gain != 1:
        values = values * np.float32(gain)
    height, width = values.shape[1:]

    def predict_batch(windows: Tensor) -> Tensor:
        return torch.from_numpy(network.probabilities(windows.contiguous().numpy(), deadline))

    if metadata.fixed or max(height, width) > metadata.window:
        probabilities = slide_inference(predict_batch, torch.from_numpy(values), metadata.window, batch=WINDOWS).numpy()
    else:
        below, right = max(0, MIN_SIDE - height), max(0, MIN_SIDE - width)
        padded = np.pad(values, ((0, 0), (0, below), (0, right)), mode="edge") if below or right else values
        probabilities = network.probabilities(padded[None], deadline)[0, :, :height, :width]
    if not np.isfinite(probabilities.sum()):
        raise NotFiniteError("the network's class probabilities are not finite; train it again or use another one")
    products = list_products(len(probabilities), probabilities=False, uncertainty=True)
    ids, uncertainty = (encode(product, probabilities, image.nodata_mask)[0] for product in products)
    counts = np.bincount(ids.ravel(), minlength=256)[: len(metadata.classes)]
    total = max(int(counts.sum()), 1)
    shares = tuple(float(count) / total for count in counts)
    return Prediction(network.title, metadata.classes, ids, uncertainty, shares)

"""The networks and limits of a server, and predictions of single images in memory."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from fastapi import HTTPException
from torch import Tensor

from overfly.core.classes import Classes
from overfly.core.errors import NotFiniteError, OverflyError
from overfly.core.records import UInt8
from overfly.core.spec import PositiveFloat, PositiveInt, Spec
from overfly.data.headers import gdal_errors, open_raster
from overfly.data.raster_grid import read_part
from overfly.exporting.predictor import Floats, Predictor
from overfly.ops.windows import slide_inference
from overfly.raster.manifest import MapSettings, encode, list_products
from overfly.raster.raster_source import Georeference
from overfly.training.run import Run
from overfly.web.images import inspect_image

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
    """Time to receive a body (then 408), and time to predict an image (then 503); maps of the page take any time."""
    rate: PositiveInt = 10_000
    """Bytes per second at which a body must arrive on average after its first `GRACE` seconds; 408 below it."""
    queue: PositiveInt = 16
    """Images that are processed or wait at the same time, and maps; 429 above it."""
    connections: PositiveInt = 256
    """Open connections, including those of the live page; 503 above it, and closed at once above four times as many."""
    connections_per_address: PositiveInt = 64
    """Open connections of one address; 429 above it, and closed at once above twice as many."""
    cache: PositiveInt = 60_000_000
    """Pixels of all uploads and their maps on disk; the least recently used map is deleted first."""
    viewers: PositiveInt = 8
    """Viewers of the live stream at the same time; 429 above it."""


@dataclass(eq=False)
class ServedNetwork:
    """A network of a server, loaded at its first request: ``key`` in addresses, ``title`` and ``about`` on pages.

    ``digest`` returns that of its file, by which its finished maps are found again.
    """

    key: str
    title: str
    load: Callable[[], Predictor]
    run: Run | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    digest: Callable[[], str] = str
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


class Prediction(NamedTuple):
    """Class ids (H, W) of an image, 255 without data, classes, shares by name, and the image's georeference."""

    classes: Classes
    ids: UInt8
    shares: Mapping[str, float]
    georeference: Georeference


class InferenceService:
    """The networks (by key), limits and scenes (images on the server's machine, by number) of a server."""

    def __init__(self, networks: Sequence[ServedNetwork], limits: Limits, scenes: Sequence[Path] = ()) -> None:
        self.networks = {network.key: network for network in networks}
        self.limits = limits
        self.scenes = list(scenes)
        self._active = 0
        self._pool: ThreadPoolExecutor | None = None

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

    def close(self) -> None:
        """Unload all networks and end the threads; a later request loads and starts them again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for network in self.networks.values():
            network.loaded = None


def predict_image(network: ServedNetwork, path: Path, deadline: float, settings: MapSettings) -> Prediction:
    """Predict an image in memory, in overlapping windows if it is larger than the network's window.

    ``deadline`` is a time of `time.monotonic`; ``settings`` are bands, largest value and no data of the image. Raises
    `DataError`: the image does not fit, `NotFiniteError`: the network's probabilities are not finite, and
    `RequestTimeoutError`: the deadline has passed.
    """
    metadata = network.predictor().metadata
    source = inspect_image(path, metadata, settings)
    with gdal_errors(path), open_raster(path) as dataset:
        pixels, nodata_mask = read_part(dataset, source)
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    if source.gain != 1:
        values = values * np.float32(source.gain)
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
    (product,) = list_products(len(probabilities), MapSettings())
    ids = encode(product, probabilities, nodata_mask)[0]
    counts = np.bincount(ids.ravel(), minlength=256)[: len(metadata.classes)]
    shares = dict(zip(metadata.classes.names, (counts / max(int(counts.sum()), 1)).tolist(), strict=True))
    return Prediction(metadata.classes, ids, shares, source.georeference)

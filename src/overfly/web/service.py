"""The networks and limits of a server, and the threads of its requests."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import HTTPException

from overfly.core.errors import OverflyError
from overfly.core.spec import PositiveFloat, PositiveInt, Spec
from overfly.exporting.predictor import Floats, Predictor
from overfly.training.run import Run

T = TypeVar("T")
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

    def limited(self, deadline: float | None = None, stop: threading.Event | None = None) -> Predictor:
        """Return the network with `probabilities` before a time; without one, after waiting requests, until ``stop``.

        It raises `RequestTimeoutError` after ``deadline``, and `CancelledError` when ``stop`` is set.
        """

        def run(images: Floats) -> Floats:
            if stop is not None and stop.wait(0.001):  # a waiting request has the network first
                raise CancelledError
            return self.probabilities(images, time.monotonic() + 1e6 if deadline is None else deadline)

        return replace(self.predictor(), run=run)

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

"""Bounds of a server: sizes, times, and the pixels that are worked on at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from overfly.core.errors import OverflyError
from overfly.core.spec import Count, Positive, Spec


class RequestTimeoutError(OverflyError):
    """A request that exceeded the time limit of the server."""

    def __init__(self) -> None:
        super().__init__("the request exceeded the time limit; send a smaller image, or try again later")


class Limits(Spec):
    """Bounds of a server. A request beyond one is refused with a status and a message."""

    upload: Count = 64_000_000
    """Bytes of a request body; beyond it 413."""
    pixels: Count = 9_000_000
    """Pixels of an image, read from its header before it is decoded; beyond it 400."""
    seconds: Positive = 60.0
    """Time to receive a body (then 408), and time to process it (then 503)."""
    queue: Count = 16
    """Images that are processed or wait at the same time; beyond it 429."""
    connections: Count = 256
    """Open connections, those of the live page included; beyond it 503."""
    cache: Count = 60_000_000
    """Pixels of all maps kept in memory; the least recently used is evicted first."""
    viewers: Count = 8
    """Viewers of the live stream at the same time; beyond it 429."""


class PixelBudget:
    """A bound on the pixels that are processed at the same time, so that large images do not exhaust the memory."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, pixels: int, deadline: float) -> Iterator[None]:
        """Reserve pixels, at most the whole budget, while the context lasts.

        Args:
            pixels: number to reserve.
            deadline: time of `time.monotonic` at which to give up.

        Raises:
            RequestTimeoutError: the pixels were not free before the deadline.
        """
        wanted = min(pixels, self.pixels)
        with self._changed:
            timeout = max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: self._used + wanted <= self.pixels, timeout):
                raise RequestTimeoutError
            self._used += wanted
        try:
            yield
        finally:
            with self._changed:
                self._used -= wanted
                self._changed.notify_all()


__all__ = ["Limits", "PixelBudget", "RequestTimeoutError"]

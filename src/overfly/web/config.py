"""What a server takes from outside, and what it holds at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from overfly.core.errors import OverflyError
from overfly.core.spec import Count, NonNegative, Positive, Spec


class LateError(OverflyError):
    """A request that took longer than it may."""

    def __init__(self) -> None:
        super().__init__(
            "this took longer than a request may; send a smaller image, or try again when less is going on"
        )


class Limits(Spec):
    """Bounds of a server; whoever exceeds one gets an answer that says so."""

    upload: Count = 64_000_000
    """Bytes of a request."""
    pixels: Count = 9_000_000
    """Pixels of an image, seen in its header before it is decoded."""
    seconds: Positive = 60.0
    """Time that a request may take, from its first byte to its answer."""
    queue: Count = 16
    """Requests that are read, waiting or worked on at the same time; the next is answered 429."""
    batch: Count = 8
    """Images of one size that go through the network together."""
    wait: NonNegative = 0.004
    """Seconds that the first of a batch waits for others."""
    kept: Count = 60_000_000
    """Pixels of the maps that are kept to be looked at, all together; the oldest goes first."""
    streams: Count = 8
    """Watchers of the live picture at the same time."""


class Room:
    """Pixels that may be worked on at the same time, so that many large images do not exceed the memory together."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int, deadline: float) -> Iterator[None]:
        """Hold room for some pixels, at most all there is, until the block ends.

        Args:
            pixels: wanted.
            deadline: time of `time.monotonic` at which to give up.

        Raises:
            LateError: there was no room in time.
        """
        wanted = min(pixels, self.pixels)
        with self._changed:
            there = self._changed.wait_for(
                lambda: self._taken + wanted <= self.pixels, max(0.0, deadline - time.monotonic())
            )
            if not there:
                raise LateError
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


__all__ = ["LateError", "Limits", "Room"]

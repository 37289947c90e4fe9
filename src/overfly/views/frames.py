"""The live picture: a place where one thread puts frames and any number of watchers take the newest.

Whoever makes frames, such as `overfly watch`, needs three calls and knows nothing of the web server:

    frames = Frames()
    server = start(application(networks, frames=frames), "127.0.0.1", 8000)   # overfly.views.server
    frames.put(jpeg)        # bytes of a whole JPEG; from any thread, as often as there is a frame; never blocks
    frames.close()          # the film is over: watchers' connections end

A frame that nobody took before the next one came is dropped: watchers see the newest and never lag behind. The server
hands them out at ``/stream`` as ``multipart/x-mixed-replace``, which every browser shows in an ``<img>``, and the page
``/live`` holds one.
"""

from __future__ import annotations

import threading
from typing import NamedTuple


class Frame(NamedTuple):
    """A frame and its number, counted from 1."""

    number: int
    jpeg: bytes


class Frames:
    """The newest frame, handed from one thread to others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._closed = False

    def put(self, jpeg: bytes) -> None:
        """Show a frame, in place of the one before.

        Args:
            jpeg: the bytes of a whole JPEG file.
        """
        with self._changed:
            self._newest = Frame(1 if self._newest is None else self._newest.number + 1, jpeg)
            self._changed.notify_all()

    def newest(self, after: int = 0) -> Frame | None:
        """The newest frame, if its number is above ``after``; returns at once."""
        with self._changed:
            return self._newest if self._newest is not None and self._newest.number > after else None

    def wait(self, after: int = 0, timeout: float | None = None) -> Frame | None:
        """The newest frame as soon as its number is above ``after``; None after ``timeout`` seconds or the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._later(after), timeout)
            return self._newest if self._later(after) else None

    def close(self) -> None:
        """There will be no more frames."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the film is over."""
        return self._closed

    def _later(self, after: int) -> bool:
        return self._newest is not None and self._newest.number > after


__all__ = ["Frame", "Frames"]

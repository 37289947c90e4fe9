"""Limits of a server."""

from __future__ import annotations

from overfly.core.errors import OverflyError
from overfly.core.spec import Count, Positive, Spec


class RequestTimeoutError(OverflyError):
    """A request that exceeded the time limit of the server."""

    def __init__(self) -> None:
        super().__init__("the request exceeded the time limit; send a smaller image, or try again later")


class Limits(Spec):
    """Limits of a server. A request beyond one is refused with a status and a message."""

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


__all__ = ["Limits", "RequestTimeoutError"]

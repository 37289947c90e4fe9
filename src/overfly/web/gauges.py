"""What a server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Gauges:
    """Counters of one server, in a registry of its own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        """Begin at zero.

        Args:
            waiting: images that wait for a network now.
        """
        own = self.registry = CollectorRegistry()
        self.requests = Counter("overfly_requests", "Requests answered.", ("method", "route", "status"), registry=own)
        self.seconds = Histogram(
            "overfly_request_seconds",
            "From a request's first byte to its answer's last.",
            ("route",),
            buckets=SECONDS,
            registry=own,
        )
        self.refused = Counter("overfly_refused", "Requests answered 429.", registry=own)
        self.batches = Histogram(
            "overfly_batch_images",
            "Images that went through a network together.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=own,
        )
        self.pixels = Counter("overfly_pixels", "Pixels of images that were predicted.", registry=own)
        Gauge("overfly_waiting_images", "Images that wait for a network.", registry=own).set_function(waiting)

    def text(self) -> bytes:
        """All of it, in the format that Prometheus reads."""
        return generate_latest(self.registry)


class Meter:
    """An ASGI application whose requests are counted by route, method and status."""

    def __init__(self, app: ASGIApp, gauges: Gauges) -> None:
        self.app, self.gauges = app, gauges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noticed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noticed)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS") else "other"
            self.gauges.requests.labels(method, route, str(status)).inc()
            if route != "/stream":
                self.gauges.seconds.labels(route).observe(time.perf_counter() - start)


__all__ = ["Gauges", "Meter"]

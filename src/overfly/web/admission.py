"""How much comes in: bytes of a request, seconds to read it, and how many at the same time; then 413, 408 and 429."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overfly.web.config import Limits

DRAINED_FOR = 5.0
"""Seconds that a request that found no room is read for, so that its sender hears the answer."""


class Admission:
    """An ASGI application that takes a bounded number of requests with a body at the same time.

    Attributes:
        inside: such requests now.
        usual: seconds that one took lately.
    """

    def __init__(self, app: ASGIApp, limits: Limits, on_refused: Callable[[], None] | None = None) -> None:
        """Wrap an application.

        Args:
            app: what is asked.
            limits: the bounds.
            on_refused: told of each 429.
        """
        self.app, self.limits = app, limits
        self.on_refused = on_refused or (lambda: None)
        self.inside = 0
        self.usual = 1.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.upload:
            await self._too_much(scope, receive, send)
            return
        if self.inside >= self.limits.queue:
            self.on_refused()
            await self._drain(receive)
            again = min(60, max(1, math.ceil(self.usual * self.inside)))
            words = f"the server has its hands full; try again in {again} s"
            await JSONResponse({"detail": words}, 429, {"retry-after": str(again)})(scope, receive, send)
            return
        self.inside += 1
        start = time.monotonic()
        try:
            await self._taken(scope, receive, send)
        finally:
            self.inside -= 1
            self.usual = 0.9 * self.usual + 0.1 * (time.monotonic() - start) / max(1, self.inside + 1)

    async def _taken(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, its body counted while it is read."""
        deadline = time.monotonic() + self.limits.seconds
        read, whole, refuse = 0, False, None
        gone: Message = {"type": "http.disconnect"}

        async def counted() -> Message:
            nonlocal read, whole, refuse
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                refuse = self._too_slow
                return gone
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self.limits.upload:
                refuse = self._too_much
                return gone
            return message

        async def passed_on(message: Message) -> None:
            if refuse is None:  # what the application says of a body that was cut off is not the reason
                await send(message)

        await self.app(scope, counted, passed_on)
        if refuse is not None:
            await refuse(scope, receive, send)

    async def _too_slow(self, scope: Scope, receive: Receive, send: Send) -> None:
        words = f"the request did not arrive within {self.limits.seconds:g} s; send it again, or a smaller one"
        await JSONResponse({"detail": words}, 408, {"connection": "close"})(scope, receive, send)

    async def _too_much(self, scope: Scope, receive: Receive, send: Send) -> None:
        words = (
            f"a request may have {self.limits.upload / 1e6:g} MB; send less, or use overfly predict for large rasters"
        )
        await JSONResponse({"detail": words}, 413, {"connection": "close"})(scope, receive, send)

    async def _drain(self, receive: Receive) -> None:
        """Read and forget a body."""
        try:
            async with asyncio.timeout(DRAINED_FOR):
                while (message := await receive()).get("more_body", False) and message["type"] == "http.request":
                    pass
        except TimeoutError:
            return


__all__ = ["Admission"]

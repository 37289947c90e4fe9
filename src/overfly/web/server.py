"""The web server: look at runs and predictions in a browser, or ask by HTTP. Put together here, in parts elsewhere."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

from overfly.core.errors import OverflyError, RecipeError
from overfly.video.player import LatestFrame
from overfly.web.admission import Admission
from overfly.web.config import LateError, Limits
from overfly.web.gauges import Meter
from overfly.web.middleware import Guard
from overfly.web.networks import Network
from overfly.web.pages import router as html_router
from overfly.web.routes import router
from overfly.web.service import Desk

STATIC = Path(__file__).parent / "static"
DESCRIPTION = """
Semantic segmentation of aerial imagery. Send an image to **/predict** and get its map; every answer that is no map is
JSON with a sentence under `detail`.
"""


def application(
    networks: Sequence[Network],
    *,
    limits: Limits | None = None,
    token: str | None = None,
    screen: LatestFrame | None = None,
    scenes: Sequence[Path] = (),
) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        networks: the networks to serve, the first is the default; without any, only the stream's pages are served.
        limits: its bounds; left out, `Limits` by its defaults.
        token: that clients must know; None: it answers to 127.0.0.1 and localhost alone.
        screen: holds the live picture, where something makes one.
        scenes: pictures on this machine that the page lists.
    """
    bounds = limits or Limits()
    desk = Desk(networks, bounds, scenes)

    @asynccontextmanager
    async def alive(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        desk.close()

    app = FastAPI(
        title="overfly",
        version=version("overfly"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=alive,
    )
    app.include_router(router(desk, screen), tags=["api"])
    app.include_router(html_router(desk, screen), include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(OverflyError, _sentence)
    app.add_exception_handler(RequestValidationError, _misshapen)
    return Guard(Meter(Admission(app, bounds, desk.gauges.refused.inc), desk.gauges), token)


async def _sentence(request: Request, error: Exception) -> JSONResponse:
    """A mistake of the client's, or a request that took too long."""
    del request
    if isinstance(error, LateError):
        return JSONResponse({"detail": str(error)}, 503, {"retry-after": "5"})
    return JSONResponse({"detail": str(error)}, 400)


PARTS = {"body": "form field", "query": "parameter", "path": "part of the address", "header": "header"}


async def _misshapen(request: Request, error: Exception) -> JSONResponse:
    """A request that lacks something, or has a value that is none: in a sentence, without the value."""
    del request
    found = error.errors() if isinstance(error, RequestValidationError) else ()
    wrong = []
    for each in found:
        part, *names = [str(name) for name in each["loc"]]
        what = f"the {PARTS.get(part, part)} {'.'.join(names)}" if names else f"the request's {part}"
        says = "is missing" if each["type"] == "missing" else f"is wrong ({each['msg'][:1].lower()}{each['msg'][1:]})"
        wrong.append(f"{what} {says}")
    return JSONResponse({"detail": f"{' and '.join(wrong)}; /docs describes what a request needs"}, 422)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes one that is free.

    Raises:
        RecipeError: the address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise RecipeError(
            f"{host}:{port} cannot be served ({error.strerror or error}); give another --port, or an address of this "
            "machine as --host"
        ) from None
    return found


def address(place: socket.socket) -> str:
    """What to type into a browser."""
    host, port = place.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _server(app: ASGIApp, **settings: Any) -> uvicorn.Server:
    settings = {"log_level": "warning", "timeout_graceful_shutdown": 3, "server_header": False, **settings}
    return uvicorn.Server(uvicorn.Config(app, **settings))


def run(app: ASGIApp, place: socket.socket) -> None:
    """Serve until the process is told to stop."""
    _server(app).run(sockets=[place])


class Running:
    """A server in a thread of this process."""

    def __init__(self, app: ASGIApp, place: socket.socket) -> None:
        self.address = address(place)
        self._place = place
        self._server = _server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [place]}, daemon=True)
        self._thread.start()
        until = time.monotonic() + 30
        while not self._server.started and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)

    def watched(self) -> bool:
        """Return whether a client has an open connection."""
        return bool(self._server.server_state.connections)

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        self._server.should_exit = True
        self._thread.join()
        self._place.close()


def start(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> Running:
    """Serve in a thread, beside something else that this process does.

    Args:
        app: what `application` made.
        host: the address.
        port: 0 takes one that is free; see ``address`` of what comes back.

    Raises:
        RecipeError: the address is taken.
    """
    return Running(app, bound(host, port))


@contextmanager
def serve_stream(screen: LatestFrame, port: int = 0) -> Iterator[str]:
    """Serve the live page of a stream on 127.0.0.1, without any network, while the context lasts.

    Args:
        screen: holds the newest overlay; close it with the reason before the context ends, so that the page shows it.
        port: 0 takes a free port.

    Yields:
        The address of the page.

    Raises:
        RecipeError: the port is in use.
    """
    running = start(application([], screen=screen), port=port)
    try:
        yield f"{running.address}live"
    finally:
        time.sleep(1.5 if screen.closed and running.watched() else 0)  # pages ask every second how the stream ended
        running.stop()


__all__ = ["Running", "address", "application", "bound", "run", "serve_stream", "start"]

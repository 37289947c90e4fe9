"""Build the web application, and serve it in this process or in a background thread."""

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
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.middleware.trustedhost import TrustedHostMiddleware

from overfly.core.errors import OverflyError, RecipeError
from overfly.video.player import LatestFrame
from overfly.web.middleware import AccessMiddleware, BodyLimitMiddleware
from overfly.web.pages import page_router
from overfly.web.routes import api_router
from overfly.web.service import InferenceService, Limits, RequestTimeoutError, ServedNetwork

STATIC = Path(__file__).parent / "static"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
REQUEST_PARTS = {"body": "form field", "query": "parameter", "path": "part of the address", "header": "header"}
DESCRIPTION = """
Semantic segmentation of aerial imagery. Send an image to **/predict** for its map. Errors are JSON with a message under
`detail`.
"""


def application(
    networks: Sequence[ServedNetwork], *, limits: Limits | None = None, token: str | None = None,
    latest_frame: LatestFrame | None = None, scenes: Sequence[Path] = (),
) -> FastAPI:  # fmt: skip
    """Build the server as an ASGI application.

    Args:
        networks: the networks to serve, the default first; if empty, only the pages of the stream are served.
        limits: limits of requests; None: the defaults of `Limits`.
        token: required from clients; None: only the host names 127.0.0.1 and localhost are accepted.
        latest_frame: newest overlay of the live stream; None without a stream.
        scenes: images on this machine that the page lists.
    """
    limits = limits or Limits()
    service = InferenceService(networks, limits, scenes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        service.close()

    app = FastAPI(
        title="overfly", version=version("overfly"), description=DESCRIPTION, docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    app.include_router(api_router(service, latest_frame), tags=["api"])
    app.include_router(page_router(service, latest_frame), include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(OverflyError, _handle_error)
    app.add_exception_handler(RequestValidationError, _handle_invalid_request)
    app.add_middleware(BodyLimitMiddleware, limits=limits)
    app.add_middleware(AccessMiddleware, token=token)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    metrics = Instrumentator(
        should_group_status_codes=False, excluded_handlers=["^/stream$"], registry=CollectorRegistry()
    )
    metrics.instrument(app, metric_namespace="overfly").expose(app, include_in_schema=False)
    return app


async def _handle_error(request: Request, error: Exception) -> JSONResponse:
    del request
    if isinstance(error, RequestTimeoutError):
        return JSONResponse({"detail": str(error)}, 503, {"retry-after": "5"})
    return JSONResponse({"detail": str(error)}, 400)


async def _handle_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Name each missing or invalid field, without its value."""
    del request
    problems = []
    for invalid in error.errors() if isinstance(error, RequestValidationError) else ():
        part, *names = [str(name) for name in invalid["loc"]]
        field = f"the {REQUEST_PARTS.get(part, part)} {'.'.join(names)}" if names else f"the request's {part}"
        message = (
            "missing" if invalid["type"] == "missing" else f"invalid ({invalid['msg'][:1].lower()}{invalid['msg'][1:]})"
        )
        problems.append(f"{field} is {message}")
    return JSONResponse({"detail": f"{' and '.join(problems)}; /docs describes what a request needs"}, 422)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 selects a free port. Raise `RecipeError` if port or address cannot be used."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise RecipeError(
            f"cannot serve on {host}:{port} ({error.strerror or error}); give another --port, or an address of this "
            "machine as --host"
        ) from None
    return bound


def socket_url(bound: socket.socket) -> str:
    """Return the address of a bound socket for a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _server(app: FastAPI, limits: Limits | None = None) -> uvicorn.Server:
    settings: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 3, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, limit_concurrency=(limits or Limits()).connections, **settings))


def run(app: FastAPI, bound: socket.socket, limits: Limits | None = None) -> None:
    """Serve until the process is interrupted."""
    _server(app, limits).run(sockets=[bound])


class BackgroundServer:
    """A server in a thread of this process; ``address`` is the URL of its first page."""

    def __init__(self, app: FastAPI, bound: socket.socket) -> None:
        self.address = socket_url(bound)
        self._socket = bound
        self._server = _server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, daemon=True)
        self._thread.start()
        until = time.monotonic() + 30
        while not self._server.started and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        """Stop the server and wait for its thread."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def start(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> BackgroundServer:
    """Serve in a background thread; port 0 selects a free port."""
    return BackgroundServer(app, bind(host, port))


@contextmanager
def serve_stream(latest_frame: LatestFrame, port: int = 0) -> Iterator[str]:
    """Serve only the live page of a stream on 127.0.0.1 within the context; yield its address.

    Close ``latest_frame`` with the reason before the context ends, so that the page shows it. Port 0 is a free port.
    """
    running = start(application([], latest_frame=latest_frame), port=port)
    try:
        yield f"{running.address}live"
    finally:
        if latest_frame.closed and running.connections:
            time.sleep(1.5)  # pages poll the state of a stream every second
        running.stop()

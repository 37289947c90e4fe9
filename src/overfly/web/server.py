"""Build the web application and its middleware, and serve it in this process or in a background thread."""

import asyncio
import hashlib
import hmac
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from h11 import IDLE
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from overfly import __version__
from overfly.core.errors import OverflyError, RecipeError, printable
from overfly.video.player import LatestFrame
from overfly.web.maps import MapStore
from overfly.web.routes import api_router, page_router
from overfly.web.service import GRACE, InferenceService, Limits, RequestTimeoutError, ServedNetwork

STATIC = Path(__file__).parent / "static"
BASE_MAP = r"https?://[\w.:\[\]-]+/(?=.*\{z\})(?=.*\{x\})(?=.*\{y\})\S+"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
REQUEST_PARTS = {"body": "form field", "query": "parameter", "path": "part of the address", "header": "header"}
DESCRIPTION = """
Semantic segmentation of aerial imagery. Send an image to **/predict** for its map. Errors are JSON with a message under
`detail`.
"""


def application(
    networks: Sequence[ServedNetwork], *, limits: Limits | None = None, token: str | None = None,
    latest_frame: LatestFrame | None = None, scenes: Sequence[Path] = (), base_map: str | None = None,
) -> FastAPI:  # fmt: skip
    """Build the server as an ASGI application.

    The first network is the default; without any, only the pages of the stream are served. ``limits`` None are the
    defaults of `Limits`. A ``token`` is required from clients; without one, only the host names 127.0.0.1 and localhost
    are accepted. ``latest_frame`` is the newest overlay of the live stream, ``scenes`` are images on this machine that
    the page lists, ``base_map`` is the address of tiles in Web Mercator, as of `overfly serve`.
    """
    if base_map is not None and not re.fullmatch(BASE_MAP, base_map, re.ASCII):
        example = "https://tiles.example.org/{z}/{x}/{y}.png"
        raise RecipeError(f"--base-map must be an address like {example}, got {printable(base_map)}")
    limits = limits or Limits()
    service, store = InferenceService(networks, limits, scenes), MapStore(limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await asyncio.to_thread(store.close)
        service.close()

    app = FastAPI(
        title="overfly", version=__version__, description=DESCRIPTION, docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    app.include_router(api_router(service, store, latest_frame), tags=["api"])
    app.include_router(page_router(service, store, latest_frame, base_map), include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(OverflyError, _handle_error)
    app.add_exception_handler(RequestValidationError, _handle_invalid_request)
    app.add_middleware(BodyLimitMiddleware, limits=limits)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    app.add_middleware(AccessMiddleware, token=token, base_map=base_map)
    meter = Instrumentator(
        should_group_status_codes=False, excluded_handlers=["^/stream$"], registry=CollectorRegistry()
    )
    meter.instrument(app, metric_namespace="overfly").expose(app, include_in_schema=False)
    return app


async def _handle_error(request: Request, error: Exception) -> JSONResponse:
    del request
    timeout = isinstance(error, RequestTimeoutError)
    return JSONResponse({"detail": str(error)}, 503 if timeout else 400, {"retry-after": "5"} if timeout else None)


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


class Connection(H11Protocol):
    """A connection, closed if headers are late; answered 429 if its address has too many, 503 if the server has."""

    limits = Limits()
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connections of the same address."""
        super().connection_made(transport)
        host = (self.client or ("",))[0]
        count = sum(isinstance(other, Connection) and (other.client or ("",))[0] == host for other in self.connections)
        limits, total = self.limits, len(self.connections)
        if count > 2 * limits.connections_per_address or total > 4 * limits.connections:
            transport.abort()
        elif count > limits.connections_per_address:
            self.app = _refuse(429, "too many connections from this address; close some, or try again later")
        elif total > limits.connections:
            self.app = _refuse(503, "the server has too many connections; try again later")
        self._limit_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request; the application, which may read its body already, sends nothing more."""
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request."""
        super().data_received(data)
        self._limit_headers()

    def _limit_headers(self) -> None:
        """Close the connection unless the headers of the request that has begun are complete in time."""
        if self.conn.their_state is not IDLE and self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        elif self.conn.their_state is IDLE and self.deadline is None:
            self.deadline = self.loop.call_later(GRACE, self.transport.abort)


def _server(app: FastAPI, limits: Limits | None = None) -> uvicorn.Server:
    limits = limits or Limits()
    settings: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 3, "server_header": False}
    http = type("LimitedConnection", (Connection,), {"limits": limits})
    return uvicorn.Server(uvicorn.Config(app, http=http, **settings))


def run(app: FastAPI, bound: socket.socket, limits: Limits | None = None) -> None:
    """Serve until the process is interrupted."""
    _server(app, limits).run(sockets=[bound])


class BackgroundServer:
    """A server in a thread of this process; ``address`` is the URL of its first page."""

    def __init__(self, app: FastAPI, bound: socket.socket, limits: Limits | None = None) -> None:
        self.address = socket_url(bound)
        self._socket = bound
        self._server = _server(app, limits)
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


def start(app: FastAPI, host: str = "127.0.0.1", port: int = 0, limits: Limits | None = None) -> BackgroundServer:
    """Serve in a background thread; port 0 selects a free port."""
    return BackgroundServer(app, bind(host, port), limits)


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


COOKIE = "overfly"
PUBLIC_PATHS = ("/health",)
"""Paths without a token."""
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob: "
    "{}; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class BodyLimitMiddleware:
    """Refuse request bodies that are too large (413) or arrive too slowly (408)."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting and timing its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        refusal = self._too_large() if length.isdecimal() and int(length) > self.limits.upload else None
        started = time.monotonic()
        size, complete = 0, not length and "transfer-encoding" not in headers  # HTTP: without both, the body is empty

        async def bounded_receive() -> Message:
            nonlocal size, complete, refusal
            if complete:
                return await receive()
            until = min(started + self.limits.seconds, started + GRACE + size / self.limits.rate)
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                refusal = _refuse(
                    408,
                    f"the body arrived at less than {self.limits.rate} bytes a second, or not within "
                    f"{self.limits.seconds:g} s; send a smaller one",
                )
                return {"type": "http.disconnect"}
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.limits.upload:
                refusal = self._too_large()
                return {"type": "http.disconnect"}
            return message

        async def bounded_send(message: Message) -> None:
            if refusal is None:
                await send(message)

        if refusal is None:
            await self.app(scope, bounded_receive, bounded_send)
        if refusal is not None:
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)

    def _too_large(self) -> Response:
        megabytes = self.limits.upload / 1e6
        return _refuse(413, f"the body exceeds {megabytes:g} MB; send less, or use overfly predict for large rasters")


class AccessMiddleware:
    """Check origin and token (None: any) of requests; set security headers, which permit images of ``base_map``."""

    def __init__(self, app: ASGIApp, token: str | None = None, base_map: str | None = None) -> None:
        self.image_origin = "/".join((base_map or "").split("/")[:3])
        self.app = app
        self.token = token
        self.session = hmac.new(secrets.token_bytes(32), b"session", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value.format(self.image_origin)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, send_protected)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may see two requests, or one
            response = _refuse(400, "the request has both content-length and transfer-encoding; send one of them")
            response.headers["connection"] = "close"
            return response
        origin = re.sub("^[a-z]+://", "", headers.get("origin", ""))
        if scope["method"] not in ("GET", "HEAD") and origin and origin != headers.get("host"):
            return _refuse(403, "another web site must not send requests to this server")
        if self.token is None or scope["path"] in PUBLIC_PATHS:
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(token.strip(), self.token):
            return None
        if _equal(HTTPConnection(scope).cookies.get(COOKIE, ""), self.session):
            return None
        return self._login(scope)

    def _login(self, scope: Scope) -> Response:
        """Set a session cookie if the address contains the token, and redirect to the address without it."""
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        token = next((value for name, value in pairs if name == "token"), "")
        if scope["method"] not in ("GET", "HEAD") or not _equal(token, self.token or ""):
            response = _refuse(401, "this server requires a token: a header Authorization: Bearer …, or /?token=… once")
            response.headers["www-authenticate"] = "Bearer"
            return response
        query = urlencode([(name, value) for name, value in pairs if name != "token"])
        redirect = RedirectResponse("/" + scope["path"].lstrip("/\\") + (f"?{query}" if query else ""), 303)
        redirect.set_cookie(COOKIE, self.session, httponly=True, samesite="strict", secure=scope["scheme"] == "https")
        return redirect


def _equal(given: str, expected: str) -> bool:
    """Compare two texts in constant time."""
    digests = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"detail": message}, status)

"""ASGI middleware: limits of request bodies, and access by origin and token. Starlette checks hosts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overfly.web.service import Limits

COOKIE = "overfly"
PUBLIC_PATHS = ("/health",)
"""Paths without a token."""
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
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
        length = Headers(scope=scope).get("content-length", "")
        refusal = self._too_large() if length.isdigit() and int(length) > self.limits.upload else None
        deadline = time.monotonic() + self.limits.seconds
        size, complete = 0, False

        async def bounded_receive() -> Message:
            nonlocal size, complete, refusal
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                refusal = _refuse(408, f"the body did not arrive within {self.limits.seconds:g} s; send a smaller one")
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
    """Check origin and token of every request, and set security headers; ``token`` None requires no token."""

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
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
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, send_protected)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin and (_netloc(origin) or None) != headers.get("host"):
            return _refuse(403, "another web site must not send requests to this server")
        if self.token is None or scope["path"] in PUBLIC_PATHS:
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(token.strip(), self.token):
            return None
        if _equal(_cookie(headers.get("cookie", "")), self.session):
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


def _netloc(address: str) -> str | None:
    try:
        return urlsplit(address).netloc
    except ValueError:
        return None


def _cookie(text: str) -> str:
    try:
        cookie = SimpleCookie(text).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"detail": message}, status)

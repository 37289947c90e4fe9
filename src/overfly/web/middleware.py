"""Who may ask: the right host, the right origin and, where there is one, the token; and what every answer forbids."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "overfly"
OPEN = ("/health",)
"""What needs no token, for machines that look whether the server is alive."""
LOCAL = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """An ASGI application behind a host list, a check of origins and a token."""

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        """Wrap an application.

        Args:
            app: what is guarded.
            token: that a client must know; None: the server is local, and only asked by local names.
        """
        self.app = app
        self.token = token
        self.session = hmac.new(secrets.token_bytes(32), b"session", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, safely)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        wrong = self._wrong_place(scope["method"], headers)
        if wrong:
            return _told(403, wrong)
        if self.token is None or scope["path"] in OPEN:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._same(given.strip(), self.token):
            return None
        if self._same(_cookie(headers.get("cookie", "")), self.session):
            return None
        return self._by_query(scope)

    def _wrong_place(self, method: str, headers: Headers) -> str:
        """What is wrong with the name that a request calls this server by, or with where it comes from; or nothing."""
        host = _netloc(f"//{headers.get('host', '')}")
        if host is None:
            return "the header Host is no name of a host; send the one in this server's address"
        if self.token is None and _name(host) not in LOCAL:
            return "this server answers to 127.0.0.1 and localhost alone; start it with --host and --token"
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin and _netloc(origin) != host:
            return "another web site may not send requests here"
        return ""

    def _by_query(self, scope: Scope) -> Response:
        """A browser that brings the token in its address gets a cookie, and the address without it."""
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for name, value in pairs if name == "token"), "")
        if scope["method"] not in ("GET", "HEAD") or not self._same(given, self.token or ""):
            answer = _told(401, "this server needs its token: a header Authorization: Bearer …, or /?token=… once")
            answer.headers["www-authenticate"] = "Bearer"
            return answer
        rest = urlencode([(name, value) for name, value in pairs if name != "token"])
        place = "/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else "")
        found = RedirectResponse(place, status_code=303)
        found.set_cookie(COOKIE, self.session, httponly=True, samesite="strict", secure=scope["scheme"] == "https")
        return found

    @staticmethod
    def _same(given: str, wanted: str) -> bool:
        """Whether two texts are the same, in a time that tells nothing of where they differ."""
        one, other = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, wanted))
        return hmac.compare_digest(one, other)


def _netloc(address: str) -> str | None:
    """The part of an address that says where it leads; None where the address is none."""
    try:
        return urlsplit(address).netloc
    except ValueError:
        return None


def _name(netloc: str) -> str:
    """The host of ``host:port`` and ``[::1]:port``."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


def _cookie(text: str) -> str:
    try:
        found = SimpleCookie(text).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _told(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


__all__ = ["HEADERS", "LOCAL", "Guard"]

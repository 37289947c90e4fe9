from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from overfly.web.server import AccessMiddleware, BodyLimitMiddleware, application
from overfly.web.service import Limits

TOKEN = "correct horse battery"  # noqa: S105  (of a test)


async def _hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"hello {request.url.query}")


def client(token: str | None = None, host: str = "127.0.0.1:8000") -> TestClient:
    routes = [Route(path, _hello, methods=["GET", "POST"]) for path in ("/", "/health", "/deep/er")]
    app = AccessMiddleware(Starlette(routes=routes), token)
    return TestClient(app, base_url=f"http://{host}", follow_redirects=False)


def local(host: str) -> int:
    return TestClient(application([]), base_url=f"http://{host}").get("/health").status_code


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:9", "LOCALHOST:1"])
def test_local_hosts_are_answered(host: str) -> None:
    assert local(host) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "[", "a]b", "[::1"])
@pytest.mark.parametrize("path", ["/health", "/stream/state"])
def test_other_hosts_are_refused_without_a_token(host: str, path: str) -> None:
    result = TestClient(application([]), base_url="http://127.0.0.1").get(path, headers={"host": host})
    assert result.status_code == 400


def test_other_origins_must_not_post() -> None:
    assert client().post("/", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client().post("/").status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000"):
        assert client().post("/", headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("wrong", ["[", "a]b", "[::1", "[x]"])
def test_invalid_origins_are_refused(wrong: str) -> None:
    known = {"authorization": f"Bearer {TOKEN}"}
    assert client(TOKEN).post("/", headers=known | {"origin": f"http://{wrong}"}).status_code == 403


def test_requests_without_the_token_are_refused_except_health() -> None:
    session = client(TOKEN, "example.org")
    assert session.get("/health").status_code == 200
    response = session.get("/")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    for wrong in ("", "Bearer", "Bearer correct", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
        assert session.get("/", headers={"authorization": wrong}).status_code == 401
    assert session.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_token_in_the_address_sets_a_cookie() -> None:
    session = client(TOKEN, "example.org")
    assert session.get("/?token=wrong").status_code == 401
    result = session.get("/deep/er", params={"token": TOKEN, "a": "1 2"})
    assert result.status_code == 303
    assert result.headers["location"] == "/deep/er?a=1+2"
    cookie = result.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert session.get("/deep/er").status_code == 200
    assert client(TOKEN).get("/", headers={"cookie": "overfly=x"}).status_code == 401
    other = client(TOKEN).get("/", headers={"cookie": cookie.split(";")[0]})
    assert other.status_code == 401, "the cookie of one server opened another"


def test_login_redirects_to_this_server_only() -> None:
    result = client(TOKEN).get(f"//evil.example/?token={TOKEN.replace(' ', '+')}")
    assert result.status_code in (303, 401)
    assert not result.headers.get("location", "/").startswith(("//", "http", "/\\"))


def test_every_answer_has_security_headers() -> None:
    for result in (client().get("/"), client().post("/", headers={"origin": "evil"}), client(TOKEN).get("/")):
        policy = result.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert result.headers["x-content-type-options"] == "nosniff"
        assert result.headers["cache-control"] == "no-store"


def _limited(limits: Limits) -> BodyLimitMiddleware:
    async def count(request: Request) -> PlainTextResponse:
        try:
            body = await request.body()
        except ClientDisconnect:  # as frameworks answer
            return PlainTextResponse("incomplete", 400)
        return PlainTextResponse(str(len(body)))

    return BodyLimitMiddleware(Starlette(routes=[Route("/", count, methods=["POST"])]), limits)


async def _chunks(size: int, number: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(number):
        await asyncio.sleep(pause)
        yield b"x" * size


def _post(app: BodyLimitMiddleware, **content: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as session:
            return await session.post("/", **content)

    return asyncio.run(send())


def test_large_bodies_are_refused_with_and_without_content_length() -> None:
    app = _limited(Limits(upload=100))
    assert _post(app, content=b"x" * 100).text == "100"
    assert _post(app, content=_chunks(10, 10)).text == "100"
    for response in (_post(app, content=b"x" * 101), _post(app, content=_chunks(10, 11))):
        assert response.status_code == 413
        assert "detail" in response.json()
    assert _post(app, content=b"", headers={"content-length": "many"}).status_code == 200


def test_slow_bodies_are_refused() -> None:
    assert _post(_limited(Limits(seconds=0.1)), content=_chunks(1, 100, pause=0.05)).status_code == 408

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from overfly.core.errors import RecipeError
from overfly.web import server
from overfly.web.server import AccessMiddleware, BodyLimitMiddleware, application
from overfly.web.service import Limits
from served import encoded, network, ramp

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


def test_bodies_that_trickle_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE", 0.2)
    started = time.monotonic()
    assert _post(_limited(Limits(rate=1000)), content=_chunks(1, 100, pause=0.05)).status_code == 408
    assert time.monotonic() - started < 5
    assert _post(_limited(Limits(rate=1000)), content=_chunks(1000, 10, pause=0.05)).text == "10000"


HEAD = b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=b\r\n"


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """The address of a server of two images at a time, and of eight connections of an address."""
    monkeypatch.setattr(server, "GRACE", 2.0)
    limits = Limits(queue=2, connections_per_address=8)
    started = server.start(server.application([network()], limits=limits), limits=limits)
    yield "127.0.0.1", int(started.address.rsplit(":", 1)[1].strip("/"))
    started.stop()


def _answer(connection: socket.socket) -> bytes:
    with connection:
        connection.settimeout(20)
        try:
            return connection.recv(64)
        except ConnectionError:
            return b""


def test_slow_requests_do_not_hold_the_queue(running: tuple[str, int]) -> None:
    held = [socket.create_connection(running) for _ in range(6)]
    for connection in held[:3]:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n--b")
    held[3].sendall(HEAD)  # no end of the headers
    result = httpx.post(f"http://127.0.0.1:{running[1]}/predict", files={"image": ("a.png", encoded(ramp()))})
    assert result.status_code == 200
    answers = [_answer(connection) for connection in held]
    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 408"] * 3 + [b""] * 3


def test_an_address_has_a_bounded_number_of_connections(running: tuple[str, int]) -> None:
    held = [socket.create_connection(running) for _ in range(8)]
    time.sleep(0.2)
    result = httpx.get(f"http://127.0.0.1:{running[1]}/health")
    assert result.status_code == 429
    assert "connections" in result.json()["detail"]
    held += [socket.create_connection(running) for _ in range(12)]
    assert [_answer(connection) for connection in held] == [b""] * 20
    assert httpx.get(f"http://127.0.0.1:{running[1]}/health").status_code == 200


def test_many_requests_at_once_are_answered_or_refused(running: tuple[str, int]) -> None:
    image = {"image": ("a.png", encoded(ramp()))}

    def post(_: int) -> int:
        try:
            return httpx.post(f"http://127.0.0.1:{running[1]}/predict", files=image, timeout=60).status_code
        except httpx.TransportError:  # closed at once
            return 429

    with ThreadPoolExecutor(24) as pool:
        statuses = Counter(pool.map(post, range(120)))
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200]
    assert httpx.get(f"http://127.0.0.1:{running[1]}/health").status_code == 200


@pytest.mark.parametrize(
    "address", ["a.org/{z}/{x}/{y}", "https://a.org/{z}/{x}", "ftp://a/{z}/{x}/{y}", "https://a b/{z}/{x}/{y}",
                "https://a;script-src */{z}/{x}/{y}"],
)  # fmt: skip
def test_a_base_map_is_an_address_of_tiles(address: str) -> None:
    with pytest.raises(RecipeError, match=r"--base-map must be an address like https://.*\{y\}\.png, got"):
        application([], base_map=address)


def test_images_of_the_base_map_alone_are_permitted() -> None:
    for base_map, images in ((None, " "), ("https://a.org:81/{z}/{x}/{y}?key=1", " https://a.org:81")):
        headers = TestClient(application([], base_map=base_map), base_url="http://127.0.0.1").get("/health").headers
        assert f"img-src 'self' data: blob:{images};" in headers["content-security-policy"]

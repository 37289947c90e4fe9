from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from overfly.web.middleware import Guard

TOKEN = "correct horse battery"  # noqa: S105  (of a test)


async def _hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"hello {request.url.query}")


def client(token: str | None = None, host: str = "127.0.0.1:8000") -> TestClient:
    routes = [Route(path, _hello, methods=["GET", "POST"]) for path in ("/", "/health", "/deep/er")]
    return TestClient(Guard(Starlette(routes=routes), token), base_url=f"http://{host}", follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:9", "LOCALHOST:1"])
def test_local_names_are_answered(host: str) -> None:
    assert client(host=host).get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_page_elsewhere_cannot_reach_it_under_its_own_name(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 403


def test_other_sites_may_not_send() -> None:
    assert client().post("/", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client().post("/").status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000"):
        assert client().post("/", headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("wrong", ["[", "a]b", "[::1", "[x]"])
def test_addresses_that_are_none_are_refused_and_break_nothing(token: str | None, wrong: str) -> None:
    asked = client(token)
    known = {"authorization": f"Bearer {TOKEN}"}
    for path in ("/", "/health"):
        found = asked.get(path, headers=known | {"host": wrong})
        assert found.status_code == 403
        assert isinstance(found.json()["detail"], str)
    assert asked.post("/", headers=known | {"origin": f"http://{wrong}"}).status_code == 403


def test_without_the_token_there_is_nothing_but_health() -> None:
    asked = client(TOKEN, "example.org")
    assert asked.get("/health").status_code == 200
    refused = asked.get("/")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    for wrong in ("", "Bearer", "Bearer correct", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
        assert asked.get("/", headers={"authorization": wrong}).status_code == 401
    assert asked.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_browser_brings_the_token_once_and_gets_a_cookie() -> None:
    asked = client(TOKEN, "example.org")
    assert asked.get("/?token=wrong").status_code == 401
    found = asked.get("/deep/er", params={"token": TOKEN, "a": "1 2"})
    assert found.status_code == 303
    assert found.headers["location"] == "/deep/er?a=1+2"
    cookie = found.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert asked.get("/deep/er").status_code == 200
    assert client(TOKEN).get("/", headers={"cookie": "overfly=x"}).status_code == 401
    other = client(TOKEN).get("/", headers={"cookie": cookie.split(";")[0]})
    assert other.status_code == 401, "the cookie of one server opened another"


def test_the_token_never_sends_anybody_elsewhere() -> None:
    found = client(TOKEN).get(f"//evil.example/?token={TOKEN.replace(' ', '+')}")
    assert found.status_code in (303, 401)
    assert not found.headers.get("location", "/").startswith(("//", "http", "/\\"))


def test_every_answer_forbids_what_it_can() -> None:
    for found in (client().get("/"), client().get("/", headers={"host": "evil"}), client(TOKEN).get("/")):
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["cache-control"] == "no-store"

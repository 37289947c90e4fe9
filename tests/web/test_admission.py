from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from overfly.web.admission import Admission
from overfly.web.config import Limits


def _app(limits: Limits, gate: asyncio.Event | None = None) -> Admission:
    async def count(request: Request) -> PlainTextResponse:
        try:
            body = await request.body()
        except Exception:  # as frameworks do with a body that breaks off
            return PlainTextResponse("broken", 400)
        if gate is not None:
            await gate.wait()
        return PlainTextResponse(str(len(body)))

    return Admission(Starlette(routes=[Route("/", count, methods=["GET", "POST"])]), limits)


def _client(app: Admission) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")


async def _drops(size: int, number: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(number):
        await asyncio.sleep(pause)
        yield b"x" * size


def test_a_body_is_bounded_whether_it_says_its_size_or_not() -> None:
    async def ask() -> list[int]:
        async with _client(_app(Limits(upload=100))) as client:
            answers = [
                await client.post("/", content=b"x" * 100),
                await client.post("/", content=b"x" * 101),
                await client.post("/", content=_drops(10, 10)),
                await client.post("/", content=_drops(10, 11)),
                await client.post("/", content=b"", headers={"content-length": "many"}),
            ]
        return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [200, 413, 200, 413, 200]


def test_a_body_that_trickles_in_is_given_up() -> None:
    async def ask() -> int:
        async with _client(_app(Limits(seconds=0.1))) as client:
            return (await client.post("/", content=_drops(1, 100, pause=0.05))).status_code

    assert asyncio.run(ask()) == 408


def test_who_finds_no_room_is_told_when_to_come_back() -> None:
    async def ask() -> list[httpx.Response]:
        gate = asyncio.Event()
        app = _app(Limits(queue=2), gate)
        async with _client(app) as client:
            first = [asyncio.create_task(client.post("/", content=b"1")) for _ in range(2)]
            while app.inside < 2:
                await asyncio.sleep(0)
            third = await client.post("/", content=b"1" * 10**6)
            looking = asyncio.create_task(client.get("/"))
            await asyncio.sleep(0.01)
            gate.set()
            answers = [await each for each in first]
            return [*answers, third, await looking, await client.post("/", content=b"22")]

    *first, third, looking, after = asyncio.run(ask())
    assert [each.status_code for each in first] == [200, 200]
    assert third.status_code == 429
    assert 1 <= int(third.headers["retry-after"]) <= 60
    assert "try again" in third.json()["detail"]
    assert looking.status_code == 200
    assert after.text == "2"


@pytest.mark.parametrize("body", [b"", b"abc"])
def test_room_is_given_back_after_a_failure(body: bytes) -> None:
    async def fail(request: Request) -> PlainTextResponse:
        raise ValueError(await request.body())

    async def ask() -> int:
        app = Admission(Starlette(routes=[Route("/", fail, methods=["POST"])]), Limits(queue=1))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for _ in range(3):
                assert (await client.post("/", content=body)).status_code == 500
        return app.inside

    assert asyncio.run(ask()) == 0

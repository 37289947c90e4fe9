"""Requests of many, slow or hostile clients to a server that listens."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from overfly.web import server
from overfly.web.server import BackgroundServer
from overfly.web.service import Limits
from served import encoded, network, ramp

HOST = b"host: 127.0.0.1\r\n"
SECOND = b"GET /networks HTTP/1.1\r\n" + HOST + b"\r\n"
"""A request that a proxy in front may take for a part of the first one's body."""
POST = b"POST /predict HTTP/1.1\r\n" + HOST


def port(running: BackgroundServer) -> int:
    return int(running.address.rsplit(":", 1)[1].strip("/"))


@pytest.fixture(scope="module")
def running() -> Iterator[BackgroundServer]:
    started = server.start(server.application([network()]))
    yield started
    started.stop()


def answers(running: BackgroundServer, data: bytes) -> tuple[list[int], bool]:
    """Send bytes; return the statuses of the answers, and whether the server closed the connection."""
    received, closed = b"", False
    with socket.create_connection(("127.0.0.1", port(running))) as connection:
        connection.sendall(data)
        connection.settimeout(2)
        try:
            while part := connection.recv(1 << 16):
                received += part
            closed = True
        except TimeoutError:
            pass
        except ConnectionError:
            closed = True
    return [int(answer[:3]) for answer in received.split(b"HTTP/1.1 ")[1:]], closed


@pytest.mark.parametrize("head", [
    b"content-length: 4\r\ntransfer-encoding: chunked\r\n", b"content-length: 4\r\ncontent-length: 5\r\n",
    b"content-length: 5, 6\r\n", b"content-length: +5\r\n", b"content-length: -5\r\n",
    b"transfer-encoding: identity\r\n",
    b"transfer-encoding: chunked, identity\r\n", b"transfer-encoding: xchunked\r\n", b"transfer-encoding : chunked\r\n",
    b"x: a\rtransfer-encoding: chunked\r\n", b"x: a\0b\r\ncontent-length: 5\r\n", b"host: evil.example\r\n",
])  # fmt: skip
def test_ambiguous_lengths_are_refused_and_close_the_connection(running: BackgroundServer, head: bytes) -> None:
    assert answers(running, POST + head + b"\r\n0\r\n\r\n" + SECOND) == ([400], True)


@pytest.mark.parametrize("chunk", [b"0x1\r\na\r\n", b"-1\r\na\r\n", b"f" * 30 + b"\r\n"])
def test_malformed_chunks_are_refused_without_a_traceback(
    running: BackgroundServer, chunk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        statuses, closed = answers(
            running, POST + b"transfer-encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n" + SECOND
        )
    assert statuses == [400]
    assert closed
    assert not [record for record in caplog.records if record.exc_info]


def test_a_second_request_in_a_body_is_not_answered(running: BackgroundServer) -> None:
    head = b"GET /networks HTTP/1.1\r\n" + HOST + b"content-length: %d\r\n\r\n" % len(SECOND)
    assert answers(running, head + SECOND) == ([200], False)


def test_both_lengths_are_refused_before_host_and_token() -> None:
    guarded = server.start(server.application([network()], token="correct horse"))  # noqa: S106
    try:
        both = b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        assert answers(guarded, POST + both + SECOND) == ([400], True)
        assert answers(guarded, SECOND)[0] == [401]
    finally:
        guarded.stop()


async def _burst(port: int, count: int, addresses: int) -> list[tuple[int, str] | str]:
    """Open connections from addresses of this machine, send a request on all, then read the answers."""
    body = (
        b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + encoded(ramp())
        + b"\r\n--b--\r\n"
    )
    head = POST + b"connection: close\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: %d\r\n\r\n"

    async def one(number: int) -> tuple[int, str] | str:
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(f"127.0.0.{1 + number % addresses}", 0)
            )
            writer.write(head % len(body) + body)
            answer = await asyncio.wait_for(reader.read(), 90)
            writer.close()
        except (OSError, TimeoutError) as error:
            return type(error).__name__
        first, _, content = answer.partition(b"\r\n\r\n")
        detail = "" if b" 200 " in first[:15] else str(json.loads(content or b"{}").get("detail", ""))
        return int(first.split()[1]) if first else 0, detail

    return await asyncio.gather(*(one(number) for number in range(count)))


@pytest.mark.skipif(not Path("/proc/net").exists(), reason="needs many loopback addresses, as on Linux")
def test_a_thousand_requests_at_once_are_answered_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))  # both ends are in this process
    limits = Limits()
    started = server.start(server.application([network()], limits=limits), limits=limits)
    before = psutil.Process().memory_info().rss
    begin = time.monotonic()
    try:
        found = asyncio.run(_burst(port(started), 1000, addresses=40))
        assert httpx.get(f"{started.address}health").status_code == 200
    finally:
        started.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    grown = (psutil.Process().memory_info().rss - before) / 1e6
    statuses = Counter(each if isinstance(each, str) else each[0] for each in found)
    with capsys.disabled():
        print(
            f"\n1000 requests at once: {dict(statuses)}, {time.monotonic() - begin:.0f} s, {grown:.0f} MB more", end=""
        )
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] >= limits.queue
    assert all(each[1] for each in found if each[0] != 200)
    assert grown < 300


def test_sixteen_slow_bodies_do_not_hold_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE", 3.0)
    started = server.start(server.application([network()]))
    try:
        slow = [socket.create_connection(("127.0.0.1", port(started))) for _ in range(16)]
        for connection in slow:
            connection.sendall(
                POST + b"content-type: multipart/form-data; boundary=b\r\ncontent-length: 9999\r\n\r\n--b"
            )
        begin = time.monotonic()
        image = {"image": ("a.png", encoded(ramp()))}
        for _ in range(3):
            assert httpx.post(f"{started.address}predict", files=image, timeout=30).status_code == 200
        assert time.monotonic() - begin < 20
        for connection in slow:
            connection.settimeout(20)
            assert connection.recv(64).startswith(b"HTTP/1.1 408")
            connection.close()
    finally:
        started.stop()

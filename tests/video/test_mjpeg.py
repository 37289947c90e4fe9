"""The page of a stream, as a browser and as a stranger ask for it; and a stream that is watched over HTTP."""

from __future__ import annotations

import http.client
import io
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from overfly.core.errors import DataError, RecipeError
from overfly.video.endings import public_message
from overfly.video.mjpeg import CONTENT_TYPE, VIEWERS, parts, serving
from overfly.video.player import LatestFrame
from seeing import number_of, striped


def asked(address: str, path: str, **headers: str) -> http.client.HTTPResponse:
    host = urlsplit(address).netloc
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def test_the_page_shows_the_stream() -> None:
    screen = LatestFrame()
    screen.show(striped(2))
    with serving(screen, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        page = asked(address, "/")
        assert page.status == 200
        assert b'<img src="stream"' in page.read()
        with Image.open(io.BytesIO(asked(address, "/frame.jpg").read())) as picture:
            assert number_of(np.asarray(picture)) == 2
        stream = asked(address, "/stream")
        assert stream.getheader("Content-Type") == CONTENT_TYPE
        for number in (2, 7):
            head = [stream.readline() for _ in range(4)]
            assert head[0] == b"--overfly-frame\r\n"
            length = int(head[2].split(b":")[1])
            with Image.open(io.BytesIO(stream.read(length))) as picture:
                assert number_of(np.asarray(picture)) == number
            assert stream.readline() == b"\r\n"
            screen.show(striped(7))
    assert screen.closed


def test_the_page_hears_how_the_stream_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfly.video.mjpeg.WAIT", 0.05)
    screen, told = LatestFrame(), list[bytes]()
    with serving(screen, 0) as address:
        assert asked(address, "/ended").status == 204
        monkeypatch.setattr("overfly.video.mjpeg.WAIT", 10.0)
        waiting = threading.Thread(target=lambda: told.append(asked(address, "/ended").read()))
        waiting.start()
        time.sleep(0.1)
        screen.close("it came to its end after 7 pictures")
    waiting.join(10)
    assert told == [b"it came to its end after 7 pictures"]


def test_what_went_wrong_is_told_without_the_address() -> None:
    address = "rtsp://me:secret@camera/1"
    assert public_message(DataError(f"{address} breaks off"), address) == "the stream breaks off"
    assert public_message(DataError("flight.mp4 breaks off"), "flight.mp4") == "the stream breaks off"
    assert public_message(DataError("0 of 10 packets"), "10") == "0 of 10 packets"


def test_strangers_are_turned_away() -> None:
    with serving(LatestFrame(), 0) as address:
        assert asked(address, "/", Host="evil.example:80").status == 403
        assert asked(address, "/../../etc/passwd").status == 404
        assert asked(address, "/nothing").status == 404


def test_viewers_are_bounded_and_those_who_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfly.video.mjpeg.TIMEOUT", 0.05)
    screen = LatestFrame()
    screen.show(striped(0))
    with serving(screen, 0) as address:
        viewers = [asked(address, "/stream") for _ in range(VIEWERS)]
        assert {viewer.status for viewer in viewers} == {200}
        assert asked(address, "/stream").status == 503
        for viewer in viewers:
            viewer.close()
        limit_duration = time.monotonic() + 10
        while asked(address, "/stream").status != 200:
            assert time.monotonic() < limit_duration, "a viewer who is gone keeps the place"
            screen.show(striped(1))
            time.sleep(0.02)


def test_the_parts_end_with_the_screen() -> None:
    screen = LatestFrame()
    threading.Timer(0.1, screen.close).start()
    screen.show(striped(0))
    found = list(parts(screen, timeout=5))
    assert len(found) == 2
    assert found[-1] == b"--overfly-frame--\r\n"


def test_a_still_stream_is_sent_again_so_that_the_gone_are_noticed() -> None:
    screen = LatestFrame()
    screen.show(striped(0))
    again = parts(screen, timeout=0.01)
    assert next(again) == next(again)


def test_a_taken_port_is_told() -> None:
    with serving(LatestFrame(), 0) as address:
        port = urlsplit(address).port or 0
        with pytest.raises(RecipeError, match=f"port {port} cannot be served"), serving(LatestFrame(), port):
            pass


def test_a_stream_is_watched_over_http() -> None:
    pytest.importorskip("av")
    from overfly.video.capture import open_stream

    screen, numbers, over = LatestFrame(), list[int](), threading.Event()

    def shows() -> None:
        for index in range(400):
            if over.wait(0.02):
                break
            screen.show(striped(index % 16))

    with serving(screen, 0) as address:
        camera = threading.Thread(target=shows)
        camera.start()
        with open_stream(f"{address}stream") as source:
            assert source.live
            for picture in source.pictures:
                numbers.append(number_of(picture.pixels()))
                if len(numbers) == 10:
                    break
        over.set()
        camera.join()
    steps = np.diff(numbers) % 16
    assert (steps >= 1).all()
    assert len(set(numbers)) > 3

"""Overlays as a page on this machine: a stream of JPEGs that every browser shows, without anything to install."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from overfly.core.errors import RecipeError
from overfly.video.player import LatestFrame

BOUNDARY = "overfly-frame"
CONTENT_TYPE = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
"""Type of a response whose body is `parts`."""
VIEWERS = 16
"""Connections that are served at a time."""
TIMEOUT = 10.0
"""Seconds that a viewer has to take a frame, and that the stream may stand still before the last is sent again."""
WAIT = 5.0
"""Seconds that a page waits for the end of the stream before it asks again: a viewer who is gone is noticed."""
LAST = 1.0
"""Seconds that a page has to hear how the stream ended."""
NAMES = ("127.0.0.1", "localhost")
"""What the page may be called: a page of another name must not read the camera by way of a name that means us."""
PAGE = b"""<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width"><title>overfly watch</title>
<style>html{background:#101216;color:#ccc;font:14px sans-serif}body{margin:0;min-height:100vh;display:grid;
place-items:center}img{max-width:100vw;max-height:100vh}p{position:fixed;top:0;left:0;right:0;margin:0;padding:.6rem;
background:#9a4600;color:#fff;font-size:16px}p:empty{display:none}.ended img{opacity:.5;filter:grayscale(1)}</style>
<img src="stream" alt="The stream with its classes"><p role="status"></p>
<script>
const say = (words) => {
  document.querySelector("p").textContent = words;
  document.body.className = "ended";
};
const ask = async () => {
  try {
    const answer = await fetch("ended");
    if (answer.status === 204) ask();
    else if (answer.ok) say("This stream has ended: " + await answer.text() + ".");
  } catch (error) {
    say("This stream has ended, with the program that showed it.");
  }
};
ask();
</script></html>"""


def parts(screen: LatestFrame, timeout: float = TIMEOUT) -> Iterator[bytes]:
    """The body of a multipart response: each new overlay as one part, until the screen is closed.

    Where nothing new comes within ``timeout`` seconds the last is sent again, so that a viewer who is gone is noticed.
    """
    number = 0
    while True:
        shown = screen.wait(number, timeout)
        if shown is None:
            if screen.closed:
                yield f"--{BOUNDARY}--\r\n".encode()
                return
            shown = screen.latest()
            if shown is None:
                continue
        number = shown.number
        head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(shown.jpeg)}\r\n\r\n"
        yield head.encode() + shown.jpeg + b"\r\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, port: int, screen: LatestFrame) -> None:
        self.screen = screen
        self.room = threading.BoundedSemaphore(VIEWERS)
        self.telling: set[threading.Thread] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A viewer who goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host", "") not in {f"{name}:{port}" for name in NAMES}:
            self.send_error(HTTPStatus.FORBIDDEN, f"call it http://127.0.0.1:{port}/")
        elif self.path == "/":
            self._send("text/html; charset=utf-8", PAGE)
        elif self.path == "/frame.jpg":
            shown = self.server.screen.wait(0, TIMEOUT)
            if shown is None:
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "there is no frame yet")
            else:
                self._send("image/jpeg", shown.jpeg)
        elif self.path == "/stream":
            self._stream()
        elif self.path == "/ended":
            self._tell()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _stream(self) -> None:
        if not self.server.room.acquire(blocking=False):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{VIEWERS} others are looking; try again later")
            return
        try:
            self._head(CONTENT_TYPE)
            for part in parts(self.server.screen):
                self.wfile.write(part)
        finally:
            self.server.room.release()

    def _tell(self) -> None:
        """How the stream has ended, as soon as it has; 204 where it goes on, to be asked again."""
        telling = self.server.telling
        if len(telling) >= VIEWERS:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{VIEWERS} others are asking; try again later")
            return
        telling.add(threading.current_thread())
        try:
            screen = self.server.screen
            screen.wait(sys.maxsize, WAIT)
            if screen.closed:
                self._send("text/plain; charset=utf-8", (screen.ended or "it was stopped").encode())
            else:
                self.send_response(HTTPStatus.NO_CONTENT)
                self.end_headers()
        finally:
            telling.discard(threading.current_thread())

    def _send(self, kind: str, body: bytes) -> None:
        self._head(kind, len(body))
        self.wfile.write(body)

    def _head(self, kind: str, length: int | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the library's name)
        """Say nothing."""


@contextmanager
def serving(screen: LatestFrame, port: int) -> Iterator[str]:
    """Show a screen on this machine alone, at ``/``, ``/stream`` and ``/frame.jpg``; closes it in the end.

    Args:
        screen: what is shown.
        port: 0 takes a free one.

    Yields:
        The page's address.

    Raises:
        RecipeError: the port is taken.
    """
    try:
        server = _Server(port, screen)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "there is no such port"
        raise RecipeError(f"port {port} cannot be served ({reason}); choose another --serve") from None
    thread = threading.Thread(target=server.serve_forever, name="overfly-page", daemon=True, args=(0.1,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        screen.close()
        for telling in list(server.telling):
            telling.join(LAST)
        server.shutdown()
        server.server_close()
        thread.join()

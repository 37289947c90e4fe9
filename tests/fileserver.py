"""A small file server on 127.0.0.1 that can be as unreliable as real ones, and archives in LoveDA's layout."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from overfly.core import download
from overfly.data import loveda
from overfly.data.domain import Split
from overfly.data.loveda import LOVEDA

PIECE = 4096
FOLDERS: dict[Split, str] = {"train": "Train", "val": "Val", "test": "Test"}


@dataclass
class Served:
    """A file, and how it is served."""

    body: bytes
    etag: str | None = '"v1"'
    modified: str | None = "Mon, 01 Nov 2021 10:00:00 GMT"
    ranges: bool = True  # answers Range
    if_range: bool = True  # and looks at If-Range while doing so
    length: bool = True  # send Content-Length
    chunked: bool = False
    redirect: str | None = None
    retry_after: str | None = None
    stall: float = 0.0  # seconds of silence before the body
    pace: float = 0.0  # seconds between pieces
    breaks: list[int] = field(default_factory=list)  # bytes after which each of the next answers breaks off
    statuses: list[int] = field(default_factory=list)  # the next answers are these errors


@dataclass
class FileServer:
    """Served files and received requests."""

    address: str
    files: dict[str, Served] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def add(self, name: str, served: Served | bytes) -> str:
        """Serve a file; gives its address."""
        self.files[f"/{name}"] = served if isinstance(served, Served) else Served(served)
        return f"{self.address}/{name}"

    def ranges(self) -> list[str | None]:
        """The Range header of each request so far."""
        return [headers.get("Range") for _, headers in self.requests]


@contextmanager
def serving(patch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Run a `FileServer` in a thread, reached without a proxy, with retries that do not wait."""
    patch.setenv("no_proxy", "*")
    patch.setattr(download, "PAUSE", 0.0)
    patch.setattr(download, "CHUNK", 100)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up here on purpose
    record = FileServer(f"http://127.0.0.1:{server.server_address[1]}")
    _Handler.records[server.server_address[1]] = record
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield record
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_address() -> str:
    """A local address without a server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.server_close()
    return f"http://127.0.0.1:{server.server_address[1]}"


def md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def archive_of(split: Split, *, urban: int = 3, rural: int = 2, masks: bool = True) -> bytes:
    """A zip as LoveDA's, with files that are images in name only."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for scene, count in (("Urban", urban), ("Rural", rural)):
            for number in range(count):
                name = f"{FOLDERS[split]}/{scene}/{{}}/{number}.png"
                archive.writestr(name.format("images_png"), f"{split} {scene} {number}" * 200)
                if masks and split != "test":
                    archive.writestr(name.format("masks_png"), b"mask")
    return packed.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, server: FileServer, made: dict[Split, bytes]) -> None:
    known = {split: old._replace(md5=md5(made[split])) if split in made else old for split, old in LOVEDA.items()}
    monkeypatch.setattr(loveda, "LOVEDA", known)
    for split, body in made.items():
        server.add(f"{FOLDERS[split]}.zip", body)


class _Handler(BaseHTTPRequestHandler):
    records: dict[int, FileServer] = {}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        record = self.records[self.server.server_address[1]]  # type: ignore[index]
        record.requests.append((self.path, dict(self.headers)))
        served = record.files.get(self.path)
        if served is None:
            self.send_error(404)
        elif served.statuses:
            self._fail(served, served.statuses.pop(0))
        elif served.redirect:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._answer(served)

    def _fail(self, served: Served, status: int) -> None:
        self.send_response(status)
        if served.retry_after:
            self.send_header("Retry-After", served.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, served: Served) -> None:
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        fresh = not served.if_range or condition in (None, served.etag, served.modified)
        start, size = 0, len(served.body)
        if requested and served.ranges and fresh:
            start = int(requested[1])
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        for header, value in (("ETag", served.etag), ("Last-Modified", served.modified)):
            if value:
                self.send_header(header, value)
        if served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif served.length:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        self._send(served, served.body[start:])

    def _send(self, served: Served, body: bytes) -> None:
        time.sleep(served.stall)
        limit = served.breaks.pop(0) if served.breaks else None
        sent = body[:limit]
        for at in range(0, len(sent), PIECE):
            piece = sent[at : at + PIECE]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if served.chunked else piece)
            time.sleep(served.pace)
        if served.chunked and limit is None:
            self.wfile.write(b"0\r\n\r\n")

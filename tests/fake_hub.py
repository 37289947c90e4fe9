"""A model hub on this machine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The requests of pushing and loading small files; ``files`` holds what was pushed."""

    files: ClassVar[dict[str, bytes]] = {}

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self._json({"url": "http://127.0.0.1/me/net"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._json(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]}
            )
        elif "/commit/" in self.path:
            import base64

            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._json({"commitUrl": f"http://127.0.0.1/me/net/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self._json({})

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            name = unquote(self.path.split("?")[0].rsplit("/", 1)[-1])
            body = self.files[name]
            self._send(body, ETag=f'"{len(body)}-{name}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in self.files.items()]
            self._json(tree)
        elif self.path.startswith("/api/models/me/"):
            repository = self.path.split("/revision/")[0].removeprefix("/api/models/")
            self._json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        else:
            self._send(b"{}", 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


@contextmanager
def fake_hub() -> Iterator[str]:
    """Serve an empty hub; yield its address."""
    FakeHub.files = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
